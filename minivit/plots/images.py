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
    """Images that leave a cascade early, the surest first, above those that leave it late, the least sure first (2105.15075, section 4).

    images: (B, H, W, C) uint8, or floating in 0..1; C is 1 or 3. exits: (B,) integers from 0. confidences: (B,) 0..1, of the answer given.
    labels: the B answers. truths: what the images show; an answer that differs is red, with the truth below it.
    columns, rows: of each of the two halves, which become smaller rather than show an image twice.
    Raises UserError where there are fewer than two images, or these do not all have the same length.
    """
    shows = labels if truths is None else truths
    if len(images) < 2 or {len(exits), len(confidences), len(labels), len(shows)} != {len(images)}:
        raise UserError(
            f"an exit sheet takes two images or more with an exit, a confidence and a label each, got {len(images)} images, "
            f"{len(exits)} exits, {len(confidences)} confidences, {len(labels)} labels"
        )
    order = np.lexsort((-np.asarray(confidences), exits))  # the surest of the first exit ... the least sure of the last
    half = min(columns * rows, len(order) // 2)
    columns = min(columns, half)
    rows = -(-half // columns)
    figure, axes = panels(2 * rows, columns, caption=0.33 if truths is not None else 0.19)
    for one in axes.flat:
        one.set_axis_off()
    for part, chosen, told in (
        (axes[:rows], order[:half], "early, the surest first"),
        (axes[rows:], order[: -half - 1 : -1], "late, the least sure first"),
    ):
        for one, i in zip(part.flat, chosen):
            one.imshow(as_picture(images[i]), interpolation="nearest")
            right = labels[i] == shows[i]
            truth = "" if right else f"\ntruth: {shows[i]}"
            one.annotate(
                f"{labels[i]} · {100 * confidences[i]:.0f} %{truth}",
                (0.5, 0),
                (0, -2),
                "axes fraction",
                "offset points",
                ha="center",
                va="top",
                fontsize="x-small",
                color="black" if right else RED,
            )
        part[0, 0].set_title(f"{_exits_named(np.asarray(exits)[chosen])} · {told}", loc="left", fontsize="small", color=BLUE)
    return figure


def _exits_named(exits: np.ndarray) -> str:
    first, last = exits.min() + 1, exits.max() + 1
    return f"exit {first}" if first == last else f"exits {first} to {last}"
