"""A run that goes on where it was stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import metadata
from typing import Any

import numpy as np

from ..errors import UserError, nearest, shown
from ..files import user_path
from ..io.checkpoints import Checkpoint
from ..io.model_file import load_model, reading
from ..io.run_folder import CONFIG, CURVES, MODEL, RunFolder
from ..progress import say
from ..schema import checked, record
from ..version import __version__
from .checkpoints import Progressed
from .finetuning import freeze_names
from .loop import Loop
from .options import OF_A_PROCESS, TrainOptions, repeatable

EXTENDED = "extended"  # of config.json: the epochs that an extended run had before, and how many steps it had made then
REMEDY = "train another run"


@dataclass(frozen=True)
class Stopped:
    """A stopped run, whose folder is locked.

    options: those with which it was begun, and of the process that goes on. epochs: how many there are to be in all, others than those of
    `options` for a run that is extended. checkpoint, about: from where it goes on; None: from the beginning.
    """

    folder: RunFolder
    options: TrainOptions
    epochs: int
    checkpoint: Checkpoint | None
    about: Progressed | None

    def begin(self, loop: Loop) -> None:
        """Bring a loop to where the run was stopped. Raises UserError if its data is other data."""
        loop.is_resumed = True
        if self.checkpoint and self.about:
            loop.restore(self.checkpoint, self.about)
        epoch, batch = divmod(loop.steps, len(loop.batches))
        place = (
            f"goes on after {epoch} of {self.epochs} epochs and {batch} steps" if self.checkpoint else "has no checkpoint: it begins again"
        )
        say(f"{self.folder.path} {place}", self.options.progress)
        extended = self.folder.config.get(EXTENDED)
        if extended and self.about and extended != self.about.config.get(EXTENDED):
            extended[-1]["steps"] = loop.steps
            loop.checkpoint()


def find_stopped(model: Any, data: Any, given: Mapping[str, Any]) -> Stopped:
    """The run of the folder given["resume"]. model, data, given: the arguments of `train`.

    Raises UserError if there is none, if it is complete and not to be extended, if all its checkpoints are damaged, and for arguments that
    are others than the run's.
    """
    folder = RunFolder.reopen(user_path(checked("resume", given["resume"], str | os.PathLike[str])))
    try:
        return _stopped(folder, {"model": model, "data": data, **given})
    except BaseException:
        folder.close()
        raise


def _stopped(folder: RunFolder, given: dict[str, Any]) -> Stopped:
    checkpoint = folder.checkpoints.latest()
    about = None
    if checkpoint:
        with reading(folder.checkpoints.good[-1], REMEDY):
            about = record(Progressed, checkpoint.about)
    config = dict(about.config) if about else folder.read_config()
    with reading(folder.path / CONFIG, REMEDY):
        arguments = dict(checked("arguments", config.get("arguments"), Mapping[str, Any]))
        epochs = checked("arguments.epochs", arguments.get("epochs"), int)
        extended = [dict(each) for each in checked(EXTENDED, config.get(EXTENDED, []), tuple[Mapping[str, Any], ...])]
        unknown = next((name for name in arguments if name not in {item.name for item in fields(TrainOptions)}), None)
        if unknown:
            raise UserError(f"this version of minivit has no argument {unknown!r}")
    wanted = given.get("epochs") or epochs
    if not isinstance(wanted, int) or wanted < epochs:
        raise UserError(
            f"epochs must be at least the {epochs} of {folder.path}, not {shown(wanted)}: leave it out, or give more to extend it"
        )
    _check_unfinished(folder, checkpoint, epochs, wanted)
    _check_given(given, arguments, folder)
    _tell_versions(config)
    options = _options(folder, given, arguments, config, about)
    if extended:
        options = replace(options, epochs=checked(f"{EXTENDED}[0].epochs", extended[0].get("epochs"), int))
    if wanted > epochs:
        config |= {"arguments": arguments | {"epochs": wanted}, EXTENDED: [*extended, {"epochs": epochs, "steps": 0}]}
    folder.config = config
    return Stopped(folder, options, wanted, checkpoint, about)


def _check_unfinished(folder: RunFolder, checkpoint: Checkpoint | None, epochs: int, wanted: int) -> None:
    history = folder.read_metrics()
    is_finished = bool(history) and history[-1]["epoch"] == epochs and history[-1].get("test_accuracy") is not None
    if not is_finished or (checkpoint and wanted > epochs):
        return
    if checkpoint and not (folder.path / CURVES).exists():  # it was stopped after its last test
        return
    if wanted > epochs:
        raise UserError(
            f"{folder.path} is complete and has no checkpoint, which keep_checkpoint (--keep-checkpoint) keeps, so it cannot be extended: "
            "train its model further with train(model=minivit.load(...))"
        )
    raise UserError(f"{folder.path} is complete: all {epochs} epochs are trained")


def _check_given(given: Mapping[str, Any], arguments: Mapping[str, Any], folder: RunFolder) -> None:
    """Raises UserError for an argument that is another one than the run's."""
    defaults = {item.name: item.default for item in fields(TrainOptions)}
    for name, value in given.items():
        if name not in defaults:
            raise UserError(f"train has no option {name!r}{nearest(name, defaults)}")
        if name in (*OF_A_PROCESS, "epochs"):
            continue
        if name == "data":
            value = repeatable(value)
            if value in (defaults[name], arguments.get(name)):  # of arrays the hash is compared
                continue
        elif name in ("model", "model_options") and not value:
            continue
        elif name == "out" and value is not None:
            value, arguments = user_path(value).resolve(), {**arguments, "out": folder.path.resolve()}
        if name not in arguments or _as_json(value) != arguments[name]:
            known = f"{name}={shown(arguments[name])}" if name in arguments else f"no {name}"
            raise UserError(f"{folder.path} was begun with {known}, not {shown(value)}: leave {name} out, as resume changes epochs alone")


def _as_json(value: Any) -> Any:
    return [_as_json(each) for each in value] if isinstance(value, (list, tuple)) else value


def _tell_versions(config: Mapping[str, Any]) -> None:
    versions = {"minivit": __version__, "numpy": np.__version__, "numba": metadata.version("numba")}
    for name, version in versions.items():
        if config.get(name) != version:
            say(f"the run was begun with {name} {config.get(name)} and goes on with {version}: it may not be the same bit for bit")


def _options(
    folder: RunFolder, given: Mapping[str, Any], arguments: dict[str, Any], config: Mapping[str, Any], about: Progressed | None
) -> TrainOptions:
    """The options with which the run was begun, and of this process. Raises UserError if they are damaged, or the data is not recorded."""
    own = {name: given[name] for name in OF_A_PROCESS if name in given}
    if arguments.get("data") is None:
        if repeatable(given["data"]) is not None:
            raise UserError(f"{folder.path} was trained on arrays, which are not kept: give the same ones as data to resume it")
        own["data"] = given["data"]
    if config.get("model_given"):
        _check_first_weights(about, folder)
        own["model"], _ = load_model(folder.path / MODEL)
        freeze_names(own["model"], about.frozen if about else ())
    elif arguments.get("weights") is not None:  # what is frozen of them is in the run's own model too, and the rest in the checkpoint
        _check_first_weights(about or not folder.read_metrics(), folder)
        own |= {"model": None, "weights": folder.path / MODEL}
    with reading(folder.path / CONFIG, REMEDY):
        return TrainOptions(**arguments | own | {"out": folder.path})


def _check_first_weights(known: Any, folder: RunFolder) -> None:
    if not known:
        raise UserError(f"{folder.path} began with weights that no seed makes, and no checkpoint has them: {REMEDY}")
