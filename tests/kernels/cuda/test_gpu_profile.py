"""Launches are timed on the GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
from small_models import MODELS, nano

import minivit
from minivit import Trainer
from minivit.kernels.core import arrays
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.cuda.cupy_runtime import Graph
from minivit.training import profiling


class Clocks:
    """A CuPy in which time is counted: a launch of a kernel or a graph takes the host 10 µs, and the GPU as long as it says."""

    HOST = 10e-6

    class Event:
        def __init__(self, clocks):
            self.clocks = clocks

        def record(self, stream):
            self.at = max(self.clocks.host, self.clocks.gpu)

        done = property(lambda self: self.clocks.host >= self.at)

    def __init__(self):
        self.host = self.gpu = 0.0
        self.captured = None
        self.cuda = SimpleNamespace(
            Event=lambda: Clocks.Event(self), get_elapsed_time=lambda a, b: 1000 * (b.at - a.at), runtime=SimpleNamespace()
        )
        self.runs = 0

    def busy(self, seconds):
        if self.captured is not None:
            self.captured.append(seconds)
            return
        self.host += self.HOST
        self.gpu = max(self.host, self.gpu) + seconds

    # the stream
    __enter__ = __exit__ = lambda self, *exception: None

    def begin_capture(self):
        self.captured = []

    def end_capture(self):
        seconds, self.captured = sum(self.captured), None
        return SimpleNamespace(launch=lambda stream: self.busy(seconds))

    def synchronize(self):
        self.host = self.gpu = max(self.host, self.gpu)


@pytest.mark.parametrize("number", [3, 100, 600])
def test_each_launch_is_timed_on_the_gpu_and_not_on_the_host(number):
    clocks = Clocks()
    durations = [1e-6 * (1 + i % 4) for i in range(number)]  # all shorter than the host's part
    calls = [(SimpleNamespace(run=lambda grid, arguments, each=each: clocks.busy(each)), None, ()) for each in durations]
    graph = Graph(SimpleNamespace(_cupy=clocks, stream=clocks), calls)
    np.testing.assert_allclose(graph.timed_run(), durations, rtol=1e-6)
    assert Graph(SimpleNamespace(_cupy=clocks, stream=clocks), []).timed_run() == []


def test_a_profile_has_every_launch_with_its_bytes_and_operations(on_cuda):
    model = nano("vit", seed=3, **MODELS["vit"])
    profile = minivit.profile(model, batch=3, device="cuda", precision="bfloat16", rates=(1e12, 1e11))
    trainer = Trainer(nano("vit", seed=3, **MODELS["vit"]), device="cuda", precision="bfloat16")
    trainer.step(np.zeros((3, 1, 8, 8), np.float32), np.arange(3))
    assert len(profile.launches) == trainer.plans[0].launches == profile.total.launches and on_cuda.name in profile.title
    products = [launch for launch in profile.launches if launch.operations]
    assert {launch.op for launch in products} >= {"linear"}
    head = next(launch for launch in products if launch.phase == "forward" and "x10x" in launch.kernel)
    C = model.config.dim
    assert head.operations == 2 * 3 * C * 10 and head.bytes >= 2 * (3 * C + C * 10 + 3 * 10)
    for launch in profile.launches:
        assert launch.bytes > 0 and launch.floor == pytest.approx(1e3 * max(launch.bytes / 1e11, launch.operations / 1e12))
    lines = profile.by_launch().splitlines()
    assert len(lines) == 1 + len(profile.launches) and lines[0].split()[-2:] == ["of", "floor"] and lines[1].endswith("%")
    assert minivit.profile(model, batch=3, device="cuda", train=False, rates=(1e12, 1e11)).launches


def test_rates_of_a_gpu_are_measured_on_random_numbers(on_cuda):
    assert profiling.product_rate(BFLOAT16, tiny=True, device="cuda") > 0 and profiling.memory_rate(tiny=True, device="cuda") > 0
    numbers = arrays.to_numpy(profiling._random(3 * profiling.BLOCK // 2, np.dtype(np.float32), "cuda", 0))
    assert numbers.shape == (3 * profiling.BLOCK // 2,) and abs(numbers.std() - 1) < 0.01 and np.unique(numbers).size > 1000
