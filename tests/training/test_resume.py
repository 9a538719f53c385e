"""Runs that go on where they were stopped, and end with the same bits."""

import csv
import errno
import json
import os
import resource
import shutil
import signal
import sys

import numpy as np
import pytest

import minivit
from benchmarks import kills
from benchmarks.kills import in_a_child, result_of, status_of
from minivit import UserError, train
from minivit.cli import main
from minivit.io.checkpoints import CHECKPOINTS
from minivit.io.run_folder import CONFIG, METRICS, MODEL, TABLE, RunFolder
from minivit.training import checkpoints, loop, setup
from minivit.training.checkpoints import Pace
from minivit.training.loop import Interrupted

SMALL = {
    "epochs": 3,
    "batch_size": 32,
    "limit": 96,
    "model_options": {"dim": 16, "depth": 1, "heads": 2},
    "keep_checkpoint": True,
    "progress": False,
}
VIT = {"model": "vit_nano_patch2_8"}
RESIZED = {
    "model": "localvit_micro_patch4_32",
    "model_options": {"dim": 16, "depth": 1, "heads": 2, "stem_width": 4},
    "progressive_resizing": 0.65,
    "batch_size": 16,
}


GROWN = RESIZED | {"ema": 0.8, "epochs": 6}


@pytest.fixture
def often(monkeypatch):
    """Checkpoints are written whenever one can be due."""
    monkeypatch.setattr(checkpoints, "EPOCH_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))


@pytest.fixture(scope="module")
def pictures():
    """Images of four classes, (images, labels)."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    return rng.integers(0, 256, (40, 32, 32, 3), np.uint8), labels


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that was never stopped ends with, of `SMALL | VIT`."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(**SMALL | VIT, out=out)
    return result_of(out)


@pytest.fixture(scope="module")
def whole_grown(tmp_path_factory, pictures):
    """The same of images that grow."""
    out = tmp_path_factory.mktemp("grown") / "run"
    train(**SMALL | GROWN | {"data": pictures}, out=out)
    return result_of(out)


def stop_at(monkeypatch, step):
    """Interrupt the training after this step of this process."""
    count = []

    def interrupt(self):
        count.append(self)
        if len(count) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Progress, "step", interrupt)


def stopped(monkeypatch, out, step, **options):
    """Train until an interrupt after a step."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=rf"; minivit train --resume {out} goes on$"):
        stop_at(patch, step)
        train(**SMALL | {"out": out} | options)


def files_of(out):
    return sorted(path.name for path in (out / CHECKPOINTS).iterdir())


@pytest.mark.parametrize(
    "steps, options",
    [
        ((2, 3), {"ema": 0.8, "mixup": 0.2, "drop_path": 0.1}),
        ((4, 4), {"optimizer": "sgd", "validation_fraction": 0.25, "test_every": 2, "class_weights": "balanced", "epochs": 5, **VIT}),
        ((3, 1), {"optimizer": "adamw", "cutmix": 1.0, "ema": 0.9, "schedule": "cosine", **VIT}),
    ],
    ids=["muon", "sgd", "adamw"],
)
def test_bit_for_bit(tmp_path, monkeypatch, steps, options):
    train(**SMALL | options, out=tmp_path / "whole")
    out = tmp_path / "stopped"
    stopped(monkeypatch, out, steps[0], **options)
    config = (out / CONFIG).read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, steps[1])
        train(resume=out, progress=False, keep_checkpoint=True)
    run = train(resume=out, progress=False, keep_checkpoint=True)
    assert result_of(out) == result_of(tmp_path / "whole")
    assert (out / CONFIG).read_bytes() == config == (tmp_path / "whole" / CONFIG).read_bytes()
    assert RunFolder(out).read_metrics() == run.history


@pytest.mark.parametrize("step", [4, 6, 11])
def test_images_that_grow(tmp_path, monkeypatch, pictures, whole_grown, step):
    """Stopped where the second phase begins, and in the second and the last one. The run is on arrays."""
    stopped(monkeypatch, tmp_path / "run", step, **GROWN | {"data": pictures})
    with pytest.raises(UserError, match="trained on arrays, which are not kept: give the same ones as data"):
        train(resume=tmp_path / "run")
    other = pictures[0].copy()
    other[0, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match=r"the data is not what .*run was trained on"):
        train(resume=tmp_path / "run", data=(other, pictures[1]), progress=False)
    train(resume=tmp_path / "run", data=pictures, keep_checkpoint=True, progress=False)
    assert result_of(tmp_path / "run") == whole_grown


