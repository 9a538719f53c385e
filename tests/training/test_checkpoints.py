"""When checkpoints are written, and what becomes of them where something is wrong."""

import errno
import json
import os
import resource
import shutil
import signal
import sys

import pytest
from stopped_runs import SMALL, VIT, files_of, stop_at, stopped

from benchmarks.kills import in_a_child, result_of, status_of
from minivit import UserError, train
from minivit.cli import main
from minivit.io.checkpoints import CHECKPOINTS
from minivit.io.run_folder import CONFIG, CURVES, METRICS, MODEL, REPORT, TABLE, RunFolder
from minivit.training import checkpoints, loop
from minivit.training.checkpoints import Pace
from minivit.training.loop import Interrupted


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that was never stopped ends with, of `SMALL | VIT`."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(**SMALL | VIT, out=out)
    return result_of(out)


@pytest.fixture
def often(monkeypatch):
    """Checkpoints are written whenever one can be due."""
    monkeypatch.setattr(checkpoints, "EPOCH_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, whole, monkeypatch, often, capsys):
    stopped(monkeypatch, tmp_path / "run", 5, checkpoint_minutes=1e-9, **VIT)
    assert files_of(tmp_path / "run") == ["step-00000004.safetensors", "step-00000005.safetensors"]
    last, before = (tmp_path / "run" / CHECKPOINTS / f"step-0000000{step}.safetensors" for step in (5, 4))
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    good = before.read_bytes()
    before.write_bytes(good[:1000])
    with pytest.raises(UserError, match=f"{before} is damaged .* to train the run again from its beginning"):
        train(resume=tmp_path / "run")
    before.write_bytes(good)
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 2)
        train(resume=tmp_path / "run", checkpoint_minutes=0)
    line = f"{last} is damaged: its checksum is not that of its content; the checkpoint before it is taken"
    assert line in capsys.readouterr().err.splitlines()
    assert files_of(tmp_path / "run") == ["step-00000004.safetensors", "step-00000006.safetensors"]
    train(resume=tmp_path / "run", keep_checkpoint=True, progress=False)
    assert result_of(tmp_path / "run") == whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("trouble", ["the disk is full", "the folder is read-only", "a file grows too large"])
def test_a_folder_that_cannot_be_written_to_any_more(tmp_path, whole, trouble):
    out, told = tmp_path / "run", tmp_path / "told"
    options = SMALL | VIT | {"checkpoint_minutes": 1e-9, "out": out}

    def refuse(number):
        def watch(event, arguments):
            if (
                event in ("open", "os.rename", "os.mkdir")
                and str(arguments[0]).startswith(str(out))
                and (event != "open" or arguments[2] & os.O_CREAT)
            ):
                raise OSError(number, os.strerror(number))

        sys.addaudithook(watch)

    def begin(line):
        if trouble == "a file grows too large":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        else:
            refuse(errno.ENOSPC if trouble == "the disk is full" else errno.EROFS)

    def action():
        try:
            train(**options, on_epoch=begin)
        except UserError as error:
            os.write(descriptor, str(error).encode())
            return 2
        return 0

    descriptor = os.open(told, os.O_CREAT | os.O_WRONLY)
    resource_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert status_of(in_a_child(action)) == 2
    os.close(descriptor)
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == resource_limit
    if trouble != "a file grows too large":
        assert f"{out} holds the model after 1 of 3 epochs" in told.read_text() and "\n" not in told.read_text()
    assert files_of(out)[-1] == "step-00000002.safetensors"
    train(resume=out, keep_checkpoint=True, progress=False)
    assert result_of(out) == whole


def test_training_goes_on_without_a_checkpoint_that_cannot_be_written(tmp_path, often, capsys):
    def block(line):
        if line["epoch"] == 1:
            (tmp_path / "run" / CHECKPOINTS).write_text("in the way")

    options = SMALL | VIT | {"keep_checkpoint": False}
    run = train(**options, out=tmp_path / "run", on_epoch=block)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and all(line.startswith("there is no new checkpoint: cannot write ") for line in told)
    assert len(run.history) == 3


def test_a_folder_that_vanishes_is_made_again_with_a_checkpoint(tmp_path, whole, monkeypatch, often):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop.Progress, "epoch", lambda self, line: shutil.rmtree(tmp_path / "run"))
        stop_at(patch, 5)
        train(**SMALL | VIT, out=tmp_path / "run")
    assert os.listdir(tmp_path / "run") == [CHECKPOINTS]
    train(resume=tmp_path / "run", keep_checkpoint=True, progress=False)
    assert result_of(tmp_path / "run") == whole


