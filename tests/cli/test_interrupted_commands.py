"""Interrupts of the command line: one line, status 130 (143 for SIGTERM), whatever the process does at that moment."""

import os
import signal
import subprocess
import sys
import time

import pytest

from minivit.cli import info as info_command
from minivit.cli import main
from minivit.io.run_folder import NEXT

TRAIN = ["train", "--epochs", "2", "--batch-size", "16", "--limit", "48", "--quiet"]
TRAIN += [f"--model-option={option}" for option in ("dim=8", "depth=1", "heads=1")]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}

# Sends itself a signal when a module is about to be imported.
AT_AN_IMPORT = """
import os, runpy, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder())
sys.argv[1:] = {arguments!r}
runpy.run_module("minivit", run_name="__main__")
"""

# Ignores the time in which a step of training would come.
IN_LONG_WORK = """
import sys, time
from minivit import __main__, interrupts
from minivit.cli import info

def run(options):
    with interrupts.deferred():
        print("works", flush=True)
        time.sleep(60)
    return 0

info.run = run
sys.argv[1:] = ["info"]
sys.exit(__main__.main())
"""


@pytest.mark.parametrize(
    "name, number",
    [
        ("numpy._core._multiarray_umath", signal.SIGINT),  # where NumPy would tell how to install NumPy
        ("minivit.training.train", signal.SIGTERM),
        *(pytest.param(name, number, marks=pytest.mark.slow) for name in ("difflib", "numpy", "datetime", "numba") for number in STATUS),
    ],
)
def test_while_modules_are_imported(tmp_path, name, number):
    code = AT_AN_IMPORT.format(name=name, number=int(number), arguments=[*TRAIN, "--out", str(tmp_path / "run")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (STATUS[number], "", "minivit: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", STATUS)
def test_while_a_model_is_trained(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr("minivit.training.loop.Progress.step", lambda self: signal.raise_signal(number))
    assert main([*TRAIN, "--out", str(tmp_path / "run")]) == STATUS[number]
    state = f"{tmp_path / 'run'} holds the model after 0 of 2 epochs; minivit train --resume {tmp_path / 'run'} goes on"
    assert capsys.readouterr() == ("", f"minivit: interrupted; {state}\n")


def test_while_a_run_is_overwritten(tmp_path, monkeypatch, capsys):
    arguments = [*TRAIN, "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    on = f"minivit train --resume {tmp_path / 'run'} goes on with the new one instead"
    for moment, state, beside in (
        ("minivit.training.train.load_data", "interrupted before training began; nothing was written", set()),
        ("minivit.training.loop.Progress.step", f"interrupted; {tmp_path / 'run'} holds the earlier run as it was; {on}", {NEXT}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(moment, lambda *arguments, **options: signal.raise_signal(signal.SIGINT))
            assert main([*arguments, "--overwrite"]) == 130
        assert capsys.readouterr() == ("", f"minivit: {state}\n")
        files = {path.name: path for path in (tmp_path / "run").iterdir()}
        assert files.keys() == before.keys() | beside
        assert {name: files[name].read_bytes() for name in before} == before


@pytest.mark.parametrize("number", STATUS)
def test_of_another_command(monkeypatch, capsys, number):
    monkeypatch.setattr(info_command, "run", lambda options: signal.raise_signal(number))
    assert main(["info"]) == STATUS[number]
    assert capsys.readouterr() == ("", "minivit: interrupted\n")


@pytest.mark.parametrize("number", STATUS)
def test_while_the_command_ends(monkeypatch, capsys, number):
    signals = [number]
    monkeypatch.setattr(
        sys.modules["minivit.cli.main"], "_drop_what_cannot_be_written", lambda: signals and signal.raise_signal(signals.pop())
    )
    assert main(["info", "--json"]) == STATUS[number]
    assert capsys.readouterr().err == "minivit: interrupted\n"


def test_a_second_one_ends_at_once():
    process = subprocess.Popen([sys.executable, "-c", IN_LONG_WORK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "works\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == -signal.SIGINT
    assert process.communicate() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2.0, 4.0, 8.0])
def test_while_kernels_are_compiled(tmp_path, seconds):
    process = subprocess.Popen(
        [sys.executable, "-m", "minivit", *TRAIN, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, told = process.communicate(timeout=60)
    assert (process.returncode, output, told.count("\n")) == (130, "", 1)
    assert told.startswith("minivit: interrupted")
