"""Batch normalisation: the statistics of a batch, and those that follow the batches."""

from copy import deepcopy

import numpy as np
import pytest

from minivit import Module, Tensor, Trainer, UserError
from minivit.grad_mode import trace
from minivit.nn.layers import BatchNorm, Linear
from minivit.nn.module import Parameter

EPS = 1e-5


class Net(Module):
    """(B, 1, 8, 8) -> (B, 10)."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.fc1, self.norm, self.fc2 = Linear(16, 12), BatchNorm(12), Linear(12, 10)
        for parameter in (self.fc1.weight, self.fc2.weight):
            parameter.data[...] = 0.3 * rng.standard_normal(parameter.shape)

    def forward(self, images):
        return self.fc2(self.norm(self.fc1(images.reshape(len(images), 4, 16)), "hardswish").mean(1))


def batches(count, size=6):
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((size, 1, 8, 8)).astype(np.float32), rng.integers(0, 10, size)) for _ in range(count)]


def filled(dim, dtype="float64"):
    layer, rng = BatchNorm(dim, dtype=dtype), np.random.default_rng(2)
    layer.weight.data[...], layer.bias.data[...] = rng.standard_normal((2, dim))
    layer.running_mean.data[...], layer.running_var.data[...] = rng.standard_normal(dim), rng.uniform(0.5, 2, dim)
    return layer


def test_training_normalises_by_the_batch_and_evaluation_by_what_followed():
    layer, x = filled(5), 3 + np.random.default_rng(0).standard_normal((4, 2, 3, 5))
    before = layer.state_dict()
    rows = x.reshape(-1, 5)
    y = layer.train()(Tensor(x)).numpy()
    expected = (x - rows.mean(0)) / np.sqrt(rows.var(0) + EPS) * before["weight"] + before["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    after = layer.state_dict()
    np.testing.assert_allclose(after["running_mean"], 0.9 * before["running_mean"] + 0.1 * rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(after["running_var"], 0.9 * before["running_var"] + 0.1 * rows.var(0, ddof=1), rtol=1e-12)
    y = layer.eval()(Tensor(x[:1])).numpy()
    expected = (x[:1] - after["running_mean"]) / np.sqrt(after["running_var"] + EPS) * before["weight"] + before["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert all(np.array_equal(after[name], value) for name, value in layer.state_dict().items())


def test_statistics_of_values_far_from_zero():
    x = (1000 + np.random.default_rng(0).standard_normal((64, 64, 40))).astype(np.float32)
    layer = BatchNorm(40).train()
    layer(Tensor(x))
    rows = x.reshape(-1, 40).astype(np.float64)
    np.testing.assert_allclose(10 * (layer.running_var.numpy() - 0.9), rows.var(0, ddof=1), rtol=1e-4)


@pytest.mark.parametrize(
    "activation, function",
    [("relu", lambda z: z.clip(0)), ("relu6", lambda z: z.clip(0, 6)), ("hardswish", lambda z: z * (z + 3).clip(0, 6) / 6)],
)
def test_activations(activation, function):
    layer, x = filled(3).train(), Tensor(4 * np.random.default_rng(0).standard_normal((50, 3)))
    layer.weight.data *= 5
    np.testing.assert_allclose(layer(x, activation).numpy(), function(layer(x).numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_recorded_step_moves_the_statistics_as_an_eager_one(optimizer):
    states = []
    for plan in (True, False):
        trainer = Trainer(Net(), optimizer=optimizer, weight_decay=0.1, clip_norm=1.0, ema=0.5, plan=plan)
        losses = [trainer.step(*batch) for batch in batches(4)]
        own = trainer.model.state_dict()
        with trainer.averaged():
            states.append((losses, own, trainer.model.state_dict()))
    (losses, own, averaged), (eager_losses, eager, eager_averaged) = states
    assert losses == eager_losses
    for name in own:
        np.testing.assert_array_equal(own[name], eager[name])
        np.testing.assert_array_equal(averaged[name], eager_averaged[name])
    assert not np.array_equal(own["norm.running_mean"], averaged["norm.running_mean"])


def test_the_average_of_weights_has_the_average_of_the_statistics():
    trainer = Trainer(Net(), ema=0.3)
    name = "norm.running_var"
    average = trainer.model.state_dict()[name]
    for step, batch in enumerate(batches(6), 1):
        trainer.step(*batch)
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * trainer.model.state_dict()[name]
    own = trainer.model.state_dict()[name]
    with trainer.averaged():
        np.testing.assert_allclose(trainer.model.state_dict()[name], average, rtol=1e-5)
    np.testing.assert_array_equal(trainer.model.state_dict()[name], own)


def test_an_optimizer_leaves_the_statistics_alone():
    trainer = Trainer(Net(), lr=1.0, weight_decay=0.5)
    layer, images = trainer.model.norm, batches(1)[0][0]
    before = layer.running_mean.numpy().copy()
    rows = trainer.model.fc1(Tensor(images).reshape(6, 4, 16)).numpy().reshape(-1, 12)
    trainer.step(images, np.zeros(6, np.int64))
    np.testing.assert_allclose(layer.running_mean.numpy(), 0.9 * before + 0.1 * rows.mean(0), rtol=1e-4, atol=1e-6)
    assert trainer.flat.size == 16 * 12 + 12 + 2 * 12 + 12 * 10 + 10


def test_a_copied_trainer_goes_on_with_the_statistics():
    trainer = Trainer(Net(), ema=0.5)
    first, second = batches(2)
    trainer.step(*first)
    again = deepcopy(trainer)
    for each in (trainer, again):
        each.step(*second)
        each.swap_average()
    for name, value in trainer.model.state_dict().items():
        np.testing.assert_array_equal(again.model.state_dict()[name], value)


def test_what_is_only_traced_moves_no_statistics():
    class Silent:
        def op(self, *arguments):
            pass

        enter = op

        def leave(self):
            pass

    net = Net().train()
    before = net.state_dict()
    with trace(Silent()):
        net(Tensor(batches(1)[0][0]))
    assert all(np.array_equal(value, before[name]) for name, value in net.state_dict().items())


def test_statistics_that_come_from_elsewhere():
    layer = filled(3)
    before, mean, variance = layer.state_dict(), np.arange(3.0), np.full(3, 2.0)
    layer.follow(Tensor(mean), Tensor(variance), 5)
    np.testing.assert_allclose(layer.running_mean.numpy(), 0.9 * before["running_mean"] + 0.1 * mean)
    np.testing.assert_allclose(layer.running_var.numpy(), 0.9 * before["running_var"] + 0.1 * 2.5)
    with pytest.raises(ValueError, match="mean has shape"):
        layer.follow(Tensor(mean[:2]), Tensor(variance), 5)


def test_foreign_state_dicts():
    net = Net()
    state = net.state_dict() | {"norm.num_batches_tracked": np.array(7), "norm.running_mean": np.arange(12.0)}
    net.load_state_dict(state)
    np.testing.assert_array_equal(net.norm.running_mean.numpy(), np.arange(12.0))
    assert isinstance(net.norm.running_mean, Parameter) and not net.norm.running_mean.requires_grad
    BatchNorm(2).load_state_dict(BatchNorm(2).state_dict() | {"num_batches_tracked": np.array(0)})
    with pytest.raises(UserError, match=r"unexpected: fc1\.num_batches_tracked"):
        net.load_state_dict(state | {"fc1.num_batches_tracked": np.array(7)})


@pytest.mark.parametrize("plan", [True, False])
def test_a_batch_of_one_image(plan):
    trainer = Trainer(Net(), plan=plan)
    before = trainer.model.state_dict()
    with pytest.raises(UserError, match=r"two images or more at once, got 1: choose a larger batch, or call model.eval\(\)"):
        trainer.step(*batches(1, size=1)[0])
    assert all(np.array_equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    trainer.step(*batches(1)[0])
    assert Net()(Tensor(batches(1, size=1)[0][0])).shape == (1, 10)


def test_a_batch_is_not_computed_in_parts():
    with pytest.raises(UserError, match="accumulate=2: the model normalises over the whole batch"):
        Trainer(Net(), accumulate=2)
    assert Trainer(Net(), accumulate=1).parts(64) == Trainer(Net()).parts(64) == 1