def test_checkpoints_of_a_complete_run(tmp_path):
    train(**SMALL | VIT | {"keep_checkpoint": False}, out=tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == sorted([CONFIG, METRICS, MODEL, TABLE, CURVES, REPORT])
    with pytest.raises(UserError, match="run is complete: all 3 epochs are trained"):
        train(resume=tmp_path / "run")
    with pytest.raises(UserError, match=r"complete and has no checkpoint, which keep_checkpoint \(--keep-checkpoint\) keeps"):
        train(resume=tmp_path / "run", epochs=4)


def test_an_earlier_run_keeps_its_checkpoints_until_the_first_epoch_of_another(tmp_path, monkeypatch):
    stopped(monkeypatch, tmp_path / "run", 4, **VIT)
    before = files_of(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after 1 of 3 epochs"):
        stop_at(patch, 5)
        train(**SMALL | VIT | {"seed": 9}, out=tmp_path / "run", overwrite=True)
    assert files_of(tmp_path / "run") == ["step-00000005.safetensors"] != before
    train(resume=tmp_path / "run", progress=False)
    assert RunFolder(tmp_path / "run").read_config()["arguments"]["seed"] == 9


def test_a_run_that_replaces_another_goes_on_from_its_first_epoch(tmp_path, monkeypatch, often):
    """Until it is resumed, the earlier run is there as it was."""
    out, new = tmp_path / "run", SMALL | VIT | {"seed": 9, "checkpoint_minutes": 1e-9, "overwrite": True}
    train(**new, out=tmp_path / "whole")
    train(**SMALL | VIT, out=out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    line = rf"holds the earlier run as it was; minivit train --resume {out} goes on with the new one instead$"
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=line):
        stop_at(patch, 2)
        train(**new, out=out)
    assert before.items() <= {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}.items()
    train(resume=out, keep_checkpoint=True, progress=False)
    assert result_of(out) == result_of(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_run_that_replaces_another_survives_a_kill_in_its_first_epoch(tmp_path):
    """Also one on weights that no seed makes, before its first step."""
    train(**SMALL | VIT | {"epochs": 1}, out=tmp_path / "first")
    options = SMALL | {"model_options": None, "weights": tmp_path / "first", "seed": 9, "overwrite": True}
    train(**options, out=tmp_path / "whole")
    for step in (1, 2):
        out = tmp_path / f"run{step}"
        shutil.copytree(tmp_path / "first", out)

        def killed(step=step, out=out):
            kill = lambda told: told["step"] < step or os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            return train(**options, out=out, on_step=kill, checkpoint_minutes=1e-9 if step == 2 else 5.0)

        assert status_of(in_a_child(killed)) == -signal.SIGKILL
        assert files_of(out) == ["step-00000003.safetensors"]  # of the earlier run
        train(resume=out, keep_checkpoint=True, progress=False)
        assert result_of(out) == result_of(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint(tmp_path, monkeypatch, capsys, number):
    out = tmp_path / "run"
    line = ["train", "--epochs", "2", "--batch-size", "16", "--limit", "48", "--model", "vit_nano_patch2_8", "--quiet", "--out", str(out)]
    line += [f"--model-option={option}" for option in ("dim=8", "depth=1", "heads=1")]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Progress, "step", lambda self: signal.raise_signal(number))
        assert main(line) == 128 + number
    told = f"minivit: interrupted; {out} holds the model after 0 of 2 epochs; minivit train --resume {out} goes on\n"
    assert capsys.readouterr() == ("", told)
    assert files_of(out) == ["step-00000001.safetensors"]
    assert main(["train", "--resume", str(out), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["history"]) == 2


def test_checkpoints_take_two_percent_of_the_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoints, "perf_counter", lambda: now[0])
    for epoch_seconds, cost, minutes in ((0.4, 0.02, 5), (0.4, 0.5, 5), (30, 0.1, 5), (3600, 2.0, 5), (3600, 2.0, 1)):
        pace, spent, written, start = Pace(minutes), 0.0, 0, now[0]
        for _ in range(401 if epoch_seconds < 100 else 4):
            for step in range(1, 101):
                now[0] += epoch_seconds / 100
                if pace.is_due(step == 100):
                    with pace.counting():
                        now[0] += cost
                    spent += cost
                    written += 1
        total = now[0] - start
        assert spent - cost < 0.02 * total  # what the first one takes is not known before
        assert total / written < max(5 + epoch_seconds, 51 * cost + epoch_seconds) * 1.05 or total / written < 60 * minutes * 1.1
    assert not Pace(0).is_due(True)
