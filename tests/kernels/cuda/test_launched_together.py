"""Launches of a recorded step that several layers share."""

import numpy as np
import pytest
from cuda_emulation import emulator
from small_models import nano

from minivit import Tensor, Trainer
from minivit.kernels.core import arrays
from minivit.kernels.core.recording import launch_late, record
from minivit.layers import LayerNorm
from minivit.runtime.plan import Plan

pytestmark = pytest.mark.skipif(bool(emulator.unavailable()), reason=emulator.unavailable())


def launched(plan, name):
    return [kernel.label for kernel, _, _ in plan.recorded].count(name)


def gradients(layers, x, used):
    """Gradients of all weights, of layers one after the other; with `used`, that of the first layer's weight is used while others wait."""
    y = x = Tensor(x)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.grad = None
    for layer in layers:
        y = layer(y)
    (y * y).mean().backward()
    extra = ()
    if used:
        with_gradient = layers[0].weight.grad * 2.0
        (layers[0](x) * with_gradient).sum().backward()
        extra = (with_gradient.data,)
    return tuple(p.grad.data for layer in layers for p in layer.parameters()) + extra


@pytest.mark.parametrize("depth, used, launches", [(1, False, 1), (5, False, 1), (17, False, 2), (3, True, 2)])
def test_layers_share_a_launch_and_the_bits_stay(on_cuda, depth, used, launches):
    rng = np.random.default_rng(0)
    layers = [LayerNorm(8) for _ in range(depth)]
    for layer in layers:
        layer.weight.data = arrays.array_on("cuda", rng.standard_normal(8).astype(np.float32))
        layer.bias.data = arrays.array_on("cuda", rng.standard_normal(8).astype(np.float32))
    x = arrays.array_on("cuda", rng.standard_normal((6, 8)).astype(np.float32))
    plan = Plan(lambda: gradients(layers, x, used), device="cuda")
    planned = [arrays.to_numpy(a) for a in plan.results]
    eager = [arrays.to_numpy(a) for a in gradients(layers, x, used)]
    for one, other in zip(planned, eager, strict=True):
        np.testing.assert_array_equal(one, other)
    assert launched(plan, "layernorm_parameters") == launches


def test_a_step_of_a_model_has_one_for_all_its_layers(on_cuda):
    model = nano("vit", seed=3, depth=3)
    trainer = Trainer(model, device="cuda")
    trainer.step(np.zeros((2, 1, 8, 8), np.float32), np.arange(2))
    assert launched(trainer.plans[-1], "layernorm_backward") == 7 and launched(trainer.plans[-1], "layernorm_parameters") == 1


@pytest.mark.parametrize("start, joined", [(0, [2]), (2, [2, 1]), (4, [3])])
def test_what_waits_is_launched_before_its_memory_is_used(start, joined):
    """On any device: a launch that is given bytes of an output ends the waiting, one beside it does not."""

    class Kernel:
        prepares, label = False, "kernel"

    seen = []

    def join(items):
        seen.append(len(items))

    outputs = np.zeros(6, np.float32)
    with record() as recording:
        for i in range(2):
            launch_late(join, outputs[2 * i : 2 * i + 2], np.ones(2), outputs=1)
        recording.add(Kernel(), 1, (outputs[4:] if start == 4 else outputs[start : start + 1], 3))
        if start:
            launch_late(join, outputs[4:], outputs=1)
    assert seen == joined
