"""`compare`: the results of several runs side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import user_path, writing
from ..io.model_file import load_model
from ..io.run_folder import CONFIG, RunFolder, find_model
from ..plots.curves import compared_curves
from ..plots.figure import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Compared:
    """What is compared of one run; None where the run does not tell it."""

    run: str  # the name of its folder, or its path, if another has this name
    model: str
    data: str | None
    parameters: int
    macs: int  # multiply-adds an image, up to the last exit
    epochs: int  # that have ended
    minutes: float | None  # training and its tests
    images_per_second: float | None  # of training, the median of epochs
    test_accuracy: float | None  # in 0..1, as are all accuracies
    balanced_accuracy: float | None
    test_loss: float | None


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side."""

    runs: tuple[Compared, ...]
    options: Mapping[str, tuple[Any, ...]]  # the arguments of `train` in which they differ: one value for each run, None where it has none
    histories: Mapping[str, Sequence[Mapping[str, Any]]]  # the lines of metrics.jsonl by run

    def figure(self) -> Figure:
        """The learning curves of all runs (`plots.compared_curves`). Raises UserError if no run has finished an epoch."""
        return compared_curves(self.histories)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `figure` as a PNG file; returns its path."""
        file = user_path(path)
        with writing(file):
            save_figure(self.figure(), file)
        return file


def compare(*runs: str | os.PathLike[str]) -> Comparison:
    """The results of runs as their folders tell them; nothing is tested again.

    runs: folders, or their names in runs/; two or more. Raises UserError for fewer, for one that is given twice, and for one that is
    missing, damaged or a model file alone.
    """
    if len(runs) < 2:
        raise UserError(f"compare takes two runs or more, got {len(runs)}")
    files = [find_model(Path(run)) for run in runs]
    folders = [RunFolder(file.parent) for file in files]
    resolved = [folder.path.resolve() for folder in folders]
    twice = next((run for number, run in enumerate(runs) if resolved[number] in resolved[:number]), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice: give each run once")
    alone = next((run for run, folder in zip(runs, folders) if not (folder.path / CONFIG).is_file()), None)
    if alone is not None:
        raise UserError(f"{alone} has no {CONFIG}, which tells of the training: give a run folder that train wrote")
    names = [path.name for path in resolved]
    labels = [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names)]
    configs, histories = [folder.read_config() for folder in folders], [folder.read_metrics() for folder in folders]
    compared = tuple(map(_compared, labels, files, configs, histories))
    return Comparison(compared, _differing(configs), dict(zip(labels, histories)))


def _compared(label: str, file: Path, config: Mapping[str, Any], history: list[dict[str, Any]]) -> Compared:
    model, _ = load_model(file)
    last: Mapping[str, Any] = next((line for line in reversed(history) if line.get("test_loss") is not None), {})
    seconds, speeds = _numbers(history, "seconds"), _numbers(history, "images_per_second")
    summary = config.get("dataset")
    return Compared(
        label,
        model.name,
        summary.partition(":")[0] if isinstance(summary, str) else None,
        sum(p.size for p in model.distinct_parameters()),
        model.cost().total,
        max((line["epoch"] for line in history), default=0),
        round(sum(seconds) / 60, 2) if seconds else None,
        round(median(speeds), 1) if speeds else None,
        *(_number(last.get(name)) for name in ("test_accuracy", "balanced_accuracy", "test_loss")),
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _numbers(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [number for line in history if (number := _number(line.get(name))) is not None]


def _differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The arguments whose values are not the same in all, in the order of the first that has them."""
    arguments = [given if isinstance(given := config.get("arguments"), Mapping) else {} for config in configs]
    names = dict.fromkeys(name for given in arguments for name in given)
    values = {name: tuple(given.get(name) for given in arguments) for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}
