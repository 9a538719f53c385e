"""Run folders: never half-written, never overwritten by mistake."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from mutations import memory_limit

from minivit import UserError, create_model
from minivit.io import run_folder
from minivit.io.model_file import load_model, save_model
from minivit.io.run_folder import CONFIG, CURVES, METRICS, MODEL, RunFolder, find_model
from minivit.io.weights import read_safetensors, save_weights


def epoch(number):
    """A line of metrics.jsonl."""
    return {"epoch": number, "train_loss": 2.0, "test_loss": 1.5, "test_accuracy": 0.25 * number}


@pytest.fixture
def model():
    return create_model("mixer_nano_patch2_8", num_classes=4, dim=16, depth=1)


@pytest.fixture
def full_disk(monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", refuse)


def test_a_model_comes_back(tmp_path, model):
    about = {"class_names": ["α", "b c"], "preprocessing": {"mean": [0.1], "image_size": 8}}
    save_model(tmp_path / MODEL, model, about)
    found, told = load_model(tmp_path / MODEL)
    assert found.config == model.config and found.name == model.name and not found.training
    assert {key: told[key] for key in about} == about
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(found.state_dict()[name], value)


def test_a_full_disk_keeps_the_old_model(tmp_path, model, full_disk):
    save_model(tmp_path / MODEL, model, {})
    before = (tmp_path / MODEL).read_bytes()
    full_disk()
    model.head.bias.data += 1
    with pytest.raises(UserError, match=f"cannot write .*{MODEL}: No space left on device"):
        save_model(tmp_path / MODEL, model, {})
    assert (tmp_path / MODEL).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [MODEL]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-100], lambda b: b[:6], lambda b: b"", lambda b: b"\xff" * 8 + b[8:], lambda b: b"hello " * 9]
)
def test_a_damaged_model_is_told(tmp_path, model, damage):
    path = tmp_path / MODEL
    save_model(path, model, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as told:
        load_model(path)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


def test_weights_of_others_are_told_apart(tmp_path, model):
    from safetensors.numpy import save_file

    save_file(model.state_dict(), tmp_path / MODEL)
    with pytest.raises(UserError, match="does not say which model"):
        load_model(tmp_path / MODEL)


def create(out, config=(), overwrite=False):
    return RunFolder.create(out, "name", dict(config), overwrite)


def write_model(path):
    path.write_text("a model")


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


def test_metrics_are_a_line_an_epoch(tmp_path, full_disk):
    folder = create(tmp_path / "run")
    lines = [epoch(1), epoch(2)]
    for line in lines:
        folder.save(write_model, line)
    full_disk()
    with pytest.raises(UserError, match="No space left"):
        folder.save(write_model, epoch(3))
    assert folder.history == folder.read_metrics() == lines
    assert names_in(tmp_path / "run") == sorted((CONFIG, METRICS, MODEL))


def test_config_comes_back(tmp_path):
    folder = create(tmp_path / "run", {"seed": 3, "data": "çiçek"})
    folder.begin(write_model)
    assert RunFolder(tmp_path / "run").read_config() == {"seed": 3, "data": "çiçek"}
    (tmp_path / "run" / CONFIG).write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged: its text is no JSON: .*: give the data"):
        folder.read_config()


def test_default_names_count_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [RunFolder.create(None, "vit-digits", {}).path.as_posix() for _ in range(3)]
    assert paths == ["runs/vit-digits-1", "runs/vit-digits-2", "runs/vit-digits-3"]


def test_a_folder_that_exists_is_not_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MODEL).write_text("precious")
    with pytest.raises(UserError, match=r"exists already: .*--out.*--overwrite"):
        create(tmp_path / "run")
    assert (tmp_path / "run" / MODEL).read_text() == "precious"


def test_overwriting_replaces_the_old_run_and_nothing_else_after_the_first_epoch(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (CONFIG, METRICS, MODEL, CURVES, "notes.txt"):
        (tmp_path / "run" / name).write_text("old")
    folder = create(tmp_path / "run", overwrite=True)
    folder.begin(write_model)
    old = {p.name: p.read_text() for p in folder.path.iterdir() if p.is_file()}
    assert old == dict.fromkeys((CONFIG, METRICS, MODEL, CURVES, "notes.txt"), "old")
    assert folder.state(2) == f"{folder.path} holds the earlier run as it was"
    folder.save(write_model, epoch(1))
    assert names_in(folder.path) == sorted((CONFIG, METRICS, MODEL, "notes.txt"))
    assert [name for name in names_in(folder.path) if (folder.path / name).read_text() == "old"] == ["notes.txt"]
    assert folder.state(2) == f"{folder.path} holds the model after 1 of 2 epochs"


def test_a_full_disk_keeps_the_run_that_is_overwritten(tmp_path, full_disk):
    folder = create(tmp_path / "run", {"seed": 1})
    folder.save(write_model, epoch(1))
    folder.close()
    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
    again = create(tmp_path / "run", overwrite=True)
    full_disk()
    for attempt in (lambda: again.begin(write_model), lambda: again.save(write_model, epoch(1))):
        with pytest.raises(UserError, match="No space left on device; what was there before is kept"):
            attempt()
        assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_who_reads_a_run_finishes_what_a_killed_training_began(tmp_path, monkeypatch, model, moved):
    monkeypatch.chdir(tmp_path)
    folder = create("run", {"seed": 1})
    folder.save(write_model, epoch(1))
    (folder.path / CURVES).write_text("of the first run")
    calls = []

    def rename(source, target, real=os.replace):
        calls.append(target)
        if Path(target).parent == Path("run") and len([c for c in calls if Path(c).parent == Path("run")]) > moved:
            raise SystemExit  # as if the process were killed
        real(source, target)

    folder.close()
    again = create("run", {"seed": 2}, overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", rename)
        if moved == 3:
            patch.setattr(Path, "rmdir", lambda self: rename(self, self) if self.name == ".new" else os.rmdir(self))
        again.save(lambda path: save_model(path, model, {}), epoch(2))
    again.close()
    assert find_model(Path("run")) == folder.path / MODEL
    load_model(folder.path / MODEL)
    assert names_in(folder.path) == sorted((CONFIG, METRICS, MODEL))
    assert (folder.read_config(), folder.read_metrics()) == ({"seed": 2}, [epoch(2)])


def test_what_killed_processes_left_is_deleted(tmp_path):
    (tmp_path / "run" / ".new.part").mkdir(parents=True)
    (tmp_path / "run" / ".new.part" / MODEL).write_text("half")
    assert create(tmp_path / "run").path == tmp_path / "run"  # it counts as empty
    (tmp_path / "run" / f".{MODEL}.0a1b2c3d.part").write_text("half")
    create(tmp_path / "run", overwrite=True)
    assert names_in(tmp_path / "run") == []


def test_a_folder_that_vanishes_is_made_again_whole(tmp_path):
    folder = create(tmp_path / "run", {"seed": 1})
    folder.save(write_model, epoch(1))
    shutil.rmtree(folder.path)
    assert folder.state(3) == f"{folder.path} holds no model"
    folder.save(write_model, epoch(2))
    assert names_in(folder.path) == sorted((CONFIG, METRICS, MODEL))
    assert (folder.read_config(), folder.read_metrics()) == ({"seed": 1}, [epoch(1), epoch(2)])
    with pytest.raises(UserError, match="another training is writing to"):  # the new folder is locked too
        create(folder.path, overwrite=True)


def test_one_training_at_a_time(tmp_path):
    first = create(tmp_path / "run")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"another training is writing to .*run: give another folder as out \(--out\)"):
            create(tmp_path / "run", overwrite=overwrite)
    first.close()
    create(tmp_path / "run")


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder, "lock", refuse)
    create(tmp_path / "run").save(write_model, epoch(1))
    assert capsys.readouterr().err == (
        f"the file system of {tmp_path / 'run'} has no locks (No locks available): nothing stops a second training into this folder\n"
    )


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert create(tmp_path / "run").path == tmp_path / "run"


def test_a_file_is_never_overwritten(tmp_path):
    (tmp_path / "run").write_text("precious")
    os.mkfifo(tmp_path / "fifo")
    for name in ("run", "fifo"):
        for overwrite in (False, True):
            with pytest.raises(UserError, match="exists already"):
                create(tmp_path / name, overwrite=overwrite)
    with pytest.raises(UserError, match="cannot write"):
        create(tmp_path / "run" / "below")
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize("name, read", [("config.json", RunFolder.read_config), ("metrics.jsonl", RunFolder.read_metrics)])
def test_a_pipe_in_a_run_is_refused(name, read, tmp_path):
    """Nobody writes to it, so reading would wait for ever."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        read(RunFolder(tmp_path))


