"""Pictures: learning curves. Matplotlib is imported when one is drawn, and never opens a window."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAIN, TEST = "#4477aa", "#cc3311"                      # told apart by all kinds of colour vision (P. Tol)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn into memory by Agg without touching pyplot's state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def learning_curves(history: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Loss of training and testing (left), test accuracy in percent (right), by epoch.

    history: a mapping an epoch with epoch, train_loss, test_loss and test_accuracy (0..1), as `Run.history` and metrics.jsonl have it.
    The training loss is the one that was minimised, with smoothed and mixed labels; so it may lie above the test loss.
    Raises UserError where it is empty.
    """
    if not history:
        raise UserError("there are no learning curves before the first epoch has ended")
    figure = new_figure(9, 3.4)
    losses, accuracies = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in history]
    marker = "o" if len(history) == 1 else None         # a line through one point is invisible
    losses.plot(epochs, [line["train_loss"] for line in history], color=TRAIN, marker=marker, label="training, as minimised")
    losses.plot(epochs, [line["test_loss"] for line in history], color=TEST, marker=marker, label="test")
    losses.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, None))
    losses.legend(frameon=False)
    percent = [100 * line["test_accuracy"] for line in history]
    accuracies.plot(epochs, percent, color=TEST, marker=marker)
    accuracies.set(xlabel="epoch", ylabel="test accuracy, %")
    accuracies.annotate(f"{percent[-1]:.1f} %", (epochs[-1], percent[-1]), (-4, -6), textcoords="offset points", ha="right", va="top")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def save_learning_curves(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> Path:
    """Draw `learning_curves` into a PNG file."""
    save_figure(learning_curves(history, title), path)
    return Path(path)
