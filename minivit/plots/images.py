"""Sheets of images: those that leave a cascade early and late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from .figure import BLUE, RED, as_picture, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def exit_sheet(
    images: np.ndarray,
    exits: np.ndarray,
    confidences: np.ndarray,
    labels: Sequence[str],
    truths: Sequence[str] | None = None,
    columns: int = 10,
    rows: int = 2,
) -> Figure:
    """Images that leave a cascade early, in descending order of confidence, above those that leave late, in ascending order (2105.15075,
    section 4).

    images: (B, H, W, C) uint8, or floating-point in 0..1; C is 1 or 3. exits: (B,) integers from 0. confidences: (B,) 0..1, of the
    predictions. labels: the B predicted labels. truths: the true labels; a wrong prediction is red, with the true label below it.
    columns, rows: of each of the two halves, which shrink if there are too few images, so that none is shown twice.
    Raises UserError for fewer than two images, or if the arguments differ in length.
    """
    targets = labels if truths is None else truths
    if len(images) < 2 or {len(exits), len(confidences), len(labels), len(targets)} != {len(images)}:
        raise UserError(
            f"an exit sheet takes two images or more with an exit, a confidence and a label each, got {len(images)} images, "
            f"{len(exits)} exits, {len(confidences)} confidences, {len(labels)} labels"
        )
    order = np.lexsort((-np.asarray(confidences), exits))  # by exit, then by descending confidence
    half = min(columns * rows, len(order) // 2)
    columns = min(columns, half)
    rows = -(-half // columns)
    figure, axes = panels(2 * rows, columns, caption=0.33 if truths is not None else 0.19)
    for ax in axes.flat:
        ax.set_axis_off()
    for half_axes, indices, description in (
        (axes[:rows], order[:half], "early, the surest first"),
        (axes[rows:], order[: -half - 1 : -1], "late, the least sure first"),
    ):
        for ax, i in zip(half_axes.flat, indices):
            ax.imshow(as_picture(images[i]), interpolation="nearest")
            correct = labels[i] == targets[i]
            truth = "" if correct else f"\ntruth: {targets[i]}"
            ax.annotate(
                f"{labels[i]} · {100 * confidences[i]:.0f} %{truth}",
                (0.5, 0),
                (0, -2),
                "axes fraction",
                "offset points",
                ha="center",
                va="top",
                fontsize="x-small",
                color="black" if correct else RED,
            )
        half_axes[0, 0].set_title(f"{_exit_range(np.asarray(exits)[indices])} · {description}", loc="left", fontsize="small", color=BLUE)
    return figure


def _exit_range(exits: np.ndarray) -> str:
    first, last = exits.min() + 1, exits.max() + 1
    return f"exit {first}" if first == last else f"exits {first} to {last}"
