"""Standard streams that are closed, full, or read by nobody: results that are lost are an error, progress that is lost is none."""

import io
import os
import shlex
import subprocess
import sys

import pytest

import minivit
from minivit.cli import main
from minivit.progress import say

SMALL = {"epochs": 2, "batch_size": 16, "limit": 48, "model_options": {"dim": 8, "depth": 1, "heads": 1}}
TRAIN = "train --epochs 2 --batch-size 16 --limit 48 --model-option dim=8 --model-option depth=1 --model-option heads=1 --out {out}"
RUN_FILES = ["config.json", "curves.png", "metrics.csv", "metrics.jsonl", "model.safetensors", "report.html"]
slow = pytest.mark.slow
COMMANDS = ["info", *(pytest.param(c, marks=slow) for c in ("--version", "--help", "train --help", "gradcheck softmax", "info {run}"))]
COMMANDS += [pytest.param(c, marks=slow) for c in ("eval {run} --quiet", "predict {run} {image}", "plot {run} --quiet", TRAIN + " --quiet")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return minivit.train(out=tmp_path_factory.mktemp("streams") / "run", progress=False, **SMALL).folder


@pytest.fixture
def in_a_shell(run, tmp_path):
    """in_a_shell(arguments, redirections): the exit status of minivit, its standard output and its standard error."""
    from PIL import Image

    image = tmp_path / "image.png"
    Image.new("L", (8, 8)).save(image)

    def call(arguments, redirections):
        arguments = arguments.format(run=shlex.quote(str(run)), image=shlex.quote(str(image)), out=shlex.quote(str(tmp_path / "out")))
        line = f"{shlex.quote(sys.executable)} -m minivit {arguments} {redirections}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    return call


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", COMMANDS)
@pytest.mark.parametrize(
    "redirection, told",
    [
        (">/dev/full", "cannot write results to standard output: No space left on device"),
        (">&-", "standard output is closed, and the results are written there: redirect it to a file, or to /dev/null"),
    ],
)
def test_results_that_are_lost(in_a_shell, arguments, redirection, told):
    assert in_a_shell(arguments, redirection) == (2, "", f"minivit: {told}\n")
    assert in_a_shell(arguments, f"{redirection} 2>&-") == (2, "", "")


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_reader_that_leaves(in_a_shell, arguments):
    assert in_a_shell(arguments, "| true") == (0, "", "")


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_reader_that_leaves_in_the_middle(tmp_path, unbuffered):
    code = "from minivit.cli import info, main; info.run = lambda _: [print('x' * 999) for _ in range(999)] and 7; exit(main(['info']))"
    process = subprocess.Popen(
        [sys.executable, *(["-u"] if unbuffered else []), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (0, "")


@pytest.mark.parametrize(
    "redirection",
    ["2>&-", "2>/dev/full", pytest.param("2> >(true)", marks=slow), pytest.param("2> >(head -1 >/dev/null)", marks=slow)],
)
def test_training_goes_on_without_standard_error(in_a_shell, tmp_path, redirection):
    status, output, told = in_a_shell(TRAIN, redirection)
    assert (status, told) == (0, "")
    assert output.startswith("test accuracy ") and output.count("\n") == 1
    assert files(tmp_path / "out") == RUN_FILES


class Broken(io.StringIO):
    """A terminal that has gone away."""

    def isatty(self):
        return self.terminal

    def write(self, text):
        raise OSError(5, "Input/output error")

    def flush(self):
        self.write("")


@pytest.mark.parametrize("kind", [None, "closed", "broken", "broken terminal"])
def test_training_goes_on_without_a_stream(tmp_path, monkeypatch, kind):
    stream = None if kind is None else io.StringIO() if kind == "closed" else Broken()
    if kind == "closed":
        stream.close()
    if stream is not None:
        Broken.terminal = kind == "broken terminal"
    monkeypatch.setattr(sys, "stderr", stream)
    assert len(minivit.train(out=tmp_path / "run", **SMALL).history) == 2
    assert files(tmp_path / "run") == RUN_FILES
    assert main(["train", "--nothing"]) == 2


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    code = "import os; from minivit.cli import main; main(['info']); os.fstat(0); os.fstat(2); print(os.open(os.devnull, os.O_RDONLY) > 2)"
    done = subprocess.run(["bash", "-c", f'"$0" -c "{code}" <&- 2>&-', sys.executable], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["True"]


def test_a_line_has_escapes_for_what_a_terminal_would_obey(capsys):
    say("run \x1b[31m\nred")
    assert capsys.readouterr().err == "run \\x1b[31m\\nred\n"
