"""Paths that cannot be used, and ways to start Python: one line and status 2, or the command works."""

import os
import subprocess
import sys

import pytest

from minivit import UserError, create_model, load_weights
from minivit.cli import main

LONG = "a" * 300
RUNS = ("predict {} x.png", "eval {}", "calibrate {}", "plot {}", "info {}")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.mkfifo("fifo.safetensors")
    os.symlink("loop", "loop2")
    os.symlink("loop2", "loop")
    return tmp_path


@pytest.mark.parametrize(
    "path, reason",
    [
        (LONG, "cannot be a path: File name too long"),
        ("loop", "cannot be a path: Too many levels of symbolic links"),
        ("~nosuchuser/run", "cannot be a path: "),
        ("fifo", "fifo"),
    ],
)
@pytest.mark.parametrize("command", [*RUNS, "train --out {}", "train --out {} --overwrite", "train --data {}"])
def test_a_path_that_cannot_be_used(folder, capsys, command, path, reason):
    before = sorted(os.listdir(folder))
    assert main(command.format(path).split()) == 2
    output, told = capsys.readouterr()
    assert output == "" and told.startswith("minivit: ") and told.count("\n") == 1 and reason in told
    assert sorted(os.listdir(folder)) == before


def test_weights_that_are_no_file():
    with pytest.raises(UserError, match="not a regular file"):
        load_weights(create_model("vit_nano_patch2_8", depth=1), "fifo.safetensors")


@pytest.mark.parametrize("model", ["ff_only_nano_patch2_8", "mixer_nano_patch2_8", "vit_nano_patch2_8"])
def test_an_option_that_a_cascade_sets(capsys, model):
    assert main(["train", "--model", model, "--model-option", "extra_channels=5"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("minivit: ") and "extra_channels" in told and told.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--help", "train --help", "info", "gradcheck softmax", "train --epochs 1 --limit 48 --batch-size 16"])
def test_without_docstrings_and_asserts(command):
    done = subprocess.run([sys.executable, "-OO", "-m", "minivit", *command.split()], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
