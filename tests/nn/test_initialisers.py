"""The distributions weights begin with, and the tables of the models."""

import numpy as np
import pytest

import minivit
from minivit.nn import initialisers


def draw(initialiser, shape, name="w"):
    return initialiser(initialisers.generator(0, name), shape)


@pytest.mark.parametrize(
    "initialiser, shape, std, limit",
    [
        (initialisers.normal(0.5), (300, 200), 0.5, np.inf),
        (initialisers.uniform(0.3), (300, 200), 0.3 / 3**0.5, 0.3),
        (initialisers.truncated_normal(0.02), (300, 200), 0.02, 2.0),
        (initialisers.truncated_normal(2.0), (300, 200), 1.0796, 2.0),  # 2 · 0.5398, the deviation of a unit normal cut at ±1
        (initialisers.lecun_normal, (300, 8, 5, 5), 200**-0.5, 2 * 200**-0.5 / 0.8796),
        (initialisers.xavier_uniform(), (300, 200), (2 / 500) ** 0.5, (6 / 500) ** 0.5),
        (initialisers.xavier_uniform(3), (300, 200), (2 / 300) ** 0.5, (6 / 300) ** 0.5),
    ],
)
def test_moments_and_bounds(initialiser, shape, std, limit):
    values = draw(initialiser, shape)
    assert values.shape == shape
    assert abs(values.std() / std - 1) < 0.01 and abs(values.mean()) < 0.01 * std
    assert np.abs(values).max() <= limit * (1 + 1e-12)


def test_names_and_seeds_are_independent():
    def first(seed, name):
        return initialisers.generator(seed, name).random()

    assert first(0, "a") == first(0, "a")
    assert len({first(seed, name) for seed in (0, 1, 2**40) for name in ("a", "b", "blocks.10.w", "blocks.1.w")}) == 12


def deviations(family, init):
    shape = dict(image_size=16, patch_size=4, num_classes=50, dim=64, depth=2) | (dict(heads=4) if family == "vit" else {})
    state = minivit.create_model(family, init=init, **shape).state_dict()
    assert all((state[n] == (1 if n.endswith("weight") else 0)).all() for n in state if "norm" in n)
    return {name: array.std() for name, array in state.items() if "norm" not in name and ".1." not in name}


def near(value):
    return pytest.approx(value, rel=0.25)


def test_vit_as_timm():
    patch = 48**-0.5 / 3**0.5  # uniform in ±1/√fan_in
    expected = {
        "cls_token": near(1e-6),
        "pos_embed": near(0.02),
        "patch_embed.proj.weight": near(patch),
        "patch_embed.proj.bias": near(patch),
        "head.weight": near(0.02),
        "head.bias": 0,
    }
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        expected |= {f"blocks.0.{layer}.weight": near(0.02), f"blocks.0.{layer}.bias": 0}
    assert deviations("vit", "timm") == expected


def test_vit_as_google():
    xavier, wide = (2 / 128) ** 0.5, (2 / 320) ** 0.5
    assert deviations("vit", "jax") == {
        "cls_token": 0,
        "pos_embed": near(0.02),
        "patch_embed.proj.weight": near(48**-0.5),
        "patch_embed.proj.bias": 0,
        "blocks.0.attn.qkv.weight": near(xavier),
        "blocks.0.attn.qkv.bias": 0,
        "blocks.0.attn.proj.weight": near(xavier),
        "blocks.0.attn.proj.bias": 0,
        "blocks.0.mlp.fc1.weight": near(wide),
        "blocks.0.mlp.fc1.bias": near(1e-6),
        "blocks.0.mlp.fc2.weight": near(wide),
        "blocks.0.mlp.fc2.bias": near(1e-6),
        "head.weight": 0,
        "head.bias": 0,
    }


@pytest.mark.parametrize(
    "init, tokens, channels, bias",
    [("timm", (2 / 48) ** 0.5, (2 / 320) ** 0.5, pytest.approx(1e-6, rel=0.5)), ("jax", (16**-0.5, 32**-0.5), (64**-0.5, 256**-0.5), 0)],
)
def test_mixer(init, tokens, channels, bias):
    expected = {"stem.proj.weight": near(48**-0.5), "stem.proj.bias": 0, "head.weight": 0, "head.bias": 0}
    for mlp, stds in (("mlp_tokens", tokens), ("mlp_channels", channels)):
        for i, std in enumerate(stds if isinstance(stds, tuple) else (stds, stds)):
            expected |= {f"blocks.0.{mlp}.fc{i + 1}.weight": near(std), f"blocks.0.{mlp}.fc{i + 1}.bias": bias}
    assert deviations("mixer", init) == expected
