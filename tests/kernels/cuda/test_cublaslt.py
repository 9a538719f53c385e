"""Products through cuBLASLt's interface, with a library that does on a CPU what NVIDIA documents."""

import ctypes

import numpy as np
import pytest
from cuda_emulation import emulator

from benchmarks import contact_products, contact_stages
from minivit.errors import DeviceError
from minivit.kernels.core import arrays, devices
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.cuda import cublaslt, gemm
from minivit.kernels.cuda.product import WORKSPACE, Product, can_sum

pytestmark = pytest.mark.skipif(bool(emulator.unavailable()), reason=emulator.unavailable())
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
WEIGHT = Product(1, 384, 384, 66560, 0, 0, True, False, sums=True)


class WithLibrary(emulator.Emulator):
    """It knows which products it ran."""

    def __init__(self):
        super().__init__()
        self.products = []

    def multiply(self, product, arguments):
        self.products.append(product)
        super().multiply(product, arguments)


@pytest.fixture
def library():
    with devices.using(WithLibrary()) as runtime:
        yield runtime


def split(value):
    ctypes.CDLL(str(emulator.cublaslt_path())).emulated_split_sums(int(value))


def test_products_of_all_types_layouts_and_epilogues(library):
    entries = list(contact_products.products(contact_stages.Setting(True, None, 10.0)))
    assert all(entry.get("right", True) for entry in entries) and len(entries) > len(contact_products.CASES)
    assert any(product.sums for product in library.products) and any(product.batch > 1 for product in library.products)


@pytest.mark.parametrize("dtype, c_dtype", [(BFLOAT16, F32), (F32, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("splits", [True, False])
def test_gradients_of_a_weight_and_its_bias(library, dtype, c_dtype, running, splits):
    rng = np.random.default_rng(0)
    rows = 8192 if dtype == BFLOAT16 and not running else 96  # long enough for K to be split
    dy, x = (rng.standard_normal((rows, n)).astype(dtype) for n in (5, 3))
    before = rng.standard_normal((5, 3)).astype(c_dtype)
    dw, db = (arrays.array_on("cuda", np.full(shape, np.nan, c_dtype)) for shape in ((5, 3), (5,)))
    there = [arrays.array_on("cuda", m) for m in (dy, x, before)]
    try:
        split(splits)
        gemm.parameter_gradients(dw, db, *there[:2], there[2] if running else None)
    finally:
        split(True)
    wide_dy, wide_x = dy.astype(F64), x.astype(F64)
    tolerance = {"rtol": 1e-5, "atol": 1e-3} if c_dtype == F32 else {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(arrays.to_numpy(dw), wide_dy.T @ wide_x + (before if running else 0), **tolerance)
    np.testing.assert_allclose(arrays.to_numpy(db), wide_dy.sum(0), **tolerance)
    (product,) = library.products
    assert product.sums == (dtype != F64 and (splits or rows < 8192))  # a sum that would leave the GPU idle is computed apart


def test_either_gradient_alone(library):
    dy, x = (arrays.array_on("cuda", np.ones((4, n), np.float32)) for n in (5, 3))
    dw, db = (arrays.array_on("cuda", np.zeros(shape, np.float32)) for shape in ((5, 3), (5,)))
    gemm.parameter_gradients(dw, None, dy, x, None)
    assert (arrays.to_numpy(dw) == 4).all() and (arrays.to_numpy(db) == 0).all()
    gemm.parameter_gradients(None, db, dy, x, None)
    assert (arrays.to_numpy(db) == 4).all() and not library.products[-1].sums


def test_sums_that_would_leave_the_gpu_idle_are_known_before(library):
    large = WEIGHT._replace(rows=4096, columns=4096, depth=1024)
    try:
        for splits in (True, False):
            split(splits)
            blas = cublaslt.CublasLt(str(emulator.cublaslt_path()), library)
            assert blas.fills(WEIGHT, BFLOAT16, F32) is splits and blas.fills(large, BFLOAT16, F32)
    finally:
        split(True)


def test_what_is_not_documented_is_refused(library):
    assert not can_sum(WEIGHT, F64, F64) and not can_sum(WEIGHT._replace(batch=2), F32, F32) and not can_sum(WEIGHT, F32, BFLOAT16)
    batch = WEIGHT._replace(batch=2, a_step=4, b_step=4)
    blas = library.cublaslt()
    assert not blas.fills(batch, F32, F32) and not blas.fills(WEIGHT, F64, F64)
    a, b, c = (arrays.array_on("cuda", np.ones((2, 2, 2), np.float32)) for _ in range(3))
    with pytest.raises(DeviceError, match="cuBLASLt has no algorithm for a product 2x2x2x2 with sums"):
        sums, workspace = (arrays.array_on("cuda", np.ones(n, np.float32)) for n in (2, WORKSPACE // 4))
        library.multiply(batch._replace(rows=2, columns=2, depth=2), (c, a, b, sums, None, workspace))


def test_what_a_recording_prepares_changes_nothing(library):
    dy, x = (arrays.array_on("cuda", np.ones((4, n), np.float32)) for n in (5, 3))
    dw, db = (arrays.array_on("cuda", np.full(shape, 7, np.float32)) for shape in ((5, 3), (5,)))
    workspace = arrays.empty((WORKSPACE,), np.uint8, "cuda")
    product = Product(1, 5, 3, 4, 0, 0, True, False, sums=True)
    calls = library.prepare([(product, None, [dw, dy, x, db, None, workspace])])
    assert (arrays.to_numpy(dw) == 7).all() and (arrays.to_numpy(db) == 7).all()
    calls.run()
    assert (arrays.to_numpy(dw) == 4).all() and (arrays.to_numpy(db) == 4).all()
