"""DeepViT: what is its own. Tests of all families are in test_golden, test_presets and test_steps."""

import numpy as np
import pytest

import minivit
from minivit import Trainer, UserError
from minivit import functional as F
from minivit.models.deepvit import ReAttention


def small(**options):
    given = dict(image_size=8, patch_size=4, dim=8, depth=3, heads=2, num_classes=3)
    return minivit.create_model("deepvit", **given | options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(reattention_blocks=(1, 3)), r"^reattention_blocks must be from 0 to 2, not \(1, 3\)$"),
        (dict(reattention_blocks=2), "^reattention_blocks must be a list, not 2$"),
        (dict(stem="convolutions"), "^stem must be 'patch' or 'convolution', not 'convolutions'"),
        (
            dict(stem="convolution", patch_size=1),
            "^stem='convolution' takes an even patch_size that divides image_size, not 1 for 8 pixels$",
        ),
        (dict(heads=3), "^heads must divide dim: 8 is not a multiple of 3$"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)


def test_which_blocks_reattend():
    model = small(reattention_blocks=(2, 0))
    assert [isinstance(block.attn, ReAttention) for block in model.blocks] == [True, False, True]
    assert all(isinstance(block.attn, ReAttention) for block in small().blocks)


def test_a_batch_of_one_image_is_an_error_in_training():
    images, label = np.zeros((1, 3, 8, 8), np.float32), np.array([1])
    with pytest.raises(UserError, match="batch normalisation learns from two images or more at once, got 1"):
        Trainer(small()).step(images, label)
    assert small()(images).shape == (1, 3)


def test_moments_of_the_mixed_maps():
    """The moments that stand in for those of the stored maps, far from and close to equal probabilities."""
    rng = np.random.default_rng(0)
    for spread in (1.0, 1e-3):
        p = np.exp(spread * rng.standard_normal((4, 3, 9, 9)))
        p = (p / p.sum(-1, keepdims=True)).astype(np.float32)
        matrix = rng.standard_normal((3, 3))
        maps = np.einsum("hg,bgij->hbij", matrix, p.astype(np.float64)).reshape(3, -1)
        mean, covariance = (t.numpy().astype(np.float64) for t in F.head_moments(minivit.Tensor(p)))
        np.testing.assert_allclose(matrix @ mean, maps.mean(1), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(np.diag(matrix @ covariance @ matrix.T), maps.var(1), rtol=1e-3)


def test_weights_go_to_another_grid_and_number_of_channels(tmp_path):
    model = small(stem="convolution", stem_width=4)
    minivit.save_weights(model, tmp_path / "model.safetensors")
    other = small(stem="convolution", stem_width=4, image_size=16, in_channels=1)
    changes = minivit.load_weights(other, tmp_path / "model.safetensors")
    assert len(changes) == 2
    assert other.pos_embed.shape == (1, 17, 8) and other(np.zeros((1, 1, 16, 16))).shape == (1, 3)
    gray = np.random.default_rng(0).random((2, 1, 8, 8))
    same = small(stem="convolution", stem_width=4, in_channels=1)
    minivit.load_weights(same, tmp_path / "model.safetensors")
    np.testing.assert_allclose(same(gray).numpy(), model(gray.repeat(3, 1)).numpy(), rtol=1e-4, atol=1e-5)


def test_an_image_size_after_the_fact():
    model = small(stem="convolution", stem_width=4)
    before = model.patch_embed.conv1.weight
    model.resize(16)
    assert model.patch_embed.conv1.weight is before and model(np.zeros((1, 3, 16, 16))).shape == (1, 3)
