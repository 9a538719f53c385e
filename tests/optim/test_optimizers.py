"""Optimizers against their formulas, on the flat buffer."""

import re

import numpy as np
import pytest

from minivit import Module, Parameter, UserError, create_model
from minivit.models import FAMILIES
from minivit.optim import OPTIMIZERS, SCHEDULES, SGD, AdamW, FlatParameters


class Net(Module):
    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.weight = Parameter(rng.standard_normal((5, 7)))
        self.bias = Parameter(rng.standard_normal(5))
        self.cls_token = Parameter(rng.standard_normal((1, 1, 7)))
        self.scale = Parameter(rng.standard_normal((3, 3)), requires_grad=False)


def gradients(steps):
    rng = np.random.default_rng(1)
    return [{name: rng.standard_normal(p.shape) for name, p in Net().named_parameters()} for _ in range(steps)]


def run(optimizer, flat, net, steps):
    for gradient in gradients(steps):
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.grad_home[...] = gradient[name]
        optimizer.step()
    return net.state_dict()


def test_what_weight_decay_leaves_alone():
    model = create_model("vit_nano_patch2_8", class_token=True, layer_scale=0.1)
    decayed = set(map(id, model.decayed_parameters()))
    left = {name for name, p in model.named_parameters() if id(p) not in decayed}
    assert {"cls_token", "pos_embed", "head.bias", "fc_norm.weight", "blocks.0.ls1.gamma"} <= left
    assert not any(name.endswith(("fc1.weight", "qkv.weight", "patch_embed.proj.weight")) for name in left)


def test_flat_parameters_are_the_same_parameters():
    net = Net()
    before = net.state_dict()
    flat = FlatParameters(net)
    assert flat.size == 5 * 7 + 5 + 7
    for name, parameter in net.named_parameters():
        np.testing.assert_array_equal(parameter.data, before[name])
        if parameter.requires_grad:
            assert np.shares_memory(parameter.data, flat.data)
            assert np.shares_memory(parameter.grad_home, flat.gradient)
            assert parameter.data.ctypes.data % 64 == 0
    (segment,) = flat.segments
    decayed = flat.data[: segment.decayed]
    assert np.shares_memory(net.weight.data, decayed)
    assert not np.shares_memory(net.bias.data, decayed) and not np.shares_memory(net.cls_token.data, decayed)
    assert not np.shares_memory(net.scale.data, flat.data)


def test_parameters_that_get_no_gradient_have_a_zero_one():
    net = Net()
    flat = FlatParameters(net)
    flat.gradient[...] = np.nan
    flat.forget_gradients()
    (net.weight.T @ net.bias.reshape(5, 1)).sum().backward()
    flat.clear_unused_gradients()
    assert (net.cls_token.grad_home == 0).all()
    np.testing.assert_allclose(net.bias.grad_home, net.weight.data.sum(1))


def test_a_model_without_parameters_is_told():
    with pytest.raises(UserError, match="no parameters to train"):
        FlatParameters(Module())


@pytest.mark.parametrize("clip_norm", [None, 1.5])
def test_adamw_follows_its_formula(clip_norm):
    """Loshchilov and Hutter, 1711.05101, algorithm 2, with PyTorch's form of epsilon and of decoupled decay."""
    net, steps, lr, decay, (b1, b2), eps = Net(), 5, 0.02, 0.1, (0.8, 0.95), 1e-3
    flat = FlatParameters(net)
    optimizer = AdamW(flat, lr=lr, weight_decay=decay, betas=(b1, b2), eps=eps, clip_norm=clip_norm)
    values = {name: value for name, value in net.state_dict().items() if name != "scale"}
    m, v = ({name: np.zeros_like(value) for name, value in values.items()} for _ in range(2))
    for t, gradient in enumerate(gradients(steps), 1):
        norm = np.sqrt(sum((gradient[name] ** 2).sum() for name in values))
        factor = 1 if clip_norm is None else min(1, clip_norm / (norm + 1e-6))
        for name, value in values.items():
            g = gradient[name] * factor
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            value *= 1 - lr * decay * (name == "weight")
            value -= lr * m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
    state = run(optimizer, flat, net, steps)
    for name, value in values.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-11, atol=1e-13, err_msg=name)
    assert optimizer.gradient_norm == pytest.approx(norm, rel=1e-12)
    np.testing.assert_array_equal(state["scale"], Net().scale.data)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_follows_its_formula(nesterov):
    """Momentum as in PyTorch: the buffer is momentum·buffer + gradient; Nesterov steps along gradient + momentum·buffer."""
    net, steps, lr, decay, momentum = Net(), 5, 0.02, 0.1, 0.9
    flat = FlatParameters(net)
    optimizer = SGD(flat, lr=lr, weight_decay=decay, momentum=momentum, nesterov=nesterov)
    values = {name: value for name, value in net.state_dict().items() if name != "scale"}
    buffer = {name: np.zeros_like(value) for name, value in values.items()}
    for gradient in gradients(steps):
        for name, value in values.items():
            g = gradient[name] + decay * (name == "weight") * value
            buffer[name] = momentum * buffer[name] + g
            value -= lr * (g + momentum * buffer[name] if nesterov else buffer[name])
    state = run(optimizer, flat, net, steps)
    for name, value in values.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-11, atol=1e-13, err_msg=name)


