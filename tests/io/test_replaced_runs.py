"""Run folders whose run is replaced by another: a kill at any moment leaves one of both whole."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from minivit import create_model
from minivit.io.checkpoints import CHECKPOINTS, Checkpoint, Checkpoints
from minivit.io.model_file import load_model, save_model
from minivit.io.run_folder import CONFIG, METRICS, MODEL, RunFolder, find_model


def epoch(number):
    """A line of metrics.jsonl."""
    return {"epoch": number, "train_loss": 2.0, "test_loss": 1.5, "test_accuracy": 0.25 * number}


@pytest.fixture
def model():
    return create_model("mixer_nano_patch2_8", num_classes=4, dim=16, depth=1)


def create(path, config, overwrite=False):
    return RunFolder.create(path, "name", config, overwrite)


@pytest.mark.parametrize("epoch_ends", [True, False], ids=["an epoch ends", "it is resumed"])
def test_a_kill_while_a_run_is_replaced_leaves_one_of_both_whole(tmp_path, monkeypatch, model, epoch_ends):
    def old_and_new(path):
        old = create(path, {"seed": 1})
        old.save(lambda file: save_model(file, model, {}), epoch(1))
        old.save_checkpoint(Checkpoint(5, {"a": np.ones(1)}, {"seed": 1}))
        old.close()
        (path / CHECKPOINTS / "notes.txt").write_text("mine")
        new = create(path, {"seed": 2}, overwrite=True)
        new.begin(lambda file: save_model(file, model, {}))
        new.save_checkpoint(Checkpoint(3, {"a": np.ones(1)}, {"seed": 2}))
        return new

    def change(function):
        def changing(*given, **options):
            changes.append(function)
            if len(changes) > number:
                raise SystemExit  # as if the process were killed
            return function(*given, **options)

        return changing

    number, found = 0, []
    while True:
        path = tmp_path / f"run{number}"
        new, changes = old_and_new(path), []
        if not epoch_ends:
            new.close()
        with monkeypatch.context() as patch, suppress(SystemExit):
            for where, name in ((os, "replace"), (os, "rename"), (Path, "rmdir"), (Path, "unlink")):
                patch.setattr(where, name, change(getattr(where, name)))
            if epoch_ends:
                new.save(lambda file: save_model(file, model, {}), epoch(1))
            else:
                RunFolder.reopen(path).close()
        new.close()
        find_model(path)
        seed, checkpoint = RunFolder(path).read_config()["seed"], Checkpoints(path).latest()
        load_model(path / MODEL)
        assert (checkpoint.step, checkpoint.about) == ((5, {"seed": 1}) if seed == 1 else (3, {"seed": 2}))
        assert RunFolder(path).read_metrics() == ([epoch(1)] if seed == 1 or epoch_ends else [])
        assert (path / CHECKPOINTS / "notes.txt").read_text() == "mine"
        found.append(seed)
        if len(changes) <= number:
            break
        number += 1
        again = RunFolder.reopen(path)  # either way the new run goes on
        assert again.checkpoints.latest().about == {"seed": 2}
        again.close()
        assert not (path / ".next").exists() and RunFolder(path).read_config()["seed"] == 2
    assert found == sorted(found) and set(found) == {1, 2} and len(found) > 5


def test_a_run_that_has_no_checkpoint_yet_replaces_none(tmp_path, model):
    create(tmp_path / "run", {"seed": 1}).save(lambda file: save_model(file, model, {}), epoch(1))
    new = create(tmp_path / "run", {"seed": 2}, overwrite=True)
    new.begin(lambda file: save_model(file, model, {}))
    os.close(new._descriptor)  # as if the process were killed
    new._descriptor = None
    again = RunFolder.reopen(tmp_path / "run")
    assert again.read_config() == {"seed": 1} and sorted(path.name for path in again.path.iterdir()) == sorted((CONFIG, METRICS, MODEL))
