"""Where transformers look: attention probabilities, the maps of each head, rollout through all blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import functional as F
from ..errors import UserError
from ..grad_mode import no_grad
from ..models.base import Backbone, Model
from ..nn.module import evaluating
from ..tensor import Tensor
from .figure import as_picture, panels, patch_map, spread, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRAYS = np.array([0.299, 0.587, 0.114])  # luminance of R, G and B (ITU-R BT.601)


def attention_probabilities(model: Any, images: Any, stage: int = -1) -> list[np.ndarray]:
    """The attention probabilities of each block in evaluation mode: (B, heads, N, N) each, a row a query.

    images: (B, C, S, S), normalised as in training. stage: of a cascade, from 0; negative ones count from the last. Its logits contain what
    it reuses from the stages before. Raises UserError for a model without attention, and a stage that there is not.
    """
    model = model.unwrapped()
    with evaluating(model), no_grad():
        inputs = model.begin(images)
        backbone, state = _stage_of(model, inputs, stage)
        if not (isinstance(backbone, Backbone) and backbone.attends):
            raise UserError(f"{model.name} has no attention to draw: take a ViT, or a cascade of them")
        logits: list[Tensor] = []
        features, relationships = state or (None, None)
        backbone.encode(inputs, features, relationships, logits)
        return [F.softmax(each).numpy() for each in logits]


def _stage_of(model: Any, images: Tensor, stage: int) -> tuple[Model, tuple[Tensor | None, ...]]:
    """The stage of a cascade and what it reuses; a model that is none is its own and only stage."""
    stages = model.backbones() if isinstance(model, Model) else [model]
    if not -len(stages) <= stage < len(stages):
        raise UserError(f"{model.name} has stages 0..{len(stages) - 1}, not {stage}")
    state: tuple[Tensor | None, ...] = ()
    for k in range(stage % len(stages)):
        _, state = model.stage(k, images, state)
    return stages[stage], state


def to_patches(attention: np.ndarray, grid: int, class_token: bool) -> np.ndarray:
    """Attention (..., N, N), a row a query, to each patch as maps (..., grid, grid): the class token's, or the mean of all queries'.

    class_token: whether the first of the N tokens is one. Raises UserError where the others are not grid² patches.
    """
    return patch_map(attention[..., 0, 1:] if class_token else attention.mean(-2), grid)


def attention_rollout(probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """How much of each input token reaches each token after the last block: (N, N) float64, whose rows sum to 1.

    The attention of a block is averaged over its heads and with the identity, for the residual branch, and the blocks are multiplied
    (Abnar & Zuidema, 2005.00928, section 3). probabilities: (H, N, N) of each block, from the first; with batch axes before these, the
    result has them too. Raises UserError for no blocks.
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
    image: np.ndarray, probabilities: Sequence[np.ndarray], grid: int, class_token: bool, blocks: int = 6, title: str = ""
) -> Figure:
    """The attention to each patch, laid over the image: a row a block, a column a head.

    image: (H, W, C) uint8, or floating in 0..1. probabilities: (heads, N, N) of each block. class_token: whether the first token is one,
    whose attention is then drawn, else the mean of all queries'. blocks: rows at most, spread evenly from the first block to the last.
    The brightest place of a map is its largest probability. Raises UserError where the N tokens do not fit `grid` patches a side.
    """
    maps = [to_patches(block, grid, class_token) for block in probabilities]  # (heads, grid, grid) each
    shown = spread(maps, blocks)
    figure, axes = panels(len(shown), 1 + max(len(m) for m in maps), size=1.1, header=0.32)
    for row, n in zip(axes, shown):
        for one in row:
            one.set_axis_off()
        _draw_image(row[0], image)
        _name_row(row[0], f"block {n + 1}")
        for one, heat in zip(row[1:], maps[n]):
            _lay_over(one, image, heat)
    for h, one in enumerate(axes[0, 1:], 1):
        one.set_title(f"head {h}", fontsize="small")
    whose = "of the class token" if class_token else "mean over all patches"
    figure.suptitle(titled(title, f"attention to each patch, {whose}"), fontsize="small")
    return figure


def rollout_maps(
    images: np.ndarray,
    rollouts: Sequence[np.ndarray],
    grids: Sequence[int],
    class_token: bool,
    captions: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Images above the same with their `attention_rollout` laid over them: a column an image, a row an exit of a cascade, or one row.

    images: (n, H, W, C) uint8, or floating in 0..1. rollouts: (n, N, N) of each exit; grids: their patches a side. class_token: as for
    `attention_maps`. captions: n, or none. What is drawn is the excess over an image's smallest value, to which the residual branches bring
    every patch. Raises UserError where the N tokens do not fit the grid.
    """
    maps = [to_patches(rollout, grid, class_token) for rollout, grid in zip(rollouts, grids, strict=True)]  # (n, grid, grid) each
    figure, axes = panels(1 + len(maps), len(images), size=1.4, header=0.32)
    for n, image in enumerate(images):
        _draw_image(axes[0, n], image)
        for k, heats in enumerate(maps, 1):
            _lay_over(axes[k, n], image, heats[n] - heats[n].min())
        if len(captions):
            axes[0, n].set_title(captions[n], fontsize="small")
    for k in range(1, 1 + len(maps) if len(maps) > 1 else 1):
        _name_row(axes[k, 0], f"exit {k}")
    figure.suptitle(titled(title, "attention rollout"), fontsize="small")
    return figure


def _name_row(first: Axes, name: str) -> None:
    first.annotate(name, (0, 0.5), (-4, 0), "axes fraction", "offset points", ha="right", va="center", rotation=90, fontsize="small")


def _draw_image(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(as_picture(image), interpolation="nearest")


def _lay_over(axes: Axes, image: np.ndarray, heat: np.ndarray) -> None:
    """The image in gray below a map (grid, grid) whose colours are the more opaque the larger its values are."""
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
