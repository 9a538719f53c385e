"""Pictures of how predictions compare with the truth: confusion matrices, reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError, printable
from ..inference.metrics import Reliability
from .figure import BLUE, RED, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED, NAMED = 25, 60  # classes up to which a confusion matrix has numbers in it, and names beside it
TICKS = (0, 0.5, 1)
LONGEST = 20  # characters of a name


def confusion_picture(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """A confusion matrix (K, K) of truths (rows) and predictions (columns); a colour is the share of its row.

    Numbers are written in up to 25 classes, names beside up to 60. Raises UserError if there is not one name for each class.
    """
    classes = len(confusion)
    if len(class_names) != classes:
        raise UserError(f"class_names holds {len(class_names)} names for a confusion matrix of {classes} classes")
    size = min(9.0, 2.2 + 0.36 * classes)
    figure = new_figure(size, size)
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)  # (K, K)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="prediction", ylabel="truth")
    if classes <= NAMED:
        names = [_short(name) for name in class_names]
        fontsize = 9 if classes <= NUMBERED else 5.5
        axes.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=fontsize)
        axes.set_yticks(range(classes), names, fontsize=fontsize)
    if classes <= NUMBERED:
        for row, column in np.argwhere(confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{confusion[row, column]}", ha="center", va="center", color=colour, fontsize=8)
    axes.tick_params(length=0)
    return figure


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def reliability_diagram(parts: Mapping[str, Reliability]) -> Figure:
    """Accuracy against confidence, by bins of confidence (1706.04599, Figure 1), and the share of images in each bin; side by side.

    parts: what is drawn, by title. In red, by how much confidence exceeds accuracy or falls short of it.
    """
    figure = new_figure(4.2 * len(parts), 4.6)
    upper, lower = figure.subplots(2, len(parts), squeeze=False, sharex=True, height_ratios=(3, 1))
    for accuracy_axes, count_axes, (title, result) in zip(upper, lower, parts.items()):
        bins, there = len(result.counts), result.counts > 0
        middles, accuracies = (np.arange(bins)[there] + 0.5) / bins, result.accuracies[there]
        accuracy_axes.bar(middles, accuracies, 0.92 / bins, color=BLUE, label="accuracy")
        gaps = result.confidences[there] - accuracies
        accuracy_axes.bar(middles, gaps, 0.92 / bins, accuracies, color="none", edgecolor=RED, hatch="////", linewidth=0.8, label="gap")
        accuracy_axes.plot([0, 1], [0, 1], color="#666666", linestyle="--", linewidth=1)
        accuracy_axes.set(xlim=(0, 1), ylim=(0, 1), xticks=TICKS, yticks=TICKS, ylabel="accuracy")
        accuracy_axes.set_title(title, fontsize="medium")
        accuracy_axes.legend(frameon=False, loc="upper left", fontsize="small")
        count_axes.bar((np.arange(bins) + 0.5) / bins, 100 * result.counts / result.counts.sum(), 0.92 / bins, color="#888888")
        count_axes.set(xlabel="confidence", ylabel="images, %")
    return figure
