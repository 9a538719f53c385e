"""A batch computed in parts: the same bits as sample by sample, on any number of threads, with little left idle."""

import numpy as np
import pytest

from minivit import create_model
from minivit import functional as F
from minivit.inference.predictor import Predictor
from minivit.kernels.cpu.run import most_threads, threads_set
from minivit.models import FAMILIES
from minivit.runtime.parts import ELEMENTS, MOST, Parts, part_size
from minivit.runtime.plan import Plan
from minivit.tensor import Tensor

RNG = np.random.default_rng(0)
THREADS = sorted({1, most_threads()})


@pytest.mark.parametrize("number", [1, 2, 3, 8, 16])
def test_hardly_a_thread_is_idle(monkeypatch, number):
    monkeypatch.setattr("minivit.runtime.parts.threads", lambda: number)
    for samples in range(1, 300):
        size = part_size(samples, 3072)
        assert 0 <= size <= min(MOST, samples)
        if size:
            rounds = -(-samples // (size * number))
            assert samples >= 0.9 * rounds * size * number
    assert part_size(1, 64) == 0  # nothing to share
    assert part_size(64 * number, 3072) == MOST
    assert part_size(2 * number, ELEMENTS) == part_size(2 * number, 10 * ELEMENTS) == 1


def products(weight, x, state):
    """Two results, one of them from a second array of the batch."""
    y = F.linear(Tensor(x), Tensor(weight), activation="gelu")
    return y.data, (y + Tensor(state)).data


@pytest.mark.parametrize("number", THREADS)
@pytest.mark.parametrize("samples, size", [(12, 1), (12, 3), (12, 6), (7, 7)])
def test_parts_are_the_whole(number, samples, size):
    x, state = (RNG.standard_normal((samples, 5, 16)).astype(np.float32) for _ in range(2))
    weight = RNG.standard_normal((16, 16)).astype(np.float32)
    with threads_set(number):
        parts = Parts(lambda a, b, absent: products(weight, a, b), (x, state, None), size, [weight])
        whole = Plan(lambda: products(weight, x, state), [weight])
    for _ in range(3):
        x += 1
        weight *= -1.25
        for plan in (parts, whole):
            plan.prepare()
            plan.replay()
        for one, other in zip(parts.results, whole.results, strict=True):
            np.testing.assert_array_equal(one, other)
    assert parts.threads == number and parts.launches == samples // size * parts.plan.launches == len(parts.labels)
    before = [a.copy() for a in parts.results]
    for a in parts.results:
        a[...] = 0
    seconds = parts.timed_replay()
    assert len(seconds) == parts.launches and min(seconds) > 0
    for a, b in zip(parts.results, before):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_predicts_the_same_in_parts_and_alone(family):
    name = next(name for name in FAMILIES[family].presets if "nano" in name and name.endswith("8"))
    model = create_model(name)
    for parameter in model.parameters():
        parameter.data += (0.02 * RNG.standard_normal(parameter.shape)).astype(np.float32)
    images = RNG.standard_normal((16, *model.config.image_shape)).astype(np.float32)
    together, alone = Predictor(model), Predictor(model, batch_size=1)
    np.testing.assert_array_equal(together.logits(images), alone.logits(images))
    assert all(isinstance(plan, Parts) for plan in together.plans) and not any(isinstance(plan, Parts) for plan in alone.plans)


def test_parts_take_less_memory():
    model, images = create_model("vit_nano_patch2_8"), np.zeros((64, 1, 8, 8), np.float32)
    predictor = Predictor(model, threads=1)
    predictor(images)
    (parts,) = predictor.plans
    whole = Plan(lambda: model.eval()(Tensor(images)).data, [p.data for p in model.parameters()])
    assert isinstance(parts, Parts) and parts.arena_bytes < 0.5 * whole.arena_bytes
