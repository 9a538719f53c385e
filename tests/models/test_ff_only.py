"""What FF-only has of its own: positions of another grid, more input of the channel MLP, patches that overlap."""

import numpy as np
import pytest

import minivit
from minivit import Tensor, UserError
from minivit.models import FFOnly, FFOnlyConfig
from minivit.models.positions import resize

SMALL = {"image_size": 12, "patch_size": 4, "num_classes": 3, "dim": 8, "depth": 2, "dtype": "float64"}


def small(**options):
    return minivit.create_model("ff_only", **SMALL | options)


@pytest.fixture
def images():
    return np.random.default_rng(0).standard_normal((2, 3, 12, 12))


@pytest.mark.parametrize("stored", [(2, 2), (5, 5), (2, 5)])
def test_stored_positions_are_resized(images, stored):
    model, other = small(position_grid=stored), small()
    state = model.state_dict()
    assert state["pos_encoding.pos_embed"].shape == (1, 8, *stored)
    square = state["pos_encoding.pos_embed"].reshape(1, 8, -1).transpose(0, 2, 1)
    resized = resize(square, 3, 0, "bilinear", stored).transpose(0, 2, 1).reshape(1, 8, 3, 3)
    other.load_state_dict(state | {"pos_encoding.pos_embed": resized})
    np.testing.assert_allclose(model(images).numpy(), other(images).numpy(), rtol=1e-12)


def test_the_class_token_is_what_the_head_sees(images):
    model = small()
    tokens = model.tokens(images)
    assert tokens.shape == (2, 1 + 9, 8) and model.prefix == 1
    np.testing.assert_allclose(model.features(images).numpy(), model.norm(tokens).numpy()[:, 0], rtol=1e-12)


def test_extra_channels_reach_the_channel_mlp_alone(images):
    model = FFOnly(FFOnlyConfig(**SMALL, extra_channels=5))
    block = model.blocks[0]
    assert block.norm1.weight.shape == (13,) and block.mlp1.fc1.weight.shape == (32, 13) and block.mlp1.fc2.weight.shape == (8, 32)
    assert block.norm2.weight.shape == (10,) and block.mlp2.fc1.weight.shape == (40, 10)
    x = model.embed(Tensor(images))
    extra = Tensor(np.random.default_rng(1).standard_normal((2, 10, 5)), requires_grad=True)
    y = block(x, extra)
    assert y.shape == x.shape
    y.sum().backward()
    assert np.abs(extra.grad.numpy()).max() > 0


def test_extra_channels_are_for_stages_of_a_cascade():
    with pytest.raises(UserError, match="extra_channels is for the stages of a cascade, which sets it: leave it out"):
        small(extra_channels=5)


def test_overlapping_and_padded_patches(images):
    model = small(patch_size=5, patch_stride=3, patch_padding=1)
    assert model.grid == (4, 4) and model(images).shape == (2, 3)


def test_no_hidden_unit():
    with pytest.raises(UserError, match=r"mlp_ratio=0.05 leaves no hidden unit of 192 channels or 10 tokens"):
        small(dim=192, mlp_ratio=0.05)


@pytest.mark.parametrize("init, head", [("timm", True), ("jax", False)])
def test_first_weights(init, head):
    state = small(init=init, dim=64, num_classes=10).state_dict()
    assert state["head.weight"].any() == head and not state["head.bias"].any()
    for name in (
        "pos_encoding.pos_embed",
        "pos_encoding.cls_pos_embed",
        "patch_embed.proj.weight",
        "blocks.1.mlp1.fc1.weight",
        "blocks.1.mlp2.fc2.weight",
    ):
        assert state[name].std() > 0.01, name
    assert np.all(state["blocks.0.norm2.weight"] == 1)
