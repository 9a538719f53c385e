"""Whole models in training: gradients against finite differences, randomness, and a recorded plan against eager."""

import tracemalloc

import numpy as np
import pytest

import minivit
from minivit import Tensor
from minivit import functional as F
from minivit.kernels.core import arrays
from minivit.runtime.plan import Plan
from minivit.runtime.precision import precision_for
from minivit.testing.checks import check_model

RATES = dict(drop_rate=0.2, proj_drop_rate=0.1, drop_path_rate=0.4)
CASCADE = dict(patches=((4, 4, 0), (4, 2, 0), (3, 2, 1)))  # 2, 3 and 4 a side of 8 pixels
CROSS = dict(branch_sizes=(8, 6), patch_sizes=(2, 3), dims=(6, 8), depths=(1, 2), stages=2, heads=(3, 2))
T2T = dict(heads=2, token_dim=4, unfolds=((3, 1, 1), (3, 2, 1), (3, 1, 1)))  # 8, 4 and 4 a side
VARIANTS = {
    "vit": ("vit", dict(heads=2)),
    "vit_mean": ("vit", dict(heads=2, pool="mean", class_token=False, qkv_bias=False)),
    "vit_attention_pool": ("vit", dict(heads=2, pool="attention")),
    "vit_dropping": ("vit", dict(heads=4, pool="mean", layer_scale=0.5, pos_drop_rate=0.1, attn_drop_rate=0.2, **RATES)),
    "vit_drop_path": ("vit", dict(heads=2, activation="gelu_tanh", drop_path_rate=0.5)),
    "vit_distilled": ("vit", dict(heads=2, distillation="head")),
    "mixer": ("mixer", dict()),
    "mixer_dropping": ("mixer", dict(activation="gelu_tanh", **RATES)),
    "ff_only": ("ff_only", dict(position_grid=3, mlp_ratio=2.0)),
    "dvt": ("dvt", dict(heads=2, **CASCADE)),
    "dvt_mean": ("dvt", dict(heads=(1, 2, 4), dim=(4, 8, 12), depth=(1, 2, 3), options=dict(pool="mean", class_token=False), **CASCADE)),
    "dvt_attention_pool": ("dvt", dict(heads=2, options=dict(pool="attention", class_token=False), **CASCADE)),
    "dvt_features": ("dvt", dict(heads=2, relationship_reuse=False, **CASCADE)),
    "dvt_relationships": ("dvt", dict(heads=2, feature_reuse=False, **CASCADE)),
    "dvt_dropping": (
        "dvt",
        dict(heads=2, drop_path_rate=0.4, options=dict(attn_drop_rate=0.2, proj_drop_rate=0.1, drop_rate=0.2), **CASCADE),
    ),
    "dvt_mixer": ("dvt", dict(backbone="mixer", relationship_reuse=False, drop_path_rate=0.3, **CASCADE)),
    "dvt_ff_only": ("dvt", dict(backbone="ff_only", relationship_reuse=False, **CASCADE)),
    "deepvit": ("deepvit", dict(heads=3, mlp_ratio=2.0, reattention_blocks=(1, 2), reattention_scale=0.5, residual_scale=0.5)),
    "deepvit_dropping": ("deepvit", dict(heads=2, attn_drop_rate=0.2, pos_drop_rate=0.1, **RATES)),
    "crossvit": ("crossvit", CROSS),
    "crossvit_dropping": ("crossvit", dict(pos_drop_rate=0.1, attn_drop_rate=0.2, **RATES, **CROSS)),
    "t2t": ("t2t", T2T),
    "t2t_transformer": ("t2t", dict(T2T, tokens="transformer", qkv_bias=True)),
    "t2t_dropping": ("t2t", dict(T2T, kernel_features=3, token_drop_rate=0.3, pos_drop_rate=0.1, attn_drop_rate=0.2, **RATES)),
    "dvt_t2t": ("dvt", dict(backbone="t2t", heads=2, options=dict(token_dim=4, unfolds=((3, 1, 1), (3, 1, 1))), **CASCADE)),
    "localvit": ("localvit", dict(heads=2, se_reduction=8)),
    "localvit_eca": ("localvit", dict(heads=2, activation="relu6", channel_attention="eca", depthwise="first", mlp_ratio=2.0)),
    "localvit_attention_pool": ("localvit", dict(heads=2, channel_attention=None, pool="attention")),
    "localvit_dropping": ("localvit", dict(heads=2, se_reduction=8, pos_drop_rate=0.1, attn_drop_rate=0.2, **RATES)),
    "dvt_localvit": ("dvt", dict(backbone="localvit", heads=2, options=dict(se_reduction=8), **CASCADE)),
    "ff_only_dropping": ("ff_only", dict(activation="gelu_tanh", pos_drop_rate=0.1, **RATES)),
}
EVERY = pytest.mark.parametrize("variant", VARIANTS)
DROPPING = pytest.mark.parametrize(
    "variant",
    [
        "vit_dropping",
        "vit_drop_path",
        "mixer_dropping",
        "ff_only_dropping",
        "dvt_dropping",
        "dvt_mixer",
        "crossvit_dropping",
        "deepvit_dropping",
        "t2t_dropping",
        "localvit_dropping",
    ],
)


