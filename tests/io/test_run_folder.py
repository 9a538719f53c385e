"""Run folders: never half-written, never overwritten by mistake."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from mutations import memory_limit

from minivit import UserError, create_model
from minivit.io.run_folder import CONFIG, CURVES, METRICS, MODEL, RunFolder, find_model, load_model, save_model
from minivit.io.weights import read_safetensors, save_weights


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


def test_metrics_are_a_line_an_epoch(tmp_path, full_disk):
    folder = RunFolder.create(tmp_path / "run", "name")
    lines = [{"epoch": 1, "test_accuracy": 0.5}, {"epoch": 2, "test_accuracy": 0.75}]
    for line in lines:
        folder.add_metrics(line)
    full_disk()
    with pytest.raises(UserError, match="No space left"):
        folder.add_metrics({"epoch": 3})
    assert [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()] == lines


def test_config_comes_back(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "name")
    folder.write_config({"seed": 3, "data": "çiçek"})
    assert RunFolder(tmp_path / "run").read_config() == {"seed": 3, "data": "çiçek"}
    (tmp_path / "run" / CONFIG).write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged: its text is no JSON: .*: give the data"):
        folder.read_config()


def test_default_names_count_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [RunFolder.create(None, "vit-digits").path.as_posix() for _ in range(3)]
    assert paths == ["runs/vit-digits-1", "runs/vit-digits-2", "runs/vit-digits-3"]


def test_a_folder_that_exists_is_not_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MODEL).write_text("precious")
    with pytest.raises(UserError, match=r"exists already: .*--out.*--overwrite"):
        RunFolder.create(tmp_path / "run", "name")
    assert (tmp_path / "run" / MODEL).read_text() == "precious"


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path):
    (tmp_path / "run").mkdir()
    for name in (CONFIG, METRICS, MODEL, CURVES, "notes.txt"):
        (tmp_path / "run" / name).write_text("old")
    RunFolder.create(tmp_path / "run", "name", overwrite=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert RunFolder.create(tmp_path / "run", "name").path == tmp_path / "run"


def test_a_file_is_never_overwritten(tmp_path):
    (tmp_path / "run").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists already"):
            RunFolder.create(tmp_path / "run", "name", overwrite)
    with pytest.raises(UserError, match="cannot write"):
        RunFolder.create(tmp_path / "run" / "below", "name")
    assert (tmp_path / "run").read_text() == "precious"


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
