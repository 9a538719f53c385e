"""Runs that go on where they were stopped, and end with the same bits."""

import os
import shutil
import signal
import sys

import numpy as np
import pytest
from stopped_runs import SMALL, VIT, files_of, stop_at, stopped

import minivit
from benchmarks import kills
from benchmarks.kills import result_of
from minivit import UserError, train
from minivit.io.checkpoints import CHECKPOINTS
from minivit.io.run_folder import CONFIG, RunFolder
from minivit.training import loop, setup
from minivit.training.loop import Interrupted

RESIZED = {
    "model": "localvit_micro_patch4_32",
    "model_options": {"dim": 16, "depth": 1, "heads": 2, "stem_width": 4},
    "progressive_resizing": 0.65,
    "batch_size": 16,
}
GROWN = RESIZED | {"ema": 0.8, "epochs": 6}


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


@pytest.mark.parametrize("freeze", [None, "backbone", 1])
def test_a_given_model_learns_afterwards_what_it_learnt_before(tmp_path, monkeypatch, freeze):
    """What `freeze` froze can learn again, and what its owner froze cannot, as after a run that was not stopped."""

    def model():
        made = minivit.create_model("localvit_micro_patch2_8", dim=16, depth=1, heads=2, stem_width=4, seed=5)
        made.pos_embed.requires_grad = False
        made.blocks[0].norm1.frozen = True
        return made

    def state(run):
        trained = run.model.model
        parameters = [(name, parameter.requires_grad) for name, parameter in trained.named_parameters()]
        return parameters, [(name, module.frozen) for name, module in trained.named_modules()]

    options = {"model_options": None, "freeze": freeze, "augmentation": "none", "mixup": 0.0}
    expected = state(train(**SMALL | options | {"model": model()}, out=tmp_path / "whole"))
    stopped(monkeypatch, tmp_path / "run", 4, model=model(), **options)
    found = state(train(resume=tmp_path / "run", keep_checkpoint=True, progress=False))
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")
    assert found == expected
    assert dict(found[0])["blocks.0.attn.qkv.weight"] and not dict(found[0])["pos_embed"] and dict(found[1])["blocks.0.norm1"]


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
    assert found["equal"] == found["trainings"] == 2 and found["kills"] >= 1


def test_a_run_without_a_checkpoint_begins_again(tmp_path, whole, monkeypatch, capsys):
    stopped(monkeypatch, tmp_path / "run", 5, **VIT)
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS)  # as if it had been killed before the first one
    train(resume=tmp_path / "run", keep_checkpoint=True)
    assert "run has no checkpoint: it begins again" in capsys.readouterr().err
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
