"""Runs that are stopped at any point: what was there before is there, or the new run is there whole."""

import errno
import os
import resource
import signal
import sys
import time

import numpy as np
import pytest

import minivit
from minivit import UserError
from minivit.cli import main
from minivit.inference.evaluate import evaluate
from minivit.io.checkpoints import CHECKPOINTS
from minivit.io.run_folder import CONFIG, CURVES, METRICS, MODEL, NEXT, REPORT, TABLE, RunFolder, find_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

EPOCHS = 3
TRAIN = ["train", "--epochs", str(EPOCHS), "--batch-size", "24", "--limit", "48", "--precision", "float32", "--threads", "1", "--quiet"]
TRAIN += [f"--model-option={option}" for option in ("dim=8", "depth=1", "heads=1")]
RUN_FILES = {CONFIG, METRICS, MODEL, CURVES, TABLE, REPORT}
NEEDS_SPACE = {"open", "os.rename", "os.mkdir"}  # audit events before a change of files; os.replace is os.rename
CHANGES = NEEDS_SPACE | {"os.remove", "os.rmdir"}


def train(out, seed, overwrite):
    return main([*TRAIN, "--out", str(out), "--seed", str(seed), *(["--overwrite"] if overwrite else [])])


def in_a_child(action, meanwhile=lambda pid: None):
    """The exit status of a copy of this process that does action(), negative for a signal; meanwhile(pid) runs here."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                status = action()
        finally:
            os._exit(status)  # a copy of the tests must not go on
    meanwhile(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_change(number, folder, do, kinds):
    """From now on, do() at this change of files in a folder, and at all later ones."""
    changes = []

    def watch(event, arguments):
        if event in kinds and str(arguments[0]).startswith(str(folder)) and not (event == "open" and not arguments[2] & os.O_CREAT):
            changes.append(event)
            if len(changes) >= number:
                do()

    sys.addaudithook(watch)


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stop(rng, out, seed, overwrite):
    """Train in a child that is stopped at a random point; returns how, and the exit status."""
    kind = rng.choice(["killed at a change", "killed", "interrupted", "terminated", "out of disk at a change", "a file grows too large"])
    change, delay, size = int(rng.integers(1, 70)), float(rng.uniform(0, 0.6)), int(rng.integers(1, 12_000))
    number = {"killed": signal.SIGKILL, "interrupted": signal.SIGINT, "terminated": signal.SIGTERM}.get(kind)

    def action():
        if kind == "killed at a change":
            at_change(change, out, lambda: os.kill(os.getpid(), signal.SIGKILL), CHANGES)
        elif kind == "out of disk at a change":
            at_change(change, out, full, NEEDS_SPACE)
        elif kind == "a file grows too large":
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return train(out, seed, overwrite)

    def meanwhile(pid):
        if number:
            time.sleep(delay)
            os.kill(pid, number)

    return f"{kind} {change} {delay:.3f} {size}", in_a_child(action, meanwhile)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


def names_in(folder):
    """Of all files and folders in it but whole checkpoints."""
    names = {path.name for path in folder.rglob("*")} if folder.is_dir() else set()
    return {name for name in names if name != CHECKPOINTS and not (name.startswith("step-") and name.endswith(".safetensors"))}


def seed_of(folder):
    """The seed of the run in a folder, as a reader finds it; None if there is no run."""
    try:
        find_model(folder)
    except UserError:
        return None
    return RunFolder(folder).read_config()["arguments"]["seed"]


def check_whole(out, seed):
    """The folder holds a run of this seed whose files belong together."""
    classifier, folder = minivit.load(out), RunFolder(out)
    assert folder.read_config()["arguments"]["seed"] == seed
    history = folder.read_metrics()
    assert [line["epoch"] for line in history] == list(range(1, len(history) + 1))
    assert (out / CURVES).exists() <= bool(history)
    if history:
        data = minivit.load_data("digits", progress=False).limited(48)
        loss = evaluate(classifier.predictor, data.test_images, data.test_labels, data.mean, data.std, data.num_classes).loss
        assert loss == pytest.approx(history[-1]["test_loss"], rel=1e-6)
        assert len({line["test_loss"] for line in history}) == len(history)  # so no other model would do
    return len(history)


@pytest.mark.parametrize("runs", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_runs_that_are_stopped_at_random(tmp_path, runs):
    rng, outcomes = np.random.default_rng(runs), []
    assert train(tmp_path / "warm", 0, False) == 0  # compiles, loads and imports for all children
    for seed in range(1, runs + 1):
        out, exists, overwrite = tmp_path / f"run{seed}", bool(rng.integers(4)), bool(rng.integers(4))
        if exists:
            assert in_a_child(lambda out=out: train(out, 0, False)) == 0
            (out / "notes.txt").write_text("mine")
        before = content(out)
        how, status = stop(rng, out, seed, overwrite)
        what = f"{how}, exists {exists}, overwrite {overwrite}, status {status}"
        assert status in (0, 2, 130, 143, -signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM), what
        epochs = None
        try:
            if seed_of(out) == seed:
                epochs = check_whole(out, seed)
                assert not exists or (overwrite and epochs >= 1 and content(out)["notes.txt"] == b"mine")
                assert names_in(out) - {"notes.txt"} <= RUN_FILES or status < 0
            else:
                assert content(out) == before
                assert names_in(out) - {NEXT} == set(before) or status < 0
                if any((out / NEXT / CHECKPOINTS).glob("step-*")):
                    assert in_a_child(lambda out=out: main(["train", "--resume", str(out), "--quiet"])) == 0
                    assert check_whole(out, seed) == EPOCHS
            assert epochs == EPOCHS or status != 0
            assert in_a_child(lambda out=out: train(out, 0, True)) == 0  # the next run
            assert check_whole(out, 0) == EPOCHS
            assert names_in(out) - {"notes.txt"} == RUN_FILES and not (out / CHECKPOINTS).exists()
        except Exception as error:
            raise AssertionError(what) from error
        outcomes.append(epochs)
    if runs > 50:
        assert {None, *range(EPOCHS + 1)} == set(outcomes), outcomes


def test_two_trainings_into_one_folder(tmp_path):
    out = tmp_path / "run"
    folder = RunFolder.create(out, "name", {})
    for overwrite in (False, True):
        assert in_a_child(lambda overwrite=overwrite: train(out, 1, overwrite)) == 2
        assert names_in(out) == set()
    folder.close()

    def lock_and_die():
        RunFolder.create(out, "name", {})
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(lock_and_die) == -signal.SIGKILL
    assert in_a_child(lambda: train(out, 1, False)) == 0
    assert check_whole(out, 1) == EPOCHS


def test_two_trainings_at_the_same_time(tmp_path):
    """Each starts while the other may be at any point: one succeeds, and the other tells that."""
    assert train(tmp_path / "warm", 0, False) == 0
    statuses, out = [], tmp_path / "run"
    first = in_a_child(lambda: train(out, 1, True), lambda pid: statuses.append(in_a_child(lambda: train(out, 2, True))))
    assert sorted({first, *statuses}) in ([0], [0, 2])
    seed = seed_of(out)
    assert seed in (1, 2) and check_whole(out, seed) == EPOCHS