def test_minutes_are_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "step_seconds", lambda *given: 1.2)
    options = {"minutes": 0.5, "epochs": None} | VIT
    train(**SMALL | options, out=tmp_path / "whole")
    stopped(monkeypatch, tmp_path / "run", 4, **options)
    monkeypatch.setattr(setup, "step_seconds", lambda *given: pytest.fail("measured again"))
    train(resume=tmp_path / "run", keep_checkpoint=True, progress=False)
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


def test_a_given_model_with_frozen_parameters(tmp_path, monkeypatch):
    def model():
        made = minivit.create_model("vit_nano_patch2_8", dim=16, depth=1, heads=2, seed=5)
        made.pos_embed.requires_grad = False
        return made

    options = {"model_options": None}
    train(**SMALL | options | {"model": model()}, out=tmp_path / "whole")
    stopped(monkeypatch, tmp_path / "run", 4, model=model(), **options)
    train(resume=tmp_path / "run", keep_checkpoint=True, progress=False)
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # as if the process were killed after the first epoch
        patch.setattr(loop.Progress, "epoch", lambda self, line: sys.exit())
        train(**SMALL | options | {"model": model()}, out=tmp_path / "killed")
    assert files_of(tmp_path / "killed") == ["step-00000000.safetensors"]
    train(resume=tmp_path / "killed", keep_checkpoint=True, progress=False)
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")


@pytest.mark.parametrize("options", [{"freeze": "backbone", "augmentation": "none", "mixup": 0.0}, {"freeze": 1, "ema": 0.8}], ids=str)
def test_weights_to_begin_with_may_be_gone(tmp_path, monkeypatch, options):
    train(**SMALL | VIT | {"epochs": 1, "seed": 3, "keep_checkpoint": False}, out=tmp_path / "first")
    options = {"model_options": None, "weights": tmp_path / "first", **options}
    train(**SMALL | options, out=tmp_path / "whole")
    stopped(monkeypatch, tmp_path / "run", 5, **options)
    shutil.rmtree(tmp_path / "first")
    train(resume=tmp_path / "run", keep_checkpoint=True, progress=False)
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_runs_that_are_killed_at_random(tmp_path):
    found = kills.measure(tmp_path, 2, seed=1)
    assert found["equal"] == found["trainings"] == 2 and found["kills"] > 2


def test_a_run_without_a_checkpoint_begins_again(tmp_path, whole, monkeypatch, capsys):
    stopped(monkeypatch, tmp_path / "run", 5, **VIT)
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS)  # as if it had been killed before the first one
    train(resume=tmp_path / "run", keep_checkpoint=True)
    assert "run has no checkpoint: it begins again" in capsys.readouterr().err
    assert result_of(tmp_path / "run") == whole


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, whole, monkeypatch, often, capsys):
    stopped(monkeypatch, tmp_path / "run", 5, checkpoint_minutes=1e-9, **VIT)
    assert files_of(tmp_path / "run") == ["step-00000004.safetensors", "step-00000005.safetensors"]
    last, before = (tmp_path / "run" / CHECKPOINTS / f"step-0000000{step}.safetensors" for step in (5, 4))
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    good = before.read_bytes()
    before.write_bytes(good[:1000])
    with pytest.raises(UserError, match=f"{before} is damaged .*; delete .*{CHECKPOINTS} to train the run again from its beginning"):
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


def test_one_process_at_a_time(tmp_path, monkeypatch):
    stopped(monkeypatch, tmp_path / "run", 2, **VIT)
    folder = RunFolder.reopen(tmp_path / "run")
    with pytest.raises(UserError, match="another training is writing to"):
        train(resume=tmp_path / "run")
    folder.close()
    with pytest.raises(UserError, match="seed"):  # an error leaves no lock
        train(resume=tmp_path / "run", seed=3)
    train(resume=tmp_path / "run", progress=False)


