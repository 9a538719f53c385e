"""Attention probabilities, rollout, and both laid over images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minivit
from minivit import UserError, plots
from minivit.grad_mode import no_grad
from minivit.tensor import Tensor

TINY = dict(image_size=8, in_channels=1, num_classes=3, dim=8, depth=2, heads=2, dtype="float64")


def vit(class_token=True):
    return minivit.create_model("vit", **TINY, patch_size=2, class_token=class_token, pool="cls" if class_token else "mean")


def images(number=3):
    return np.random.default_rng(0).standard_normal((number, 1, 8, 8))


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# --------------------------------------------------------------------------------------------------------------- probabilities
@pytest.mark.parametrize("class_token", [True, False])
def test_probabilities_of_a_vit(class_token):
    model = vit(class_token)
    found = plots.attention_probabilities(model, images())
    N = 16 + class_token
    assert [block.shape for block in found] == [(3, 2, N, N)] * 2
    np.testing.assert_allclose(np.stack(found).sum(-1), 1)
    block = model.blocks[0]
    qkv = block.attn.qkv(block.norm1(model.embed(model.begin(images())))).numpy().reshape(3, N, 3, 2, 4)
    q, k = qkv[:, :, 0].transpose(0, 2, 1, 3), qkv[:, :, 1].transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found[0], softmax(q @ k.swapaxes(2, 3) / 2))


def cascade(reuse=True):
    return minivit.create_model("dvt", **TINY, patches=((4, 4, 0), (4, 2, 0), (2, 2, 0)), feature_reuse=reuse, relationship_reuse=reuse)


def test_probabilities_of_a_stage_contain_what_it_reuses():
    model = cascade()
    for _, parameter in model.named_parameters():  # so that what is reused matters
        parameter.data[...] += 0.1 * np.random.default_rng(1).standard_normal(parameter.shape)
    with no_grad():
        _, first = model.stage(0, Tensor(images()), (None, None))
        _, (_, relation) = model.stage(1, Tensor(images()), first)  # the logits of both blocks, (B, 2·2, N, N)
    found = plots.attention_probabilities(model, images(), 1)
    np.testing.assert_allclose(np.concatenate(found, axis=1), softmax(relation.numpy()))
    last = plots.attention_probabilities(model, images())
    assert last[0].shape == (3, 2, 17, 17)
    for mine, own in zip(last, plots.attention_probabilities(model, images(), 2)):
        np.testing.assert_array_equal(mine, own)


def test_probabilities_without_reuse_are_the_stage_alone():
    model = cascade(reuse=False)
    found = plots.attention_probabilities(model, images(), 1)
    for block, alone in zip(found, plots.attention_probabilities(model.stages[1], images())):
        np.testing.assert_array_equal(block, alone)


def test_the_mode_stays():
    model = minivit.create_model("vit", **TINY, patch_size=2, drop_path_rate=0.5, attn_drop_rate=0.5).train()
    once, again = (plots.attention_probabilities(model, images()) for _ in range(2))
    assert model.training and all(map(np.array_equal, once, again))  # nothing was dropped


def test_no_attention_and_no_such_stage():
    with pytest.raises(UserError, match="mixer_nano_patch2_8 has no attention to draw"):
        plots.attention_probabilities(minivit.create_model("mixer_nano_patch2_8"), images())
    with pytest.raises(UserError, match=r"has stages 0\.\.2, not 3"):
        plots.attention_probabilities(cascade(), images(), 3)


# --------------------------------------------------------------------------------------------------------------------- rollout
def test_rollout_by_hand():
    first = np.array([[[1.0, 0.0], [0.8, 0.2]], [[1.0, 0.0], [0.2, 0.8]]])  # two heads, mean [[1, 0], [.5, .5]]
    second = np.array([[[0.2, 0.8], [0.6, 0.4]]])
    # (.5 A₂ + .5 I) (.5 A₁ + .5 I) = [[.6, .4], [.3, .7]] [[1, 0], [.25, .75]]
    np.testing.assert_allclose(plots.attention_rollout([first, second]), [[0.7, 0.3], [0.475, 0.525]])


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_rows_of_a_rollout_sum_to_one(blocks, heads, tokens, seed):
    probabilities = softmax(np.random.default_rng(seed).standard_normal((blocks, 2, heads, tokens, tokens)) * 5).astype(np.float32)
    found = plots.attention_rollout(probabilities)
    assert found.shape == (2, tokens, tokens) and found.dtype == np.float64
    np.testing.assert_allclose(found.sum(-1), 1)
    np.testing.assert_allclose(found[1], plots.attention_rollout(probabilities[:, 1]), rtol=1e-12)


def test_no_rollout_of_nothing():
    with pytest.raises(UserError, match="one block or more"):
        plots.attention_rollout([])


# ------------------------------------------------------------------------------------------------------------------ the pictures
IMAGE = np.random.default_rng(3).integers(0, 256, (8, 8, 3), np.uint8)


def heats(figure):
    """The maps that lie over an image, in reading order."""
    return [np.asarray(axes.images[1].get_array()) for axes in figure.axes if len(axes.images) == 2]


@pytest.mark.parametrize("class_token", [True, False])
def test_attention_maps(class_token):
    N = 16 + class_token
    probabilities = softmax(np.random.default_rng(4).standard_normal((2, 3, N, N)))
    figure = plots.attention_maps(IMAGE, probabilities, 4, class_token)
    wanted = probabilities[:, :, 0, 1:] if class_token else probabilities.mean(2)
    np.testing.assert_allclose(np.stack(heats(figure)), wanted.reshape(6, 4, 4))
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), IMAGE / 255)
    gray = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(gray, IMAGE @ [0.299, 0.587, 0.114] / 255)
    assert [axes.get_title() for axes in figure.axes[:4]] == ["", "head 1", "head 2", "head 3"]


def test_deep_models_show_some_blocks():
    probabilities = np.full((9, 1, 4, 4), 0.25)
    figure = plots.attention_maps(IMAGE, probabilities, 2, False, blocks=3)
    assert [axes.texts[0].get_text() for axes in figure.axes if axes.texts] == ["block 1", "block 5", "block 9"]


def test_rollout_maps():
    random = np.random.default_rng(5)
    rollouts = [softmax(random.standard_normal((2, n, n))) for n in (5, 17)]
    pictures = np.stack([IMAGE, 255 - IMAGE])
    figure = plots.rollout_maps(pictures, rollouts, [2, 4], True, ["one", "two"])
    first, second, third, fourth = heats(figure)
    for heat, rollout, grid in (
        (first, rollouts[0][0], 2),
        (second, rollouts[0][1], 2),
        (third, rollouts[1][0], 4),
        (fourth, rollouts[1][1], 4),
    ):
        values = rollout[0, 1:].reshape(grid, grid)
        np.testing.assert_allclose(heat, values - values.min())
    assert [axes.get_title() for axes in figure.axes[:2]] == ["one", "two"]
    assert [axes.texts[0].get_text() for axes in figure.axes if axes.texts] == ["exit 1", "exit 2"]


def test_maps_of_another_grid():
    with pytest.raises(UserError, match="15 patches do not make a grid of 4×4"):
        plots.attention_maps(IMAGE, np.ones((1, 1, 16, 16)), 4, True)