def test_models_are_found_by_folder_name_and_file(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "vit-digits-1").mkdir(parents=True)
    file = tmp_path / "runs" / "vit-digits-1" / MODEL
    save_model(file, model, {})
    for path in ("vit-digits-1", "runs/vit-digits-1", f"runs/vit-digits-1/{MODEL}", file):
        assert find_model(Path(path)).resolve() == file
    for path in ("vit-digit-1", "runs/vit-digit-1"):
        with pytest.raises(UserError, match=r"there is no run .*\(nearest: vit-digits-1\)"):
            find_model(Path(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no run folder"):
        find_model(Path("empty"))


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"epoch": 2', "line 2 is no JSON: Expecting ',' delimiter"),
        ("[" * 10_000, "line 2 is no JSON: its brackets are nested too deeply"),
        ("[]", r"line 2 must be a mapping of names to values, not \[\]"),
        ('{"epoch": 2, "train_loss": 1.5, "test_accuracy": 0.5}', "line 2.test_loss is missing"),
        (
            '{"epoch": null, "train_loss": 1, "test_loss": 1, "test_accuracy": 0.5}',
            "line 2.epoch must be a whole number of at least 1, not None",
        ),
        (
            '{"epoch": 2, "train_loss": [1], "test_loss": 1, "test_accuracy": 0.5}',
            r"line 2.train_loss must be a number of at least 0, not \[1\]",
        ),
        (
            '{"epoch": 2, "train_loss": 1, "test_loss": 1e999, "test_accuracy": 0.5}',
            r"line 2.test_loss must be a number of at most 1e\+30, not inf",
        ),
        (
            '{"epoch": 2, "train_loss": 1, "test_loss": 1, "test_accuracy": 1.5}',
            "line 2.test_accuracy must be a number of at most 1, not 1.5",
        ),
    ],
)
def test_a_damaged_line_of_metrics_is_told(tmp_path, line, reason):
    good = '{"epoch": 1, "train_loss": 2, "test_loss": 1.5, "test_accuracy": 0.5, "more": [0]}'
    (tmp_path / METRICS).write_text(f"{good}\n{good}\n")
    assert RunFolder(tmp_path).read_metrics() == 2 * [json.loads(good)]
    (tmp_path / METRICS).write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl is damaged: {reason}.*: remove the line, or the file"):
        RunFolder(tmp_path).read_metrics()


