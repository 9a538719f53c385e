"""bfloat16 in kernels: two bytes in memory, float32 in a register, with NumPy's rounding (ml_dtypes); both ways to round."""

from importlib import import_module

import numba
import numpy as np
import pytest

from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.core.recording import launch
from minivit.kernels.cpu import compile as compilation
from minivit.kernels.cpu.kernel import kernel

bfloat16 = import_module("minivit.kernels.cpu.bfloat16")  # the module; the package has a type of that name
EVERY = np.arange(65536, dtype=np.uint16)  # all bfloat16, as bits


@pytest.fixture(params=["integer", "native"], autouse=True)
def native(request, monkeypatch, tmp_path) -> bool:
    """Whether numbers are rounded by the CPU's own instruction, which takes what is too small for a normal number (1.2e-38) to be zero."""
    wanted = request.param == "native"
    if wanted and not bfloat16.NATIVE:
        pytest.skip("this CPU has no AVX512-BF16")
    monkeypatch.setattr(bfloat16, "NATIVE", wanted)
    monkeypatch.setattr(compilation, "kernel_cache", lambda: tmp_path)  # what is compiled so is nobody else's
    return wanted


def expected(numbers: np.ndarray, native: bool) -> np.ndarray:
    """float32 numbers as NumPy rounds them; as bits, where every NaN is one."""
    with np.errstate(over="ignore", invalid="ignore"):
        bits = numbers.astype(BFLOAT16).view(np.uint16)
    if native:
        bits = np.where(np.abs(numbers) < np.finfo(np.float32).tiny, bits & 0x8000, bits)
    return one_nan(bits)


def one_nan(bits: np.ndarray) -> np.ndarray:
    return np.where((bits & 0x7FFF) > 0x7F80, 0x7FC0, bits)


def run(function, out, *arrays) -> np.ndarray:
    """What `function(band, bands, out, *arrays)` writes into `out`."""
    out[...] = 0
    launch(kernel(function), 1, out, *arrays)
    return out


def convert(band, bands, y, x):
    for i in range(len(x)):
        y[i] = x[i]


def test_every_number_is_read_as_it_is():
    read = run(convert, np.empty(65536, np.float32), EVERY.view(BFLOAT16))
    np.testing.assert_array_equal(read.view(np.uint32), EVERY.astype(np.uint32) << 16)


def test_every_number_survives_reading_and_writing(native):
    copied = run(convert, np.empty(65536, BFLOAT16), EVERY.view(BFLOAT16)).view(np.uint16)
    np.testing.assert_array_equal(one_nan(copied), expected((EVERY.astype(np.uint32) << 16).view(np.float32), native))
    quiet = (EVERY & 0x7FFF) > 0x7FBF
    np.testing.assert_array_equal(copied[quiet], EVERY[quiet])  # NaN with all they say


def float32_numbers() -> np.ndarray:
    """Ties and their neighbours around every bfloat16, and numbers of any bits: with infinities, NaN, overflow and numbers below normal."""
    ties = (EVERY.astype(np.uint32) << 16)[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return np.concatenate([ties.ravel(), np.random.default_rng(0).integers(0, 2**32, 300_000, np.uint32)]).view(np.float32)


def test_numbers_are_rounded_to_nearest_even(native):
    numbers = float32_numbers()
    written = run(convert, np.empty(len(numbers), BFLOAT16), numbers).view(np.uint16)
    np.testing.assert_array_equal(one_nan(written), expected(numbers, native))


def test_a_number_is_rounded_without_being_written(native):
    @numba.njit
    def each(y, x):
        for i in range(len(x)):
            y[i] = bfloat16.rounded(x[i])

    numbers = float32_numbers()
    rounded = np.empty_like(numbers)
    each(rounded, numbers)
    bits = rounded.view(np.uint32)
    assert not (bits & 0xFFFF).any()
    np.testing.assert_array_equal(one_nan((bits >> 16).astype(np.uint16)), expected(numbers, native))


@pytest.mark.parametrize("dtype", ["int64", "float64", "uint8"])
def test_numbers_of_other_types_are_converted(dtype):
    numbers = np.random.default_rng(0).uniform(0, 255, 1000).astype(dtype)
    narrow = numbers.astype(np.float32).astype(BFLOAT16)
    np.testing.assert_array_equal(run(convert, np.empty(1000, BFLOAT16), numbers), narrow)
    np.testing.assert_array_equal(run(convert, np.empty(1000, np.float64), narrow), narrow.astype(np.float64))


def test_arithmetic_is_float32s():
    def total(band, bands, y, x):
        sum_ = x.dtype.type(0)
        for i in range(len(x)):
            sum_ += x[i]
        y[0] = sum_

    def difference(band, bands, y, a, b):
        for i in range(len(y)):
            y[i] = (a[i] + b[i]) - a[i]

    ones = np.ones(4096, BFLOAT16)  # where sums were rounded to bfloat16, they would stop at 256
    assert run(total, np.empty(1, BFLOAT16), ones)[0] == 4096
    assert run(difference, np.empty(4096, BFLOAT16), ones, (ones * BFLOAT16.type(2**-12)))[0] == 2**-12