def test_learning_rate_and_decay_may_change():
    states = []
    for change in (False, True):
        net = Net()
        flat = FlatParameters(net)
        optimizer = AdamW(flat, lr=0.5 if change else 0.02, weight_decay=0.9 if change else 0.1)
        optimizer.lr, optimizer.weight_decay = 0.02, 0.1
        assert (optimizer.lr, optimizer.weight_decay) == (0.02, 0.1)
        states.append(run(optimizer, flat, net, 3))
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_average_of_weights_warms_up(optimizer):
    net = Net()
    flat = FlatParameters(net, first=OPTIMIZERS[optimizer].first)
    optimizer = OPTIMIZERS[optimizer](flat, lr=0.1, ema=0.3)
    expected = net.weight.data.copy()
    for t in range(1, 6):
        flat.gradient[...] = t
        optimizer.step()
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * net.weight.data
    own = net.weight.data.copy()
    optimizer.swap_average()
    np.testing.assert_allclose(net.weight.data, expected, rtol=1e-12)
    optimizer.swap_average()
    np.testing.assert_array_equal(net.weight.data, own)


def test_cosine_schedule():
    """As the recipe of tests/golden/training_*: a rise that reaches lr at the last warmup step, then half a cosine."""
    cosine = SCHEDULES["cosine"]
    rates = [cosine(step, 40, 0.003, 8, 0.0) for step in range(40)]
    np.testing.assert_allclose(rates[:8], 0.003 * np.arange(1, 9) / 8, rtol=1e-12)
    np.testing.assert_allclose(rates[8:], 0.0015 * (1 + np.cos(np.pi * np.arange(32) / 32)), rtol=1e-12)
    assert cosine(10, 10, 1.0, 0, 0.1) == pytest.approx(0.1)
    assert cosine(0, 10, 1.0, 0, 0.1) == 1.0


def test_linear_schedule():
    linear = SCHEDULES["linear"]
    rates = [linear(step, 10, 0.8, 2, 0.4) for step in range(10)]
    np.testing.assert_allclose(rates, [0.4, 0.8, *np.linspace(0.8, 0.4, 9)[:8]], rtol=1e-12)


def test_warmup_stable_decay_schedule():
    wsd = SCHEDULES["wsd"]
    assert [wsd(step, 10, 0.4, 2, 0.0) for step in range(10)] == pytest.approx([0.2, *[0.4] * 6, 0.3, 0.2, 0.1])
    assert [wsd(step, 4, 0.4, 3, 0.0) for step in range(4)] == pytest.approx([0.4 / 3, 0.8 / 3, 0.4, 0.4])


def test_constant_schedule():
    constant = SCHEDULES["constant"]
    assert [constant(step, 10, 0.4, 2, 0.0) for step in (0, 1, 2, 9)] == [0.2, 0.4, 0.4, 0.4]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layers_learn_at_their_own_rates(name):
    """Each parameter as an optimizer with its scale of the learning rate updates it."""

    def trained(lr, layer_decay):
        model = create_model("vit_nano_patch2_8", depth=3, dim=8, heads=2, dtype="float64", seed=1)
        flat = FlatParameters(model, first=OPTIMIZERS[name].first, layer_decay=layer_decay)
        optimizer = OPTIMIZERS[name](flat, lr=lr, weight_decay=0.1, ema=0.9)
        rng = np.random.default_rng(2)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad_home[...] = rng.standard_normal(parameter.shape)
            optimizer.step()
        weights = model.state_dict()
        optimizer.swap_average()
        return weights, model.state_dict()

    scaled = trained(0.1, 0.5)
    for left, layer in enumerate(("norm.", "blocks.2.", "blocks.1.", "blocks.0.", "patch_embed.")):
        names = [each for each in scaled[0] if f".{layer}" in f".{each}" or (left == 0 and each.startswith(("head.", "fc_norm.")))]
        assert names or left == 0
        for got, expected in zip(scaled, trained(0.1 * 0.5**left, 1.0)):
            for each in names:
                np.testing.assert_allclose(got[each], expected[each], rtol=1e-12, atol=1e-15, err_msg=each)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_models(family):
    options = {"stages": 3} if family == "crossvit" else {"depth": 3}
    model = create_model(family, init="zeros", **options)
    layers, count = model.layer_numbers(), 4
    for name, parameter in model.named_parameters():
        block = re.search(r"\bblocks\.(\d+)\.", name)
        expected = count - 1 - int(block[1]) if block else None
        first = any(part in name for part in ("patch_embed", "stem", "cls_token", "pos_embed", "tokens_to_token"))
        expected = count if first and block is None else 0 if block is None else expected
        assert layers[id(parameter)] == (count - expected, expected), name


def test_a_layer_decay_that_cannot_be():
    model = create_model("vit_nano_patch2_8")
    for decay in (0, 1.5, -1, np.nan):
        with pytest.raises(UserError, match="layer_decay must be above 0 and at most 1"):
            FlatParameters(model, layer_decay=decay)
    with pytest.raises(UserError, match="for models with blocks"):
        FlatParameters(Net(), layer_decay=0.5)