def sizes(family):
    if family == "crossvit":
        return dict(image_size=8)
    return dict(image_size=8, dim=12, depth=3 if family != "dvt" else 2) | ({"patch_size": 4} if family not in ("dvt", "t2t") else {})


def create(variant, dtype="float32", seed=0):
    family, options = VARIANTS[variant]
    given = dict(in_channels=2, num_classes=3, dtype=dtype, seed=seed, **sizes(family)) | options
    model = minivit.create_model(family, **given)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():  # away from zero heads and unit scales
        parameter.data += 0.2 * rng.standard_normal(parameter.shape)
    return model


def trained(model):
    """The parameters that have gradients, by name: not running statistics, nor frozen tables."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch(dtype="float32", size=5):
    rng = np.random.default_rng(1)
    return rng.standard_normal((size, 2, 8, 8)).astype(dtype), rng.integers(0, 3, size)


def train_step(model, images, labels):
    """The loss, a Tensor; parameters have their gradients."""
    model.zero_grad()
    loss = loss_of(model, Tensor(images), labels)
    loss.backward()
    return loss


def loss_of(model, images, labels):
    return F.sum_of(F.cross_entropy(logits, labels, label_smoothing=0.1) for logits in model.exits(images))


# --------------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.slow
@EVERY
def test_gradients_in_evaluation(variant, set_threads):
    set_threads(1)  # far faster for models as small as these
    report = check_model(create(variant, "float64"), batch("float64")[0], name=variant)
    assert not report.failure, report.failure


@pytest.mark.slow
@DROPPING
def test_gradients_in_training(variant, set_threads):
    set_threads(1)
    model = create(variant, "float64").train()
    images, labels = batch("float64")
    source = Tensor(images, requires_grad=True)

    def loss():
        model.random.state[1] = 0  # the same masks each time
        return loss_of(model, source, labels)

    loss().backward()
    for name, tensor in (*trained(model).items(), ("images", source)):
        direction = np.random.default_rng(2).standard_normal(tensor.shape)
        losses = []
        for step in (1e-5, -2e-5):
            tensor.data += step * direction
            losses.append(loss().item())
        tensor.data += 1e-5 * direction
        difference = (losses[0] - losses[1]) / 2e-5
        assert abs((tensor.grad.numpy() * direction).sum() - difference) < 1e-8 + 1e-6 * abs(difference), name


@pytest.mark.slow
@EVERY
def test_gradients_add_up(variant):
    model = create(variant, "float64")
    images, labels = batch("float64")
    train_step(model, images, labels)
    once = [p.grad.numpy().copy() for p in trained(model).values()]
    loss_of(model, Tensor(images), labels).backward()
    for parameter, gradient in zip(trained(model).values(), once):
        np.testing.assert_allclose(parameter.grad.numpy(), 2 * gradient, rtol=1e-12, atol=1e-15)


# -------------------------------------------------------------------------------------------------------------- randomness
def test_rates_over_depth():
    vit = create("vit_dropping")
    np.testing.assert_allclose([b.drop_path1.rate for b in vit.blocks], [0, 0.2, 0.4])
    np.testing.assert_allclose([b.drop_path2.rate for b in vit.blocks], [0, 0.2, 0.4])
    ff_only = create("ff_only_dropping")
    np.testing.assert_allclose([b.drop_path1.rate for b in ff_only.blocks], [0, 0.2, 0.4])
    np.testing.assert_allclose([b.drop_path2.rate for b in ff_only.blocks], [0, 0.2, 0.4])
    mixer = create("mixer_dropping")
    assert {b.drop_path1.rate for b in mixer.blocks} == {b.drop_path2.rate for b in mixer.blocks} == {0.4}


@DROPPING
def test_training_is_random_and_repeatable(variant):
    images, _ = batch()
    first, again = create(variant).train(), create(variant).train()
    a, b, c = (model(images).numpy() for model in (first, first, again))
    assert not np.array_equal(a, b) and np.array_equal(a, c)
    again(images)  # so that both have seen as many batches
    assert np.array_equal(first.eval()(images).numpy(), again.eval()(images).numpy())
    assert first.random.state[1] == again.random.state[1] == 2  # evaluation draws nothing


def _at_rate(rate, options):
    """The options with another rate of all kinds of dropout."""
    return {
        name: _at_rate(rate, value) if isinstance(value, dict) else rate if name.endswith("rate") else value
        for name, value in options.items()
    }


@DROPPING
def test_dropout_of_every_kind_is_unbiased_to_first_order(variant):
    family, options = VARIANTS[variant]
    images, logits = np.random.default_rng(0).standard_normal((4, 3, 8, 8)), []
    for rate in (0.0, 1e-12):  # which drops next to nothing
        model = minivit.create_model(family, **dict(num_classes=3, dtype="float64", **sizes(family)) | _at_rate(rate, options))
        for name, parameter in model.named_parameters():
            parameter.data += name.endswith("head.weight")
        logits.append(model.train()(images).numpy())
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-9, atol=1e-12)
    assert model.random.state[1] == 1


# --------------------------------------------------------------------------------------------------------------- the plan
@pytest.mark.parametrize("precision", ["float32", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bf16x3", "bfloat16"))])
@EVERY
def test_replay_equals_eager(variant, precision):
    precision = precision_for(precision, np.dtype(np.float32))
    images, labels = batch(precision.activations)
    recorded, eager = create(variant).train(), create(variant).train()
    with precision.products():
        check_replay(recorded, eager, images, labels)


def check_replay(recorded, eager, images, labels):

    def step():
        loss = train_step(recorded, images, labels)
        return (loss.data, *(p.grad.data for p in trained(recorded).values()))

    plan = Plan(step)
    for turn in range(3):
        if turn:
            plan.replay()
        expected = (train_step(eager, images, labels).data, *(p.grad.data for p in trained(eager).values()))
        for given, wanted in zip(plan.results, expected):
            np.testing.assert_array_equal(given, wanted)
        for given, wanted in zip(recorded.parameters(), eager.parameters()):  # running statistics among them
            np.testing.assert_array_equal(given.data, wanted.data)
        for model, gradients in ((recorded, plan.results[1:]), (eager, expected[1:])):
            for parameter, gradient in zip(trained(model).values(), gradients):
                parameter.data -= 0.1 * gradient
        images[...] = np.random.default_rng(turn).standard_normal(images.shape)
        labels[...] = (labels + 1) % 3


@pytest.mark.parametrize("name", ["vit_nano_patch2_8", "mixer_nano_patch2_8", "ff_only_nano_patch2_8", "t2t_vit_nano_8"])
def test_arena_and_allocation(name):
    model = minivit.create_model(name, drop_path_rate=0.1).train()
    for parameter in model.parameters():  # as an optimizer has it: gradients lie outside
        parameter.grad_home = arrays.empty_like(parameter.data)
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((64, 1, 8, 8)).astype(np.float32), rng.integers(0, 10, 64)
    plan = Plan(lambda: train_step(model, images, labels).data)
    assert plan.buffer_bytes >= 2.5 * plan.arena_bytes
    plan.replay()
    tracemalloc.start()
    plan.replay()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2000  # bytes: Python's own, of the call
