"""Learned weights as maps: similarity of position embeddings, patch filters, and token-mixing weights of mixers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..sides import Sides, both
from .figure import mosaic, new_figure, panels, patch_map, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def position_similarity(pos_embed: np.ndarray, grid: Sides, title: str = "") -> Figure:
    """Cosine similarity of each patch's position embedding with all others, one map per patch (2010.11929, Figure 7, centre).

    pos_embed: (patches, C), in row-major order, without class tokens. grid: (rows, columns). Raises UserError for another number.
    """
    unit = pos_embed / np.maximum(np.linalg.norm(pos_embed, axis=1, keepdims=True), 1e-12)  # (N, C)
    maps = patch_map(unit @ unit.T, grid)  # (N, rows, columns)
    rows, columns = both(grid)
    tiles = mosaic(maps, columns)
    figure = new_figure(5.6, 4.9)
    axes = figure.subplots()
    image = axes.imshow(tiles, cmap="viridis", vmin=min(0.0, float(maps.min())), vmax=1)
    for axis, length, count in ((axes.xaxis, tiles.shape[1], columns), (axes.yaxis, tiles.shape[0], rows)):
        labelled = range(0, count, -(-count // 16))
        axis.set_ticks([(k + 0.5) * (length - 1) / count for k in labelled], [str(k + 1) for k in labelled])
        axis.set_tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    axes.set_title(titled(title, "position embeddings"), fontsize="small")
    figure.colorbar(image, label="cosine similarity", shrink=0.9)
    return figure


def patch_filters(weight: np.ndarray, number: int = 28, title: str = "") -> Figure:
    """The first principal components of the patch projection's filters, with their fraction of the variance (2010.11929, Figure 7, left).

    weight: (dim, C, P, Q), C 1 (drawn gray) or 3 (RGB); 0 is middle gray, and each component is scaled to the full range. number: maximum
    number of components (there are at most min(C·P·Q, dim)). Raises UserError for another number of channels.
    """
    dim, channels, *size = weight.shape
    if channels not in (1, 3):
        raise UserError(f"filters of {channels} channels have no colours: patch_filters draws those of gray or RGB images")
    components, shares = _principal_components(weight.reshape(dim, -1), number)
    filters = components.reshape(-1, channels, *size).transpose(0, 2, 3, 1)  # (n, P, Q, C)
    pictures = 0.5 + 0.5 * filters / np.maximum(np.abs(filters).max((1, 2, 3), keepdims=True), 1e-12)
    columns = min(7, len(pictures))
    figure, axes = panels(-(-len(pictures) // columns), columns, size=0.85, caption=0.17, header=0.3)
    for ax in axes.flat[len(pictures) :]:
        ax.set_axis_off()
    for ax, picture, share in zip(axes.flat, pictures, shares):
        ax.imshow(picture if channels == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
        ax.spines[:].set(visible=True, linewidth=0.5)
        ax.set_xlabel(f"{100 * share:.1f} %", fontsize="x-small", labelpad=1)
    figure.suptitle(f"{title}\nfilters' principal components, share of variance".strip(), fontsize="x-small")
    return figure


def _principal_components(rows: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(components (n, C), of length 1 and with positive largest entry; their fractions of the variance (n,)) of rows (R, C)."""
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    _, strengths, components = np.linalg.svd(centred, full_matrices=False)
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)  # (n, 1)
    variances = strengths**2
    return (components * np.where(largest < 0, -1, 1))[:number], (variances / max(variances.sum(), 1e-300))[:number]


def token_mixing_maps(weights: Sequence[np.ndarray], grid: Sides, number: int = 128, title: str = "") -> Figure:
    """The weights from patches to hidden units of the token-mixing MLPs: one map per unit, one panel per block (2105.01601, Figure 5).

    weights: of each block's first layer, (F, patches), without columns of class tokens. grid: (rows, columns). As in the paper, units of
    opposite phase are next to each other, and pairs are sorted by increasing frequency. number: maximum number of units per block; those
    of largest norm are drawn.
    Raises UserError for no weights, or another number of patches.
    """
    if not len(weights):
        raise UserError("there are no token-mixing weights to draw")
    columns = 8 if min(number, len(weights[0])) <= 128 else 16
    pictures = [mosaic(_sorted_units(patch_map(w.astype(np.float64), grid), number), columns) for w in weights]
    height, width = pictures[0].shape
    figure = new_figure(2.4 * len(pictures) + 0.2, 2.4 * height / width + 0.6)
    for n, (axes, picture) in enumerate(zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures), 1):
        axes.imshow(picture, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"block {n}")
        axes.title.set_fontsize("small")
        axes.spines[:].set_visible(False)
    figure.suptitle(titled(title, "token-mixing weights, a map a hidden unit"), fontsize="small")
    return figure


def _sorted_units(maps: np.ndarray, number: int) -> np.ndarray:
    """The `number` maps of (F, rows, columns) with the largest norm, scaled to -1..1, in pairs of opposite phase sorted by frequency."""
    norms = np.linalg.norm(maps, axis=(1, 2))
    maps = maps[np.sort(np.argsort(-norms, kind="stable")[:number])]
    pairs = _opposite_pairs(maps.reshape(len(maps), -1))
    frequency = _frequency(maps)
    order = sorted(pairs, key=lambda pair: frequency[list(pair)].mean())
    return np.stack([maps[i] / max(np.abs(maps[i]).max(), 1e-12) for pair in order for i in pair])


def _opposite_pairs(rows: np.ndarray) -> list[tuple[int, ...]]:
    """Indices of rows in pairs, the most opposite first; an unpaired row is last."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    first, second = np.triu_indices(len(unit), 1)
    order = np.argsort((unit @ unit.T)[first, second], kind="stable")
    free, pairs = set(range(len(unit))), []
    for i, j in zip(first[order].tolist(), second[order].tolist()):
        if i in free and j in free:
            pairs.append((i, j))
            free -= {i, j}
    return [*pairs, *((i,) for i in sorted(free))]


def _frequency(maps: np.ndarray) -> np.ndarray:
    """Mean spatial frequency of maps (F, rows, columns), weighted by power, in cycles per patch: (F,)."""
    power = np.abs(np.fft.fft2(maps)) ** 2
    vertical, horizontal = map(np.fft.fftfreq, maps.shape[1:])
    radius = np.hypot(vertical[:, None], horizontal)
    return (power * radius).sum((1, 2)) / np.maximum(power.sum((1, 2)), 1e-300)