@pytest.mark.parametrize(
    "key, text, reason",
    [
        ("model", "[" * 10_000, "model is no JSON: its brackets are nested too deeply"),
        ("model", "3", "model must be a mapping of names to values, not 3"),
        ("model", '{"family": "vit"}', "model.name must be text, not None"),
        ("model", '{"family": "mixed", "name": "n"}', r"unknown model 'mixed' \(nearest: mixer"),
        ("model", '{"family": "mixer", "name": "n", "seed": 3}', "mixer has no option 'seed'"),
        ("model", '{"family": "mixer", "name": "n", "depth": "2"}', "depth must be a whole number of at least 1, not '2'"),
        ("model", '{"family": "mixer", "name": "n"}', "the model has more than 18 parameter arrays"),
        ("note", "NaN", "note is no JSON: NaN is no number"),
    ],
)
def test_what_a_model_file_says_is_checked(tmp_path, model, key, text, reason):
    save_weights(model, tmp_path / MODEL)
    assert len(read_safetensors(tmp_path / MODEL)[0]) == 18
    save_weights(model, tmp_path / MODEL, {key: text})
    with pytest.raises(UserError, match=rf"model\.safetensors is damaged: {reason}.*: get or make it again"):
        load_model(tmp_path / MODEL)


def test_text_larger_than_that_of_any_run_is_not_read(tmp_path):
    for name, read in ((CONFIG, RunFolder(tmp_path).read_config), (METRICS, RunFolder(tmp_path).read_metrics)):
        (tmp_path / name).write_bytes(b"[" + b"[]," * 6_000_000)
        with memory_limit(2**28), pytest.raises(UserError, match=f"{name} is damaged: it has 18,000,001 bytes"):
            read()
