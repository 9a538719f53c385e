"""The command line: minivit train | eval | predict | serve | calibrate | plot | report | compare | export | gradcheck | info.

Results are written to standard output, progress and errors to standard error. Exit status: 0, also if the reader of standard output closes
it; 1 if a gradient check fails or a loss is not finite; 2 for a user error or results that cannot be written, reported in one line; 130 for
an interrupt and 143 for SIGTERM, but 0 where a server ends in order. Expensive modules are imported only by the commands that need them.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from typing import Any, NoReturn, TextIO, cast

from ..errors import DeviceError, UserError, nearest, reason
from ..interrupts import check_interrupt, deferred, interruptible, received
from ..progress import UNUSABLE, say
from ..version import __version__

COMMANDS = {  # help text by command; each command is a module of this package with `configure` and `run`
    "train": "train a model; without options, a small vision transformer on handwritten digits",
    "eval": "test accuracy of a trained model",
    "predict": "label images: path, label and probability, a line each; of a cascade also the exit and its million multiply-adds",
    "serve": "label images over HTTP, and on a page for browsers, until SIGTERM or Ctrl-C",
    "calibrate": "thresholds by which a cascade stops early, for budgets; they are saved with the model",
    "plot": "draw all pictures that fit a run into its folder; the path of each, a line each",
    "report": "write a page about a run into its folder: accuracy of each class, mistakes, probabilities, cost",
    "compare": "the results of several runs side by side, and in what their options differ",
    "export": "write a trained model for other programs: ONNX, or weights by timm's names",
    "gradcheck": "check the kernels' gradients and accuracy on this machine",
    "info": "what minivit sees of this machine; of a model, its parameters and multiply-adds",
}


class Parser(argparse.ArgumentParser):
    """Raises UserError for invalid arguments."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help tells more")


class _ReaderLeft(Exception):
    """Nobody reads standard output any more, as in `minivit ... | head -1`."""


class _Results:
    """Standard output. A failure to write is a UserError, or `_ReaderLeft`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _telling_failures():
            return self._stream.write(text)

    def flush(self) -> None:
        with _telling_failures():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the arguments of this process; returns the exit status."""
    with interruptible(signal.SIGINT, signal.SIGTERM, again=signal.SIG_DFL):
        try:
            try:
                status = _run(sys.argv[1:] if arguments is None else list(arguments))
            finally:
                _drop_what_cannot_be_written()
            check_interrupt()
        except KeyboardInterrupt as interrupt:  # also one that comes while streams are dropped
            say(f"minivit: {str(interrupt) or 'interrupted'}")
            status = 128 + (received() or signal.SIGINT)
            _drop_what_cannot_be_written()
    return status


def _run(arguments: list[str]) -> int:
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged images, of which minivit tells in its own words
    try:
        with _standard_streams():
            options = _parse(arguments)
            with _on_threads(getattr(options, "threads", None)):
                return _module(options.command).run(options)
    except (UserError, DeviceError) as error:
        say(f"minivit: {error}")
        return getattr(error, "status", 2)
    except _ReaderLeft:
        return 0


@contextmanager
def _telling_failures() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _ReaderLeft from None
    except OSError as error:
        raise UserError(f"cannot write results to standard output: {reason(error)}") from error


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Inside, standard output tells of failures, and at the end all has been written. Raises UserError if it is closed."""
    for number in range(3):  # a file that is opened later must not get the number of a closed stream, to which C libraries write
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    if sys.stdout is None:
        raise UserError("standard output is closed, and the results are written there: redirect it to a file, or to /dev/null")
    _escape_what_cannot_be_encoded()
    with redirect_stdout(cast(TextIO, _Results(sys.stdout))):
        try:
            yield
        finally:
            sys.stdout.flush()


def _drop_what_cannot_be_written() -> None:
    """Leave nothing for Python to write when it ends: it would fail again, and print that, or change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(*UNUSABLE):
            try:
                stream.flush()
            except OSError:
                number, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)


def _escape_what_cannot_be_encoded() -> None:
    """Let a terminal or pipe of any encoding show any name: characters that it lacks become escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _on_threads(number: int | None) -> Iterator[None]:
    """Inside, this number of threads compute; None changes nothing. Raises UserError."""
    if number is None:
        yield
        return
    from ..kernels.cpu.run import threads_set
    from ..runtime.threads import thread_count

    with threads_set(thread_count(number)):
        yield


def _module(command: str) -> Any:
    """The module of a command, imported on demand, because it imports everything that the command uses."""
    with deferred():
        return import_module(f".{command}", __package__)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("minivit", description="Train and run small vision transformers and mixers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"minivit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    name = arguments[0] if arguments else "--help"
    if not name.startswith("-") and name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}: choose {', '.join(COMMANDS)}")
    subparsers = {n: commands.add_parser(n, help=text, description=text, allow_abbrev=False) for n, text in COMMANDS.items()}
    if name in COMMANDS:  # the other commands are not configured, which avoids their imports
        _module(name).configure(subparsers[name])
        subparsers[name].add_argument("--json", action="store_true", help="print the result as JSON")
    options, unknown = parser.parse_known_args(arguments or ["--help"])
    if unknown:
        option_names = [option for action in subparsers[name]._actions for option in action.option_strings]
        raise UserError(f"unknown option {unknown[0]}{nearest(unknown[0], option_names)}; minivit {name} --help lists them")
    return options