def test_checkpoints_of_a_complete_run(tmp_path):
    train(**SMALL | VIT | {"keep_checkpoint": False}, out=tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == sorted([CONFIG, METRICS, MODEL, TABLE, "curves.png"])
    with pytest.raises(UserError, match="run is complete: all 3 epochs are trained"):
        train(resume=tmp_path / "run")
    with pytest.raises(UserError, match=r"complete and has no checkpoint, which keep_checkpoint \(--keep-checkpoint\) keeps"):
        train(resume=tmp_path / "run", epochs=4)


def test_more_epochs_extend_a_run(tmp_path, monkeypatch, pictures):
    options = SMALL | RESIZED | {"data": pictures, "epochs": 3}
    first = train(**options, out=tmp_path / "run")
    assert files_of(tmp_path / "run") == ["step-00000006.safetensors"]
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    longer = {"epochs": 5, "data": pictures, "progress": False, "keep_checkpoint": True}
    run = train(resume=tmp_path / "run", **longer)
    assert run.history[:3] == first.history and [line["epoch"] for line in run.history] == [1, 2, 3, 4, 5]
    rates = [line["learning_rate"] for line in run.history]
    assert rates[2] < rates[3] > rates[4]  # the schedule of 5 epochs, from the third on
    config = RunFolder(tmp_path / "run").read_config()
    assert config["arguments"]["epochs"] == 5 and config["extended"] == [{"epochs": 3, "steps": 6}]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 1)
        train(resume=tmp_path / "stopped", **longer)
    with pytest.raises(UserError, match=r"epochs must be at least the 5 of .*, not 4"):
        train(resume=tmp_path / "stopped", data=pictures, epochs=4)
    train(resume=tmp_path / "stopped", data=pictures, progress=False, keep_checkpoint=True)
    assert result_of(tmp_path / "stopped") == result_of(tmp_path / "run")


def test_an_earlier_run_keeps_its_checkpoints_until_the_first_epoch_of_another(tmp_path, monkeypatch):
    stopped(monkeypatch, tmp_path / "run", 4, **VIT)
    before = files_of(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"holds the earlier run as it was$"):
        stop_at(patch, 2)
        train(**SMALL | VIT | {"seed": 9}, out=tmp_path / "run", overwrite=True)
    assert files_of(tmp_path / "run") == before
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after 1 of 3 epochs"):
        stop_at(patch, 5)
        train(**SMALL | VIT | {"seed": 9}, out=tmp_path / "run", overwrite=True)
    assert files_of(tmp_path / "run") == ["step-00000005.safetensors"] != before
    train(resume=tmp_path / "run", progress=False)
    assert RunFolder(tmp_path / "run").read_config()["arguments"]["seed"] == 9


