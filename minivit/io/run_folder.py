"""Run folders. All files are written atomically, and the files of a run together.

config.json         everything needed to repeat the run: the resolved arguments of `train`, versions, a one-line summary of the data
metrics.jsonl       one line per epoch that was tested: epoch, train_loss, test_loss, test_accuracy, learning_rate, seconds,
                    images_per_second; for a cascade also exit_accuracies. Where a validation part decides which weights are kept:
                    validation_loss and validation_accuracy, and at the end a line of the weights that were kept, with the test's too
model.safetensors   the weights tested after the last finished epoch, or those that did best on the validation part; its metadata
                    contains, as JSON, the model's configuration ("model"), "class_names", "preprocessing", "training_sketch"
                    (`data/train_test_overlap.py`), and the thresholds of a cascade ("calibration")
curves.png          the learning curves, drawn at the end
report.html         what a run came to, written at the end (`reports/`)
metrics.csv         the lines of metrics.jsonl as a table, written at the end
checkpoints         a folder from whose files a stopped training goes on (`io/checkpoints.py`)

The first three are replaced together. They are first written into the folder `.new.part` in the run folder, which then gets the name
`.new`: from then on they count, also if the process is killed before it has moved each of them to its place. Whoever reads the run, or
trains into the folder, moves the rest. A run that replaces an earlier one lies in the folder `.next` until its first epoch is saved, with
its checkpoints; then, or when it is resumed, `.next` gets the name `.new`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest, reason
from ..files import atomic_file, lock, open_regular, remove_abandoned, user_path, writing
from ..interrupts import deferred
from ..progress import say_once
from ..schema import checked, parse_json, record
from .checkpoints import CHECKPOINTS, Checkpoint, Checkpoints
from .metrics import Tested, Validated, table_of
from .model_file import reading

CONFIG, METRICS, MODEL, CURVES, TABLE = "config.json", "metrics.jsonl", "model.safetensors", "curves.png", "metrics.csv"
REPORT = "report.html"
RUN_FILES = (CONFIG, METRICS, MODEL, CURVES, TABLE, REPORT)
PART, COMPLETE = ".new.part", ".new"  # folders of files that are being written, and of files that are all written
NEXT = ".next"  # a folder of the run that will replace that of the run folder
LARGEST_TEXT = 2**24  # bytes of config.json and metrics.jsonl, which take twenty times as much memory as Python's values


def find_model(path: Path) -> Path:
    """The model file for a run folder, a name in runs/, or the file itself. Raises UserError, with the nearest names."""
    path = user_path(path)
    folder = next((p for p in (path, Path("runs") / path) if p.is_dir()), None)
    _finish_replacement(folder or path.parent)
    if folder:
        if not (folder / MODEL).is_file():
            raise UserError(f"{folder} is no run folder: it has no {MODEL}")
        return folder / MODEL
    if path.is_file():
        return path
    parent = path.parent if path.parent != Path() else Path("runs")
    runs = sorted(p.parent.name for p in parent.glob(f"*/{MODEL}")) if parent.is_dir() else []
    raise UserError(f"there is no run {path}{nearest(path.name, runs)}: give a run folder, or a .safetensors file that minivit wrote")


class RunFolder:
    """The folder of one run.

    path: its path. config: the content of its config.json. history: the lines of its metrics.jsonl so far. checkpoints: those of the run.
    replaces: whether it holds an earlier run, which is kept until the first epoch is saved; the checkpoints are in NEXT meanwhile.
    """

    keeps_files = True  # whether there is such a folder

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> None:
        self.path, self.config = Path(path), dict(config or {})
        self.history: list[dict[str, Any]] = []
        self.checkpoints = Checkpoints(self.path)
        self.replaces = False
        self._epochs = 0  # after which the model was saved that the folder holds
        self._descriptor: int | None = None  # of the locked folder

    @classmethod
    def create(cls, out: str | os.PathLike[str] | None, name: str, config: Mapping[str, Any], overwrite: bool = False) -> RunFolder:
        """Create and lock a run folder: `out`, or runs/<name>-<n> with the first unused number.

        With `overwrite`, the files of an earlier run are replaced when those of this run are saved after an epoch, and all others are kept.
        Raises UserError like `check_free`, and if another training has locked the folder.
        """
        check_free(out, overwrite)
        folder = cls(_create_numbered(Path("runs"), name) if out is None else user_path(out), config)
        try:
            with writing(folder.path):
                folder._hold()
                if out is not None:
                    check_free(out, overwrite)  # another training may have filled it since
                folder._clean()
                shutil.rmtree(folder.path / NEXT, ignore_errors=True)
                folder.replaces = any((folder.path / file).exists() for file in RUN_FILES) or folder.checkpoints.exist()
                if folder.replaces:
                    folder.checkpoints = Checkpoints(folder.path / NEXT)
        except BaseException:
            folder.close()
            raise
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Lock the folder of a run that is to go on: the folder, or its name in runs/. Its config is left empty.

        A run that was stopped in its first epoch, and has a checkpoint, replaces the earlier run now. Raises UserError if the folder does
        not exist, if another training has locked it, and if all checkpoints of a run that is to replace another are damaged.
        """
        folder = cls(next((p for p in (path, Path("runs") / path) if p.is_dir()), None) or find_model(path).parent)
        try:
            with writing(folder.path):
                folder._hold()
                folder._clean()
                folder._begin_replacement()
            folder._epochs = max((line["epoch"] for line in folder.read_metrics()), default=0)
        except BaseException:
            folder.close()
            raise
        return folder

    def close(self) -> None:
        """Let other trainings use the folder."""
        if self._descriptor is not None:
            if self.replaces and not self.checkpoints.exist():
                shutil.rmtree(self.path / NEXT, ignore_errors=True)  # the run never began
            os.close(self._descriptor)
            self._descriptor = None

    __del__ = close  # after an interrupt between its creation and the first epoch

    def begin(self, save_model: Callable[[Path], None]) -> None:
        """Save the model before the first epoch, which makes the folder usable, and tells of a full disk early.

        Where there is an earlier run, the files are in NEXT until the first epoch is saved. Raises UserError like `save`.
        """
        self._save(save_model, [])

    def save(self, save_model: Callable[[Path], None], line: Mapping[str, Any]) -> None:
        """Add a line to the history, and replace the files of the run, or of an earlier one, together.

        save_model: writes the model to a path. Raises UserError if the files cannot be written; those of before are then kept.
        """
        self._save(save_model, [*self.history, dict(line)])

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint. Raises UserError if that fails; the earlier ones are then kept."""
        with writing(self.path):
            self._hold()
        self.checkpoints.save(checkpoint)

    def save_table(self) -> None:
        """Write the history as a table of comma-separated values. Raises UserError if that fails."""
        with writing(self.path):
            _write(self.path / TABLE, table_of(self.history))

    def is_usable(self) -> bool:
        """Whether the folder holds a model."""
        return (self.path / MODEL).is_file()

    def state(self, epochs: int) -> str:
        """What the folder holds, for a message."""
        if not self.is_usable():
            return f"{self.path} holds no model"
        if self.replaces:
            return f"{self.path} holds the earlier run as it was"
        return f"{self.path} holds the model after {self._epochs} of {epochs} epochs"

    def read_config(self) -> dict[str, Any]:
        """The content of config.json. Raises UserError if it is missing or damaged."""
        with reading(self.path / CONFIG, f"give the data, which {CONFIG} is read for, or train again"):
            return dict(checked("its content", parse_json(self._read(CONFIG), "its text"), Mapping[str, Any]))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; empty if there is no such file. Raises UserError if it is damaged."""
        path, lines = self.path / METRICS, []
        with reading(path, "remove the line, or the file, which only the learning curves need"):
            for number, text in enumerate(self._read(METRICS).splitlines() if path.exists() else (), 1):
                lines.append(parse_json(text, f"line {number}"))
                is_validated = isinstance(lines[-1], dict) and "validation_loss" in lines[-1]
                record(Validated if is_validated else Tested, lines[-1], f"line {number}")
        return lines

    def _read(self, name: str) -> str:
        with open_regular(self.path / name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_TEXT:
                raise ValueError(f"it has {size:,} bytes, more than the {LARGEST_TEXT:,} of any run")
            return file.read().decode()

    def _clean(self) -> None:
        """Delete what killed processes have left."""
        for file in RUN_FILES:
            remove_abandoned(self.path, file)
        shutil.rmtree(self.path / PART, ignore_errors=True)

    def _hold(self) -> None:
        """Create and lock the folder, also if it has been deleted meanwhile. Raises UserError if another training has locked it."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._descriptor is None or not os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
            self.close()
            try:
                self._descriptor = _locked_folder(self.path)
            except BlockingIOError:
                raise UserError(f"another training is writing to {self.path}: give another folder as out (--out)") from None
        _move_new_files(self.path)

    def _save(self, save_model: Callable[[Path], None], history: list[dict[str, Any]]) -> None:
        part, next_run = self.path / PART, self.path / NEXT
        with deferred(), writing(self.path):
            self._hold()
            part.mkdir()
            try:
                _write(part / CONFIG, json.dumps(self.config, indent=2, ensure_ascii=False) + "\n")
                if history:
                    _write(part / METRICS, "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in history))
                save_model(part / MODEL)
                if self.replaces:
                    (next_run / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
                    _move((MODEL, METRICS, CONFIG), part, next_run)
                    if history:
                        os.rename(next_run, self.path / COMPLETE)
                        self.checkpoints.moved(self.path)
                        self.replaces = False
                else:
                    os.rename(part, self.path / COMPLETE)
                self.history, self._epochs = history, history[-1]["epoch"] if history else 0
            finally:
                shutil.rmtree(part, ignore_errors=True)
            _move_new_files(self.path)

    def _begin_replacement(self) -> None:
        """Put a run that was to replace that of the folder, and has a checkpoint, in its place; delete one that has none."""
        if Checkpoints(self.path / NEXT).latest():
            os.rename(self.path / NEXT, self.path / COMPLETE)
            _move_new_files(self.path)
        else:
            shutil.rmtree(self.path / NEXT, ignore_errors=True)


class Unsaved(RunFolder):
    """The history of a run of which nothing is written; it has no path."""

    keeps_files = False

    def __init__(self) -> None:
        super().__init__(os.devnull)

    def begin(self, save_model: Callable[[Path], None]) -> None:
        pass

    def save(self, save_model: Callable[[Path], None], line: Mapping[str, Any]) -> None:
        self.history.append(dict(line))

    def is_usable(self) -> bool:
        return True

    def state(self, epochs: int) -> str:
        return "nothing is saved"


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _locked_folder(folder: Path) -> int:
    """A descriptor, until the closing of which, or the end of the process, the folder is locked. Raises BlockingIOError if it is locked."""
    if sys.platform == "win32":  # folders cannot be locked there
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        say_once(f"the file system of {folder} has no locks ({reason(error)}): nothing stops a second training into this folder")
    return descriptor


def _finish_replacement(folder: Path) -> None:
    """Do what a training that was killed while it replaced files left to do. Raises UserError."""
    if (folder / COMPLETE).is_dir():
        with writing(folder), suppress(BlockingIOError):  # a training that still runs does it itself
            descriptor = _locked_folder(folder)
            try:
                _move_new_files(folder)
            finally:
                os.close(descriptor)


def _move_new_files(folder: Path) -> None:
    """Move the files of COMPLETE to their places; does nothing if there are none. The folder must be locked."""
    new = folder / COMPLETE
    if new.is_dir():
        for file in (CURVES, TABLE, REPORT):  # of the weights before
            (folder / file).unlink(missing_ok=True)
        if (new / CHECKPOINTS).is_dir():  # of another run than that of the folder
            (folder / METRICS).unlink(missing_ok=True)
            Checkpoints(folder).replace(new / CHECKPOINTS)
        _move((MODEL, METRICS, CONFIG), new, folder)
        new.rmdir()


def _move(files: Iterable[str], source: Path, target: Path) -> None:
    for file in files:
        if (source / file).exists():
            os.replace(source / file, target / file)


def check_free(out: str | os.PathLike[str] | None, overwrite: bool) -> None:
    """Raises UserError if `out` exists, unless it is an empty folder, or any folder with `overwrite`."""
    path = user_path(out) if out is not None else None
    if path and path.exists() and (not path.is_dir() or (not overwrite and any(p.name != PART for p in path.iterdir()))):
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
