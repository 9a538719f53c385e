"""Resized position embeddings, against PyTorch's interpolate(align_corners=False) in float64."""

import numpy as np
import pytest
from golden_files import golden_path

import minivit
from minivit import UserError
from minivit.kernels.resample import axis_matrix
from minivit.models.positions import resize

METHODS = ["bicubic_antialias", "bicubic", "bilinear"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("old, new", [(4, 7), (7, 4), (5, 5), (14, 3), (8, 16), (16, 9)])
def test_equals_pytorch(old, new, method):
    with np.load(golden_path("positions.npz")) as arrays:
        given = resize(arrays[f"{old}_{new}/input"], new, 0, method)
        np.testing.assert_allclose(given, arrays[f"{old}_{new}/{method}"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_stays_and_the_same_grid_stays(method):
    np.testing.assert_allclose(axis_matrix(5, 9, method).sum(1), 1, atol=1e-14)
    np.testing.assert_allclose(axis_matrix(6, 6, method), np.eye(6), atol=1e-14)


def test_prefix_and_dtype_are_kept():
    positions = np.random.default_rng(0).random((1, 17, 3)).astype(np.float32)
    resized = resize(positions, 6, 1, "bicubic_antialias")
    assert resized.shape == (1, 37, 3) and resized.dtype == np.float32
    assert np.array_equal(resized[:, 0], positions[:, 0])


@pytest.mark.parametrize("tokens, prefix", [(17, 0), (16, 1), (1, 1), (3, 5)])
def test_no_square(tokens, prefix):
    with pytest.raises(UserError, match=f"position embedding of {tokens} tokens"):
        resize(np.zeros((1, tokens, 3)), 4, prefix, "bilinear")


def test_a_model_takes_another_image_size():
    model = minivit.create_model("vit", image_size=16, patch_size=4, num_classes=3, dim=16, depth=1, heads=2)
    before = model.state_dict()
    model.resize(24)
    assert model.config.image_size == 24 and model.pos_embed.shape == (1, 37, 16)
    np.testing.assert_array_equal(model.pos_embed.data, resize(before["pos_embed"], 6, 1, "bicubic_antialias"))
    assert model(np.zeros((1, 3, 24, 24))).shape == (1, 3)
    assert list(model.state_dict()) == list(before)
    with pytest.raises(UserError, match="patch_size must divide image_size: 30 is not a multiple of 4"):
        model.resize(30)
    assert model.config.image_size == 24
