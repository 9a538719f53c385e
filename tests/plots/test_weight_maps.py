"""Position embeddings, patch filters and token-mixing weights as maps."""

import numpy as np
import pytest

from minivit import UserError, plots
from minivit.plots.figure import mosaic


def test_a_mosaic():
    tiles = np.arange(1, 1 + 3 * 12 * 12, dtype=float).reshape(3, 12, 12)
    whole = mosaic(tiles, 2)
    assert whole.shape == (27, 27)
    for tile, (top, left) in zip(tiles, [(1, 1), (1, 14), (14, 1)]):
        np.testing.assert_array_equal(whole[top : top + 12, left : left + 12], tile)
    assert np.isfinite(whole).sum() == tiles.size and np.isnan(whole[13:, 14:]).all()


def test_small_tiles_are_enlarged():
    whole = mosaic(np.array([[[1.0, 2.0], [3.0, 4.0]]]), 1)
    assert whole.shape == (14, 14)
    np.testing.assert_array_equal(whole[1:-1, 1:-1], np.repeat(np.repeat([[1.0, 2.0], [3.0, 4.0]], 6, 0), 6, 1))


def test_position_similarity():
    random = np.random.default_rng(0)
    positions = random.standard_normal((144, 5)) * random.uniform(0.1, 9, (144, 1))
    drawn = plots.position_similarity(positions, 12).axes[0].images[0].get_array()
    i, j = 3 * 12 + 7, 10 * 12 + 2  # the map of patch i, at the place of patch j
    cosine = positions[i] @ positions[j] / np.linalg.norm(positions[i]) / np.linalg.norm(positions[j])
    assert drawn[3 * 13 + 1 + 10, 7 * 13 + 1 + 2] == pytest.approx(cosine)
    assert drawn[3 * 13 + 1 + 3, 7 * 13 + 1 + 7] == pytest.approx(1)


def test_positions_of_another_grid():
    with pytest.raises(UserError, match="17 patches do not make a grid of 4×4"):
        plots.position_similarity(np.ones((17, 3)), 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_patch_filters_are_principal_components(channels):
    random = np.random.default_rng(1)
    basis = np.linalg.qr(random.standard_normal((16 * channels, 2)))[0].T  # two orthonormal patterns
    amounts = random.standard_normal((64, 2)) * [3, 1]
    weight = (amounts @ basis + 5).reshape(64, channels, 4, 4)  # the mean of all filters is no component
    figure = plots.patch_filters(weight, number=2)
    centred = amounts - amounts.mean(0)
    axes = np.linalg.svd(centred)[2] @ basis  # the true principal components
    variances = np.linalg.svd(centred, compute_uv=False) ** 2
    for one, component, share in zip(figure.axes, axes, variances / variances.sum()):
        drawn = np.asarray(one.images[0].get_array()).reshape(4, 4, channels).transpose(2, 0, 1).ravel() - 0.5
        assert abs(drawn @ component) == pytest.approx(np.linalg.norm(drawn), rel=1e-6)  # parallel
        assert drawn.max() == pytest.approx(0.5)
        assert one.get_xlabel() == f"{100 * share:.1f} %"


def test_no_more_components_than_there_are():
    figure = plots.patch_filters(np.random.default_rng(2).standard_normal((64, 1, 3, 3)), number=28)
    assert sum(bool(axes.images) for axes in figure.axes) == 9


def test_filters_without_colours():
    with pytest.raises(UserError, match="filters of 2 channels"):
        plots.patch_filters(np.zeros((8, 2, 4, 4)))


def waves(grid):
    x = np.mgrid[:grid, :grid][1] / grid
    return [np.cos(2 * np.pi * (f * x + phase)) for f, phase in ((3, 0), (1, 0), (5, 0.2), (1, 0.5), (5, 0.7), (3, 0.5))]


def tiles(figure, number, grid, columns):
    drawn = np.ma.filled(figure.axes[number].images[0].get_array(), np.nan)
    step = grid + 1
    return [
        drawn[1 + r * step : (r + 1) * step, 1 + c * step : (c + 1) * step]
        for r in range(len(drawn) // step)
        for c in range(min(columns, drawn.shape[1] // step))
    ]


def test_token_mixing_pairs_opposite_phases_by_frequency():
    units = np.stack(waves(12))
    weight = (units * np.array([1, 2, 3, 4, 5, 6])[:, None, None]).reshape(6, 144)
    found = tiles(plots.token_mixing_maps([weight, -weight], 12), 0, 12, 8)
    order = [(1, 3), (0, 5), (2, 4)]  # frequency 1, 3, 5
    for n, pair in enumerate(order):
        for tile, i in zip(found[2 * n : 2 * n + 2], pair):
            np.testing.assert_allclose(tile, units[i] / np.abs(units[i]).max(), atol=1e-9)


def test_token_mixing_keeps_the_strongest():
    units = np.stack(waves(12)).reshape(6, 144) * np.array([1, 9, 1, 9, 1, 1])[:, None]
    found = tiles(plots.token_mixing_maps([units], 12, number=2), 0, 12, 8)
    assert len([t for t in found if np.isfinite(t).all()]) == 2
    np.testing.assert_allclose(found[0], units[1].reshape(12, 12) / 9, atol=1e-9)


def test_an_odd_unit_and_one_of_zeros():
    weight = np.stack([*waves(12)[:2], np.zeros((12, 12))]).reshape(3, 144)
    found = tiles(plots.token_mixing_maps([weight], 12), 0, 12, 8)
    assert sum(np.isfinite(t).all() for t in found) == 3


@pytest.mark.parametrize("weights, message", [([], "no token-mixing weights"), ([np.ones((4, 17))], "17 patches")])
def test_mistakes_in_token_mixing(weights, message):
    with pytest.raises(UserError, match=message):
        plots.token_mixing_maps(weights, 4)
