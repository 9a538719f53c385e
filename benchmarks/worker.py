"""A contender in a process of its own, so that each side has the cores, the thread pool and the memory to itself while it works.

The parent sends pickled calls and gets pickled answers; in between the process sleeps. It imports no more than its side needs.
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from .sides import Side

ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Problem:
    """What all sides compute: a model with its weights, one batch, and AdamW's settings."""

    family: str  # or "product": a chain of linear layers, whose speed is the machine's limit
    config: dict[str, Any]  # the fields of the family's Config
    weights: dict[str, np.ndarray]  # by timm's names
    batch: int
    adamw: dict[str, float]  # lr, weight_decay, eps

    @cached_property
    def images(self) -> np.ndarray:  # (B, C, S, S)
        size = self.config["image_size"]
        return np.random.default_rng(0).standard_normal((self.batch, self.config["in_channels"], size, size), np.float32)

    @cached_property
    def labels(self) -> np.ndarray:  # (B,)
        return np.random.default_rng(1).integers(0, self.config["num_classes"], self.batch)


class Contender(Protocol):
    """A side at work; `ours.py`, `rivals.py` and `runtimes.py` have a class of this name, made from a Problem and a Side."""

    def train(self) -> float:
        """One training step; the loss before it."""

    def infer(self) -> np.ndarray:
        """The logits (B, K) of the batch."""

    def weights(self) -> dict[str, np.ndarray]:
        """The weights as they are now, in float32."""


class Worker:
    """The parent's end. `call` knows the Contender's methods and two more:

    turn(method, steps): the seconds of each of `steps` calls. memory(): the most bytes resident before the contender was made, and so far.
    """

    def __init__(self, side: Side, problem: Problem, threads: int) -> None:
        self.name = side.name
        command = [sys.executable, "-c", f"from benchmarks.worker import serve; serve({side.module!r})"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
        )
        try:
            self._ask((problem, side))
        except BaseException:
            self.__exit__()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises RuntimeError, with the other process's traceback, for what goes wrong there."""
        return self._ask((method, arguments))

    def _ask(self, question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            pickle.dump(question, self.process.stdin)
            self.process.stdin.flush()
            succeeded, answer = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"the process of {self.name} ended with status {self.process.wait()}") from None
        if not succeeded:
            raise RuntimeError(f"in the process of {self.name}:\n{answer}")
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()  # its sign to end
        self.process.stdout.close()
        self.process.wait()


def serve(module: str) -> None:
    """The child's end: answer calls until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get in between
    make = import_module(f"benchmarks.{module}").Contender
    at_start = peak_memory()
    contender: Any = None
    own: dict[str, Callable] = {
        "turn": lambda method, steps: _turn(getattr(contender, method), steps),
        "memory": lambda: (at_start, peak_memory()),
    }
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if contender is None:
                contender, answer = make(*question), None
            else:
                method, arguments = question
                answer = (own.get(method) or getattr(contender, method))(*arguments)
            reply = True, answer
        except Exception:
            reply = False, traceback.format_exc()
        pickle.dump(reply, answers)
        answers.flush()


def _turn(function: Callable[[], Any], steps: int) -> list[float]:
    """The seconds of each of `steps` calls; one before them brings threads and caches back."""
    function()
    times = []
    for _ in range(steps):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return times


def peak_memory() -> int:
    """The most bytes of memory that this process has had resident so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins at what the parent had when it forked
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
