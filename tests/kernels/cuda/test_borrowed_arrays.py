"""Arrays that users have on a GPU: strides, addresses, streams."""

from types import SimpleNamespace

import numpy as np
import pytest
from cuda_emulation import emulator
from small_models import MODELS, batches, nano

from minivit import Predictor, Tensor, Trainer, UserError
from minivit.kernels.cuda.cupy_runtime import CupyRuntime
from minivit.kernels.cuda.strided import vector_width


class Foreign:
    """A user's array on the GPU: another library's, of which minivit knows CUDA's array interface alone. On a GPU it is CuPy's."""

    def __init__(self, view):
        self.view = view

    shape, dtype, ndim = (property(lambda self, name=name: getattr(self.view, name)) for name in ("shape", "dtype", "ndim"))

    @property
    def __cuda_array_interface__(self):
        data = self.view.__array_interface__["data"]
        return {"shape": self.shape, "typestr": self.dtype.str, "data": data, "strides": self.view.strides, "version": 3}

    def __len__(self):
        return len(self.view)

    def __getitem__(self, key):
        return Foreign(self.view[key])


def on_gpu(runtime, values, view=lambda array: array):
    """A view of values, whose memory is on the GPU."""
    if isinstance(runtime, emulator.Emulator):
        return Foreign(view(values.copy()))
    import cupy

    return view(cupy.asarray(values))


VIEWS = {
    "channels last": (lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)), lambda a: a.transpose(0, 3, 1, 2)),
    "mirrored": (lambda a: a[..., ::-1].copy(), lambda a: a[..., ::-1]),
    "every other": (lambda a: a.repeat(2, axis=0), lambda a: a[::2]),
    "odd start": (lambda a: np.append(np.float32(0), a), lambda a: a[1:].reshape(5, 1, 8, 8)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_arrays_of_the_user_may_have_any_strides(on_cuda, view):
    images, labels = next(batches(1, 5))
    stored, viewed = VIEWS[view]
    there = on_gpu(on_cuda, stored(images), viewed)
    labels_there = on_gpu(on_cuda, np.stack([labels, labels + 1]).astype(np.int32), lambda a: a[0])
    for place in ("cuda", "cpu"):
        given = (images, labels), (there, labels_there), (Tensor(there), labels_there)
        losses = {Trainer(nano("vit", seed=3, **MODELS["vit"]), device=place).step(*batch) for batch in given}
        assert len(losses) == 1
        predictor = Predictor(nano("vit", seed=3, **MODELS["vit"]), device=place, batch_size=2)
        np.testing.assert_array_equal(predictor(images), predictor(there))
    mirroring = Predictor(nano("vit", seed=3, **MODELS["vit"]), device="cuda", tta=True)
    np.testing.assert_array_equal(mirroring(images), mirroring(there))


def test_what_kernels_cannot_read_is_refused_in_one_line(on_cuda):
    images, labels = next(batches(1, 4))
    trainer = Trainer(nano("vit", seed=3, **MODELS["vit"]), device="cuda")
    before = trainer.model.state_dict()
    with pytest.raises(UserError, match="has the type float16: convert it to one of float32, float64, bfloat16,"):
        trainer.step(on_gpu(on_cuda, images.astype(np.float16)), labels)
    with pytest.raises(UserError, match="labels must be integers, or rows of probabilities, got float32"):
        trainer.step(on_gpu(on_cuda, images), on_gpu(on_cuda, labels.astype(np.float32)))
    for name, value in trainer.model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_vectors_are_as_wide_as_addresses_allow(on_cuda):
    """The memory of a user's array may begin anywhere: its offset in the allocation says nothing."""
    start = on_gpu(on_cuda, np.zeros(64, np.float32), lambda a: a[1:49])
    with on_cuda.borrowed(start) as (array, _):
        assert on_cuda.address(array) % 16 in (4, 12) and vector_width(48, array) == 1


class Order:
    """A CuPy of which only the order of work on streams is kept: who waits for whom, as ("what", stream or event)."""

    class Stream:
        def __init__(self, order=None, **options):
            self.order = order

        def wait_event(self, event):
            self.order.done.append(("waits", self, event.stream))

    def __init__(self):
        self.done = done = []

        class Event:
            def __init__(self, **options):
                pass

            def record(self, stream):
                self.stream = stream
                done.append(("records", stream))

        class Array:
            strides, device = (4,), SimpleNamespace(id=0)

        self.ndarray, self.owner = Array, Order.Stream(self)
        self.cuda = SimpleNamespace(Event=Event, get_current_stream=lambda: self.owner)


def test_the_users_stream_and_ours_wait_for_each_other():
    order = Order()
    runtime = CupyRuntime.__new__(CupyRuntime)
    runtime._cupy, runtime._device, runtime.stream = order, 0, Order.Stream(order)
    with runtime.borrowed(order.ndarray()):
        order.done.append("copy")
    ours, theirs = runtime.stream, order.owner
    assert order.done == [("records", theirs), ("waits", ours, theirs), "copy", ("records", ours), ("waits", theirs, ours)]
    elsewhere = order.ndarray()
    elsewhere.device = SimpleNamespace(id=1)
    with pytest.raises(UserError, match="lies on GPU 1, minivit computes on GPU 0: move it there"), runtime.borrowed(elsewhere):
        pass