def test_other_arguments_than_the_runs_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stopped(monkeypatch, "run", 2, **VIT)
    for given, message in (
        ({"lr": 0.5}, "run was begun with lr=.*, not 0.5: leave lr out, as resume changes epochs alone"),
        ({"model": "localvit_micro_patch2_8"}, "begun with model='vit_nano_patch2_8'"),
        ({"data": "cifar10"}, "begun with data='digits'"),
        ({"minutes": 1.0}, "begun with no minutes, not 1.0"),
        ({"out": "other"}, "begun with out="),
        ({"epochs": "4"}, "epochs must be at least the 3 of run, not '4'"),
        ({"sed": 1}, r"train has no option 'sed' \(nearest: seed"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes must be 0"),
    ):
        with pytest.raises(UserError, match=message):
            train(resume="run", **given)
    for name in ("rum", "runs/none"):
        with pytest.raises(UserError, match="there is no run"):
            train(resume=name)
    train(resume="run", seed=0, batch_size=32, data="digits", out="run", progress=False)  # the run's own are not


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


def test_an_interrupt_in_a_step_waits_for_its_end(tmp_path, whole, monkeypatch):
    submit = minivit.Trainer.submit
    count = []

    def interrupted(self, images, labels):
        step = submit(self, images, labels)
        count.append(step)
        if len(count) == 4:
            signal.raise_signal(signal.SIGINT)
        return step

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(minivit.Trainer, "submit", interrupted)
        train(**SMALL | VIT, out=tmp_path / "run")
    assert files_of(tmp_path / "run") == ["step-00000004.safetensors"]
    train(resume=tmp_path / "run", keep_checkpoint=True, progress=False)
    assert result_of(tmp_path / "run") == whole


def test_an_interrupt_in_a_test_leaves_averaged_weights_out(tmp_path, monkeypatch):
    options = SMALL | VIT | {"ema": 0.5, "validation_fraction": 0.25}
    train(**options, out=tmp_path / "whole")
    for number in (1, 2, 4):  # the last one is the test at the end, after the last checkpoint
        out, count, evaluate = tmp_path / f"run{number}", [], loop.evaluate

        def interrupted(*given, count=count, number=number, evaluate=evaluate):
            count.append(given)
            if len(count) == number:
                raise KeyboardInterrupt
            return evaluate(*given)

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(loop, "evaluate", interrupted)
            train(**options, out=out)
        train(resume=out, keep_checkpoint=True, progress=False)
        assert result_of(out) == result_of(tmp_path / "whole")


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
        assert spent < 0.02 * total
        assert total / written < max(5 + epoch_seconds, 51 * cost + epoch_seconds) * 1.05 or total / written < 60 * minutes * 1.1
    assert not Pace(0).is_due(True)


def test_functions_are_told_of_steps_and_epochs(tmp_path, monkeypatch):
    steps, epochs = [], []
    tell = {"on_step": steps.append, "on_epoch": epochs.append}
    run = train(**SMALL | VIT, out=tmp_path / "whole", **tell)
    assert epochs == run.history
    assert [(step["step"], step["epoch"]) for step in steps] == [(k + 1, k // 3 + 1) for k in range(9)]
    for line in run.history:
        own = [step for step in steps if step["epoch"] == line["epoch"]]
        assert np.mean([step["loss"] for step in own]) == pytest.approx(line["train_loss"])
        assert own[-1]["learning_rate"] == line["learning_rate"]
    told, steps[:], epochs[:] = [*steps], [], []
    stopped(monkeypatch, tmp_path / "run", 4, **VIT, **tell)
    train(resume=tmp_path / "run", progress=False, **tell)
    assert steps == told  # each once, as no checkpoint was lost
    assert [line["epoch"] for line in epochs] == [1, 2, 3]


def test_an_error_of_a_function_ends_the_run(tmp_path):
    def fail(told):
        if told.get("step", 5) == 5:
            raise ZeroDivisionError("of the function")

    for name in ("on_step", "on_epoch"):
        with pytest.raises(ZeroDivisionError, match="of the function"):
            train(**SMALL | VIT, out=tmp_path / name, **{name: fail})
        assert len(RunFolder(tmp_path / name).read_metrics()) == 1
        train(resume=tmp_path / name, progress=False)
    with pytest.raises(UserError, match="on_step must be a Callable, not 3"):
        train(**SMALL, out=tmp_path / "other", on_step=3)


def test_a_table_of_the_history(tmp_path):
    run = train(**SMALL | {"model": "dvt_nano_8", "model_options": None, "epochs": 1, "validation_fraction": 0.25}, out=tmp_path / "run")
    with open(tmp_path / "run" / TABLE, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["train_loss"]) for line in lines] == [line["train_loss"] for line in run.history]
    assert lines[0]["test_accuracy"] == "" and float(lines[1]["test_accuracy"]) == run.test_accuracy
    exits = run.history[0]["exit_accuracies"]
    assert [float(lines[0][f"exit_accuracies_{k + 1}"]) for k in range(len(exits))] == exits


def events(folder):
    """{tag: [(step, value)]} of TensorBoard's files in a folder, in the order in which they were written."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            content = content[16 + size :]
    return found


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    run = train(**SMALL | VIT, out=tmp_path / "run", tensorboard=True)
    found = events(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["step/loss"]] == [*range(1, 10)]
    assert [step for step, _ in found["epoch/test_loss"]] == [3, 6, 9]
    np.testing.assert_allclose([value for _, value in found["epoch/test_loss"]], [line["test_loss"] for line in run.history], rtol=1e-6)


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"tensorboard needs tensorboardX .*: pip install 'minivit\[tensorboard\]'"):
        train(**SMALL, out=tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
