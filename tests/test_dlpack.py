"""Tensors and the arrays of other libraries share memory, both ways."""

import gc

import ml_dtypes
import numpy as np
import pytest

import minivit
import minivit.functional as F
from minivit import Tensor, from_dlpack
from minivit.errors import DeviceError
from minivit.kernels.core import devices, dlpack
from minivit.kernels.core.arrays import empty
from minivit.runtime.plan import Plan

DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16)]
VALUES = np.arange(6.0).reshape(2, 3)


def address(array):
    return array.__array_interface__["data"][0]


class Legacy:
    """A library from before the options of `__dlpack__`."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, *, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


# ----------------------------------------------------------------------------------------------------------------------- NumPy
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_numpy_shares_the_memory(dtype):
    tensor = Tensor(VALUES.astype(dtype))
    for shared in (np.asarray(tensor), np.from_dlpack(tensor), np.from_dlpack(Legacy(tensor)), tensor.numpy()):
        assert shared.dtype == dtype and np.shares_memory(shared, tensor.data)
    array = VALUES.astype(dtype)
    for source in (array, Legacy(array)):
        shared = from_dlpack(source, copy=False)
        assert isinstance(shared, Tensor) and shared.dtype == dtype and np.shares_memory(shared.data, array)
    assert not np.shares_memory(from_dlpack(array, copy=True).data, array)


@pytest.mark.parametrize("wrap", [lambda x: x, Legacy], ids=["versioned", "legacy"])
def test_bfloat16_keeps_its_type(wrap):
    tensor = Tensor(VALUES.astype(ml_dtypes.bfloat16))
    again = from_dlpack(wrap(tensor), copy=False)
    assert again.dtype == ml_dtypes.bfloat16 and np.shares_memory(again.data, tensor.data)
    np.testing.assert_array_equal(again.numpy(), VALUES)
    np.testing.assert_array_equal(np.asarray(tensor, np.float32), VALUES)
    assert dlpack.described(tensor.__dlpack__()).dtype.code == dlpack.BFLOAT


def test_the_memory_lives_as_long_as_a_reader():
    views = np.from_dlpack(Tensor(np.full(1000, 7.0))), from_dlpack(np.full(1000, 7.0)).data
    gc.collect()
    np.full(1000, -1.0)
    assert all((view == 7).all() for view in views)


def test_read_only_arrays():
    array = VALUES.copy()
    array.flags.writeable = False
    tensor = from_dlpack(array, copy=False)
    assert np.shares_memory(tensor.data, array) and not np.from_dlpack(tensor).flags.writeable
    np.testing.assert_array_equal(F.exp(tensor).numpy(), np.exp(VALUES))
    assert from_dlpack(array, copy=True).data.flags.writeable


def test_a_read_only_array_for_a_library_that_knows_none():
    tensor = Tensor(np.broadcast_to(np.float32(1), (2, 3)))
    tensor.data.flags.writeable = False
    with pytest.raises(BufferError, match="knows no read-only arrays: give it a copy"):
        np.from_dlpack(Legacy(tensor))


def test_what_is_converted_is_copied():
    for array in (VALUES.T, np.arange(3), np.ones(2, np.float16), np.ones(2, bool)):
        np.testing.assert_array_equal(from_dlpack(array).numpy(), array)
        with pytest.raises(BufferError, match="cannot be shared: leave copy=False out"):
            from_dlpack(array, copy=False)
    assert from_dlpack(np.arange(3)).dtype == np.float32
    assert from_dlpack(np.float64(3)[None][0:0]).shape == (0,)


def test_a_gradient_is_not_lost():
    parameter = Tensor(VALUES, requires_grad=True)
    for lose in (np.from_dlpack, from_dlpack, lambda x: x.__dlpack__()):
        with pytest.raises(BufferError, match=r"would lose the gradient: take x\.detach\(\)"):
            lose(parameter)
    with pytest.raises(TypeError, match=r"would lose the gradient: take x\.detach\(\)\.numpy\(\)"):
        np.asarray(parameter)
    assert np.shares_memory(np.from_dlpack(parameter.detach()), parameter.data)


def test_what_has_no_dlpack_is_named():
    with pytest.raises(TypeError, match=r"takes an array that has __dlpack__, not list: Tensor\(\) takes others"):
        from_dlpack([1.0])
    with pytest.raises(TypeError, match="a Tensor holds real numbers, not complex128"):
        from_dlpack(np.ones(2, complex))


def test_a_device_that_is_not_known():
    class Elsewhere(Legacy):
        def __dlpack_device__(self):
            return 7, 0

    with pytest.raises(BufferError, match="number 7 of DLPack: move it to the CPU"):
        from_dlpack(Elsewhere(VALUES))


def test_values_that_a_recording_does_not_know_yet():
    x = Tensor(VALUES.astype(np.float32))
    with pytest.raises(minivit.UserError, match="not known while a step is recorded"):
        Plan(lambda: np.from_dlpack(F.exp(x)))


# ------------------------------------------------------------------------------------------------------------------------- GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_of_a_gpu(cuda_runtime, dtype):
    with devices.using(cuda_runtime):
        tensor = Tensor(VALUES.astype(dtype)).to("cuda")
        assert tensor.__dlpack_device__() == (dlpack.CUDA, 0)
        again = from_dlpack(tensor, copy=False)
        assert again.device == "cuda" and again.dtype == dtype and again.shape == (2, 3)
        assert devices.address_of(again.data) == devices.address_of(tensor.data)
        np.testing.assert_array_equal(again.numpy(), VALUES)
        copied = from_dlpack(tensor, copy=True)
        assert devices.address_of(copied.data) != devices.address_of(tensor.data) and copied.device == "cuda"
        with pytest.raises((BufferError, RuntimeError, TypeError)):
            np.from_dlpack(tensor)
        np.testing.assert_array_equal(np.asarray(tensor), VALUES)
        with pytest.raises(BufferError, match="would lose the gradient"):
            from_dlpack(Tensor(tensor, requires_grad=True))


# ------------------------------------------------------------------------------------------------------- PyTorch and JAX, if installed
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
def test_pytorch(name):
    torch = pytest.importorskip("torch")
    theirs = torch.arange(6).reshape(2, 3).to(getattr(torch, name))
    ours = from_dlpack(theirs, copy=False)
    assert ours.dtype.name == name and address(ours.data.view(np.uint8)) == theirs.data_ptr()
    theirs[0, 0] = 9
    assert float(ours[0, 0]) == 9
    back = torch.from_dlpack(ours)
    assert back.dtype == theirs.dtype and back.data_ptr() == theirs.data_ptr() and torch.equal(back, theirs)
    with pytest.raises(BufferError, match="detach"):
        from_dlpack(theirs.requires_grad_())
    with pytest.raises(BufferError, match="detach"):
        torch.from_dlpack(Tensor(VALUES, requires_grad=True))


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_jax(name):
    numpy_of_jax = pytest.importorskip("jax.numpy")
    theirs = numpy_of_jax.arange(6).reshape(2, 3).astype(name)
    ours = from_dlpack(theirs, copy=False)
    assert ours.dtype.name == name and address(ours.data.view(np.uint8)) == theirs.unsafe_buffer_pointer()
    with pytest.raises(BufferError, match="knows no read-only arrays: give it a copy"):  # as JAX's own arrays are, of which it does not ask
        numpy_of_jax.from_dlpack(ours)
    tensor = Tensor(empty((2, 3), ours.dtype))
    tensor.data[...] = VALUES
    back = numpy_of_jax.from_dlpack(tensor)
    assert back.dtype == theirs.dtype and (back == theirs).all() and back.unsafe_buffer_pointer() == address(tensor.data.view(np.uint8))


def test_cupy():
    cupy = pytest.importorskip("cupy")
    try:
        devices.runtime()
    except DeviceError as error:
        pytest.skip(str(error))
    theirs = cupy.arange(6, dtype=cupy.float32).reshape(2, 3)
    ours = from_dlpack(theirs, copy=False)
    assert ours.data.data.ptr == theirs.data.ptr and cupy.from_dlpack(ours).data.ptr == theirs.data.ptr
