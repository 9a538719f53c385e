"""Checkpoints: files from which a training goes on. The last two are in the folder `checkpoints` of the run.

step-00000120.safetensors   the state after 120 optimizer steps: arrays by name, and in the metadata as JSON what else there is to know
                            ("checkpoint"), and a checksum of all of it ("checksum")
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from ..data.dataset import hash_of
from ..errors import UserError
from ..files import atomic_file, remove_abandoned, sync_folder, writing
from ..progress import say
from ..schema import parse_json
from .weights import read_safetensors

CHECKPOINTS = "checkpoints"
KEPT = 2  # checkpoints


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    step: int  # optimizer steps so far
    arrays: dict[str, np.ndarray]
    about: dict[str, Any]  # what else there is to know: values of JSON


class Checkpoints:
    """The checkpoints of a run.

    folder: where they lie. good: the paths of those that are kept, from the oldest to the newest.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / CHECKPOINTS
        self.good: list[Path] = []

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and then delete all but the last two. Raises UserError; those of before are then kept."""
        path = self.folder / f"step-{checkpoint.step:08}.safetensors"
        about = json.dumps(checkpoint.about, ensure_ascii=False, allow_nan=False)
        metadata = {"checkpoint": about, "checksum": _checksum(checkpoint.arrays, about)}
        content = save(checkpoint.arrays, metadata)
        with writing(self.folder):
            remove_abandoned(self.folder)
            with atomic_file(path, durable=True) as file:
                file.write(content)
        self.good = [*(p for p in self.good if p != path), path][-KEPT:]
        for _, other in self._files():
            if other not in self.good:
                with suppress(OSError):  # the new one counts
                    other.unlink()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None if there is none at all. A line names each one that is damaged.

        Raises UserError if all are damaged.
        """
        files = sorted(self._files(), reverse=True)
        for number, (step, path) in enumerate(files, 1):
            try:
                checkpoint = _read(path, step)
            except UserError as error:
                if number == len(files):
                    raise UserError(f"{error}; delete {self.folder} to train the run again from its beginning") from error
                say(f"{error}; the checkpoint before it is taken")
            else:
                self.good = [path for _, path in sorted(files[number - 1 :])]
                return checkpoint
        return None

    def exist(self) -> bool:
        """Whether there is one, damaged or not."""
        return next(self._files(), None) is not None

    def moved(self, run: Path) -> None:
        """Take note that the folder is now that of another run folder."""
        self.folder = run / CHECKPOINTS
        self.good = [self.folder / path.name for path in self.good]

    def replace(self, new: Path) -> None:
        """Put a folder of other checkpoints in the place of these, but keep files of others. May be repeated if it was cut short."""
        if self.folder.is_dir():
            remove_abandoned(self.folder)
            for _, path in self._files():
                path.unlink()
            for path in self.folder.iterdir():
                os.replace(path, new / path.name)
            self.folder.rmdir()
        if any(new.iterdir()):
            os.rename(new, self.folder)
        else:
            new.rmdir()

    def remove(self) -> None:
        """Delete all checkpoints, when the files of the run that replace them are on the disk. Raises UserError."""
        if self.folder.is_dir():
            with writing(self.folder):
                sync_folder(self.folder.parent)
                remove_abandoned(self.folder)
                for _, path in self._files():
                    path.unlink()
                with suppress(OSError):  # there may be files of others
                    self.folder.rmdir()

    def _files(self) -> Iterator[tuple[int, Path]]:
        """(step, path) of each."""
        for path in list(self.folder.glob("step-*.safetensors")):
            if match := re.fullmatch(r"step-(\d{1,18})\.safetensors", path.name):
                yield int(match[1]), path


def _checksum(arrays: Mapping[str, np.ndarray], about: str) -> str:
    parts: list[Any] = [about]
    for name in sorted(arrays):
        parts += [name, arrays[name].dtype.str, arrays[name].shape, arrays[name]]
    return hash_of(parts)


def _read(path: Path, step: int) -> Checkpoint:
    try:
        arrays, metadata = read_safetensors(path)
    except UserError as error:
        raise UserError(str(error).removesuffix(": get or make it again")) from error
    about = metadata.get("checkpoint", "")
    if metadata.get("checksum") != _checksum(arrays, about):
        raise UserError(f"{path} is damaged: its checksum is not that of its content")
    content = parse_json(about, f"{path}: its content")
    if not isinstance(content, dict):
        raise UserError(f"{path} is no checkpoint of minivit")
    return Checkpoint(step, arrays, content)
