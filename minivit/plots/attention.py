"""Attention of transformers: probabilities, maps of each head, and rollout through all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import functional as F
from ..errors import UserError
from ..grad_mode import no_grad
from ..models.base import Model
from ..nn.module import evaluating
from ..sides import Sides
from ..tensor import Tensor
from .figure import as_picture, panels, patch_map, spread, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRAYS = np.array([0.299, 0.587, 0.114])  # luminance of R, G and B (ITU-R BT.601)


def attention_probabilities(model: Any, images: Any, stage: int = -1) -> list[np.ndarray]:
    """The attention probabilities of each block in evaluation mode: (B, heads, N, N) each, with one row per query.

    images: (B, C, H, W), normalised as in training. stage: index of the stage of a cascade, negative from the end; its logits include the
    reused ones of previous stages. Raises UserError for a model without attention, and for an invalid stage.
    """
    model = model.unwrapped()
    with evaluating(model), no_grad():
        inputs = model.begin(images)
        backbone, state = _stage_of(model, inputs, stage)
        if not getattr(backbone, "attends", False):
            raise UserError(f"{model.name} has no attention to draw: take a ViT, a CrossViT, or a cascade of ViTs")
        logits: list[Tensor] = []
        features, relationships = state or (None, None)
        backbone.encode(inputs, features, relationships, logits)
        return [F.softmax(block_logits).numpy() for block_logits in logits]


def _stage_of(model: Any, images: Tensor, stage: int) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The stage of a cascade, and the state that it reuses; a model that is not a cascade reuses nothing."""
    stages = model.backbones() if isinstance(model, Model) else [model]
    if not -len(stages) <= stage < len(stages):
        raise UserError(f"{model.name} has stages 0..{len(stages) - 1}, not {stage}")
    state: tuple[Tensor | None, ...] = ()
    for k in range(stage % len(stages) if model.num_exits > 1 else 0):
        _, state = model.stage(k, images, state)
    return stages[stage], state


def to_patches(attention: np.ndarray, grid: Sides, class_token: int) -> np.ndarray:
    """Attention (..., N, N), a row per query, as maps of patches (..., rows, columns): that of the class token, or the mean of all queries.

    class_token: how many of the N tokens stand before the patches; the first of them is the class token. Raises UserError if the others are
    not the patches of the grid.
    """
    return patch_map(attention[..., 0, class_token:] if class_token else attention.mean(-2), grid)


def attention_rollout(probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """The contribution of each input token to each token after the last block: (N, N) float64, whose rows sum to 1.

    The attention of each block is averaged over the heads, then averaged with the identity to account for the residual connection, and the
    matrices of the blocks are multiplied (Abnar & Zuidema, 2005.00928, section 3). probabilities: (..., H, N, N) of each block, from the
    first; the result has the same batch axes. Raises UserError for no blocks.
    """
    if not len(probabilities):
        raise UserError("rollout needs the attention of one block or more")
    N = probabilities[0].shape[-1]
    rollout = np.eye(N)
    for block in probabilities:
        mixed = 0.5 * (block.mean(-3, dtype=np.float64) + np.eye(N))  # (..., N, N)
        rollout = mixed / mixed.sum(-1, keepdims=True) @ rollout
    return rollout


def attention_maps(
    image: np.ndarray, probabilities: Sequence[np.ndarray], grid: Sides, class_token: int, blocks: int = 6, title: str = ""
) -> Figure:
    """The attention to each patch, overlaid on the image: one row per block, one column per head.

    image: (H, W, C) uint8, or floating-point in 0..1. probabilities: (heads, N, N) of each block. class_token: whether the first token is a
    class token, whose attention is then drawn; otherwise the mean of all queries. blocks: maximum number of rows, evenly spaced from the
    first block to the last. Each map is scaled to its largest probability. grid: (rows, columns). Raises UserError if
    N does not match it.
    """
    maps = [to_patches(block, grid, class_token) for block in probabilities]  # (heads, rows, columns) each
    block_indices = spread(maps, blocks)
    figure, axes = panels(len(block_indices), 1 + max(len(m) for m in maps), size=1.1, header=0.32)
    for row, n in zip(axes, block_indices):
        for ax in row:
            ax.set_axis_off()
        _draw_image(row[0], image)
        _name_row(row[0], f"block {n + 1}")
        for ax, heat in zip(row[1:], maps[n]):
            _overlay(ax, image, heat)
    for h, ax in enumerate(axes[0, 1:], 1):
        ax.set_title(f"head {h}", fontsize="small")
    queries = "of the class token" if class_token else "mean over all patches"
    figure.suptitle(titled(title, f"attention to each patch, {queries}"), fontsize="small")
    return figure


def rollout_maps(
    images: np.ndarray,
    rollouts: Sequence[np.ndarray],
    grids: Sequence[Sides],
    class_token: int,
    captions: Sequence[str] = (),
    title: str = "",
    part: str = "exit",
) -> Figure:
    """Images, and below them the images overlaid with their `attention_rollout`: one column per image, one row per exit of a cascade.

    images: (n, H, W, C) uint8, or floating-point in 0..1. rollouts: (n, N, N) of each exit; grids: (rows, columns) of each exit.
    class_token: as for `attention_maps`. captions: n, or none. part: what a row is, an exit or a branch. The smallest value of each map,
    a baseline due to the residual connections, is subtracted. Raises UserError if N does not match the grid.
    """
    maps = [to_patches(rollout, grid, class_token) for rollout, grid in zip(rollouts, grids, strict=True)]  # (n, rows, columns) each
    figure, axes = panels(1 + len(maps), len(images), size=1.4, header=0.32)
    for n, image in enumerate(images):
        _draw_image(axes[0, n], image)
        for k, heats in enumerate(maps, 1):
            _overlay(axes[k, n], image, heats[n] - heats[n].min())
        if len(captions):
            axes[0, n].set_title(captions[n], fontsize="small")
    for k in range(1, 1 + len(maps) if len(maps) > 1 else 1):
        _name_row(axes[k, 0], f"{part} {k}")
    figure.suptitle(titled(title, "attention rollout"), fontsize="small")
    return figure


def _name_row(ax: Axes, name: str) -> None:
    ax.annotate(name, (0, 0.5), (-4, 0), "axes fraction", "offset points", ha="right", va="center", rotation=90, fontsize="small")


def _draw_image(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(as_picture(image), interpolation="nearest")


def _overlay(axes: Axes, image: np.ndarray, heat: np.ndarray) -> None:
    """Draw the image in gray, and over it a map (rows, columns) with an opacity proportional to its values."""
    height, width = image.shape[:2]
    axes.imshow(as_picture(image) @ GRAYS, cmap="gray", vmin=-0.25, vmax=1.15, interpolation="nearest")
    axes.imshow(
        heat,
        cmap="autumn",
        vmin=0,
        interpolation="nearest",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        alpha=0.75 * heat / max(heat.max(), 1e-30),
    )
