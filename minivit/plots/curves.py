"""Learning curves, accuracy against cost, and histograms of exits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import UserError
from .figure import BLUE, COLOURS, DASHES, RED, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_curves(history: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Training and test loss (left), test accuracy in percent (right), by epoch; those of a validation part, where there is one.

    history: one mapping per test with epoch, train_loss, test_loss and test_accuracy (0..1), as in `Run.history` and metrics.jsonl. With
    validation_loss and validation_accuracy in their place, these are drawn, and the test of a last line as a point.
    The training loss is the minimised one, with smoothed and mixed labels, and summed over the exits of a cascade; hence it may exceed the
    test loss, which is that of the last exit.
    Raises UserError if history is empty.
    """
    if not history:
        raise UserError("there are no learning curves before the first epoch has ended")
    figure = new_figure(9, 3.4)
    losses, accuracies = figure.subplots(1, 2)
    part = "validation" if "validation_loss" in history[0] else "test"
    final = history[-1] if part != "test" and "test_loss" in history[-1] else None
    history = history[:-1] if final else history
    epochs = [line["epoch"] for line in history]
    marker = "o" if len(history) == 1 else None  # a line through one point is invisible
    losses.plot(epochs, [line["train_loss"] for line in history], color=BLUE, marker=marker, label="training, as minimised")
    losses.plot(epochs, [line[f"{part}_loss"] for line in history], color=RED, marker=marker, label=part)
    losses.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, None))
    losses.legend(frameon=False)
    percent = [100 * line[f"{part}_accuracy"] for line in history]
    accuracies.plot(epochs, percent, color=RED, marker=marker)
    accuracies.set(xlabel="epoch", ylabel=f"{part} accuracy, %")
    told, place = f"{percent[-1]:.1f} %", (epochs[-1], percent[-1])
    if final:
        told, place = f"test {100 * final['test_accuracy']:.1f} %", (final["epoch"], 100 * final["test_accuracy"])
        accuracies.plot(*place, color=RED, marker="D")
    accuracies.annotate(told, place, (-4, -6), textcoords="offset points", ha="right", va="top")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def compared_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """The loss (left) and the accuracy in percent (right) on test or validation images of several runs, by epoch.

    histories: as for `learning_curves`, by the name of the run; those without an epoch are left out. Raises UserError if all are.
    """
    known = {name: history for name, history in histories.items() if history}
    if not known:
        raise UserError("there are no learning curves before the first epoch has ended")
    figure = new_figure(9, 3.4 + 0.2 * len(known))
    losses, accuracies = figure.subplots(1, 2)
    for number, (name, history) in enumerate(known.items()):
        part = "validation" if "validation_loss" in history[0] else "test"
        lines = history[:-1] if part != "test" and "test_loss" in history[-1] else history
        epochs = [line["epoch"] for line in lines]
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}
        style["marker"] = "o" if len(lines) == 1 else None
        losses.plot(epochs, [line[f"{part}_loss"] for line in lines], label=f"{name}, {part}", **style)
        accuracies.plot(epochs, [100 * line[f"{part}_accuracy"] for line in lines], **style)
    losses.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, None))
    accuracies.set(xlabel="epoch", ylabel="accuracy, %")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize="small")
    return figure


def save_learning_curves(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> Path:
    """Write `learning_curves` as a PNG file; returns its path."""
    save_figure(learning_curves(history, title), path)
    return Path(path)


def accuracy_cost_curve(
    cascade: Sequence[tuple[float, float]],
    exits: Sequence[tuple[float, float]],
    unit: Literal["macs", "ms", "share"] = "macs",
    title: str = "",
) -> Figure:
    """Accuracy in percent against mean cost per image: a curve for the cascade, a point for each exit alone (as in 2105.15075, section 4).

    cascade: (mean cost, accuracy 0..1) of the cascade for each budget, in any order. exits: (cost, accuracy) if all images leave at the
    first exit, the second, ... unit: of the costs: "macs" multiply-adds, "ms" milliseconds, "share" of the last exit's multiply-adds.
    Raises UserError if there are no points, and for another unit.
    """
    if not len(cascade) and not len(exits):
        raise UserError("there is no accuracy to draw: give points of a cascade, or of exits")
    factor, label = _scale(max(cost for cost, _ in (*cascade, *exits)), unit)
    figure = new_figure(5.6, 4)
    axes = figure.subplots()
    if len(cascade):
        costs, accuracies = np.array(sorted(cascade)).T
        axes.plot(costs / factor, 100 * accuracies, color=BLUE, marker="o", markersize=4, label="cascade, by budget", zorder=3)
    if len(exits):
        costs, accuracies = np.array(exits).T
        axes.plot(costs / factor, 100 * accuracies, color=RED, marker="D", linestyle="none", label="one exit alone", zorder=4)
        for k, (cost, accuracy) in enumerate(exits, 1):
            axes.annotate(
                f"exit {k}",
                (cost / factor, 100 * accuracy),
                (0, -8),
                textcoords="offset points",
                ha="center",
                va="top",
                color=RED,
                fontsize="small",
            )
    axes.set(xlabel=label, ylabel="accuracy, %", xlim=(0, None))
    axes.set_title(title, fontsize="medium")
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.25)
    return figure


def _scale(largest: float, unit: str) -> tuple[float, str]:
    """(divisor of the costs, label of the axis)."""
    if unit == "ms":
        return 1.0, "mean time an image, milliseconds"
    if unit == "share":
        return 0.01, "mean multiply-adds an image, % of the last exit's"
    if unit != "macs":
        raise UserError(f"unit must be 'macs', 'ms' or 'share', not {unit!r}")
    name, factor = next(
        (name, factor)
        for name, factor in (("billions", 1e9), ("millions", 1e6), ("thousands", 1e3), ("", 1.0))
        if largest >= factor or factor == 1
    )
    return factor, f"mean multiply-adds an image{', ' * bool(name)}{name}"


def exit_histogram(exits: np.ndarray, number: int, correct: np.ndarray | None = None, title: str = "") -> Figure:
    """The number of images that leave a cascade at each exit; with `correct`, separately for correct and wrong predictions.

    exits: (B,) integers from 0. number: number of exits. correct: (B,) bool. Raises UserError for no images, and for an invalid exit.
    """
    exits = np.asarray(exits)
    if not len(exits) or exits.min() < 0 or exits.max() >= number:
        raise UserError(f"exits must be one or more numbers in 0..{number - 1}, got {_range(exits)}")
    totals = np.bincount(exits, minlength=number)  # (number,)
    correct_counts = totals if correct is None else np.bincount(exits[np.asarray(correct, bool)], minlength=number)
    names = [f"exit {k}" for k in range(1, number + 1)]
    figure = new_figure(max(3.6, 1.2 * number + 1.2), 3.4)
    axes = figure.subplots()
    axes.bar(names, correct_counts, 0.7, color=BLUE, label="right")
    if correct is not None:
        axes.bar(names, totals - correct_counts, 0.7, bottom=correct_counts, color=RED, label="wrong")
        figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize="small")
    for k, (height, correct_count) in enumerate(zip(totals, correct_counts)):
        text = f"{100 * height / len(exits):.1f} %"
        if correct is not None and height:
            text += f"\n{100 * correct_count / height:.1f} % right"
        axes.annotate(text, (k, height), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize="small")
    axes.set(ylabel="images", ylim=(0, 1.2 * totals.max()))
    axes.set_title(title, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _range(numbers: np.ndarray) -> str:
    return f"{numbers.min()}..{numbers.max()}" if numbers.size else "none"
