"""Run folders and model files. All files are written atomically.

config.json         everything needed to repeat the run: the resolved arguments of `train`, versions, a one-line summary of the data
metrics.jsonl       one line per epoch: epoch, train_loss, test_loss, test_accuracy, learning_rate, seconds, images_per_second;
                    for a cascade also exit_accuracies
model.safetensors   the weights tested after the last finished epoch; its metadata contains, as JSON, the model's configuration
                    ("model"), "class_names", "preprocessing", "training_sketch" (`data/train_test_overlap.py`), and the
                    thresholds of a cascade ("calibration")
curves.png          the learning curves
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..errors import UserError, nearest
from ..files import atomic_file, user_path
from ..models import Model, outline
from ..schema import Checked, Fraction, Limits, Size, checked, parse_json, record
from .weights import read_safetensors, save_weights

CONFIG, METRICS, MODEL, CURVES = "config.json", "metrics.jsonl", "model.safetensors", "curves.png"
LARGEST_TEXT = 2**24  # bytes of config.json and metrics.jsonl, which take twenty times as much memory as Python's values


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert an OSError in the block into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was there before is kept") from error


@contextmanager
def reading(what: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Convert an error of the block about what a file says into a UserError that names the file, and ends with the way out."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {what}: {error.strerror or error}") from error
    except ValueError as error:  # UserError is one
        raise UserError(f"{what} is damaged: {error}: {remedy}") from error


# ----------------------------------------------------------------------------------------------------------------------- models
Name = Annotated[str, Limits(most=100)]  # of a model: pictures have it in their titles


def save_model(path: str | os.PathLike[str], model: Model, about: Mapping[str, Any]) -> None:
    """Write a model with its configuration and the metadata `about`, whose values JSON can represent. Raises UserError."""
    save_weights(model, path, {key: json.dumps(value, ensure_ascii=False) for key, value in about.items()})


def load_model(path: Path) -> tuple[Model, dict[str, Any]]:
    """(model in evaluation mode, `about`) from a file written by `save_model`. Raises UserError."""
    state, metadata = read_safetensors(path)
    if "model" not in metadata:
        raise UserError(f"{path} does not say which model its weights are of: create that, and use load_weights")
    with reading(path, "get or make it again, or create the model and use load_weights"):
        config = dict(checked("model", parse_json(metadata["model"], "model"), Mapping[str, Any]))
        family, name = (checked(f"model.{key}", config.pop(key, None), Name) for key in ("family", "name"))
        model = outline(family, config, most=len(state))  # nothing is allocated before the shapes are known to be those of the file
        model.name = name
        model.check_state_dict(state)
        model.allocate()
        model.load_state_dict(state)
        model.restore(model.read_metadata(metadata), own_file=True)
        about = metadata.keys() - model.metadata().keys() - {"format", "version", "model"}
        return model, {key: parse_json(metadata[key], key) for key in about}


def find_model(path: Path) -> Path:
    """The model file for a run folder, a name in runs/, or the file itself. Raises UserError, with the nearest names."""
    path = user_path(path)
    folder = next((p for p in (path, Path("runs") / path) if p.is_dir()), None)
    if folder:
        if not (folder / MODEL).is_file():
            raise UserError(f"{folder} is no run folder: it has no {MODEL}")
        return folder / MODEL
    if path.is_file():
        return path
    parent = path.parent if path.parent != Path() else Path("runs")
    runs = sorted(p.parent.name for p in parent.glob(f"*/{MODEL}")) if parent.is_dir() else []
    raise UserError(f"there is no run {path}{nearest(path.name, runs)}: give a run folder, or a .safetensors file that minivit wrote")


# ------------------------------------------------------------------------------------------------------------------ run folders
Loss = Annotated[float, Limits(0, 1e30)]


@dataclass(frozen=True)
class Epoch(Checked):
    """What every line of metrics.jsonl says; a line may say more."""

    epoch: Size
    train_loss: Loss
    test_loss: Loss
    test_accuracy: Fraction


class RunFolder:
    """The folder of one run.

    path: its path. history: the lines of metrics.jsonl written so far.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.history: list[dict[str, Any]] = []

    @classmethod
    def create(cls, out: str | os.PathLike[str] | None, name: str, overwrite: bool = False) -> RunFolder:
        """Create an empty run folder: `out`, or runs/<name>-<n> with the first unused number.

        With `overwrite`, the files of an earlier run are deleted, and all others are kept. Raises UserError like `check_free`.
        """
        if out is None:
            return cls(_create_numbered(Path("runs"), name))
        check_free(out, overwrite)
        path = user_path(out)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            for file in (CONFIG, METRICS, MODEL, CURVES):
                (path / file).unlink(missing_ok=True)
        return cls(path)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json. Raises UserError."""
        self._write(CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def read_config(self) -> dict[str, Any]:
        """The content of config.json. Raises UserError if it is missing or damaged."""
        with reading(self.path / CONFIG, f"give the data, which {CONFIG} is read for, or train again"):
            return dict(checked("its content", parse_json(self._read(CONFIG), "its text"), Mapping[str, Any]))

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append a line to the history and to metrics.jsonl. Raises UserError."""
        self.history.append(dict(line))
        self._write(METRICS, "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in self.history))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; empty if there is no such file. Raises UserError if it is damaged."""
        path, lines = self.path / METRICS, []
        with reading(path, "remove the line, or the file, which only the learning curves need"):
            for number, text in enumerate(self._read(METRICS).splitlines() if path.exists() else (), 1):
                lines.append(parse_json(text, f"line {number}"))
                record(Epoch, lines[-1], f"line {number}")
        return lines

    def _read(self, name: str) -> str:
        size = (self.path / name).stat().st_size
        if size > LARGEST_TEXT:
            raise ValueError(f"it has {size:,} bytes, more than the {LARGEST_TEXT:,} of any run")
        return (self.path / name).read_text(encoding="utf-8")

    def _write(self, name: str, text: str) -> None:
        with writing(self.path / name), atomic_file(self.path / name) as file:
            file.write(text.encode())


def check_free(out: str | os.PathLike[str] | None, overwrite: bool) -> None:
    """Raises UserError if `out` exists, unless it is an empty folder, or any folder with `overwrite`."""
    path = user_path(out) if out is not None else None
    if path and path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
        hint = ", or overwrite=True (--overwrite) to replace its run" if path.is_dir() else ""
        raise UserError(f"{path} exists already: give another folder as out (--out){hint}")


def _create_numbered(parent: Path, name: str) -> Path:
    number = 1
    with writing(parent / name):
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            path = parent / f"{name}-{number}"
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
