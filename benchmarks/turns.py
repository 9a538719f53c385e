"""Sides at work by turns, each in a process of its own, the others asleep meanwhile."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from time import sleep
from typing import Any

from .measure import Summary
from .sides import Side
from .worker import Problem, Worker

PAUSE = 0.1  # seconds before a turn: the other side's threads have stopped spinning
MOST_STEPS = 200  # in a turn


@dataclass(frozen=True)
class Task:
    side: Side
    problem: Problem
    workload: str  # "train" or "infer"


@dataclass(frozen=True)
class Measured:
    rounds: list[list[float]]  # the seconds of each step of each turn
    memory: tuple[int, int]  # the most bytes resident before the contender was made, and in all

    @property
    def medians(self) -> list[float]:
        """Of each turn."""
        return [median(turn) for turn in self.rounds]

    def entry(self, batch: int) -> dict[str, Any]:
        """For the result: times in seconds, memory in bytes."""
        times = Summary.of([t for turn in self.rounds for t in turn])
        start, most = self.memory
        return {
            "seconds": times.median,
            "spread": times.spread,
            "images_per_second": batch / times.median,
            "peak_memory": most,
            "memory_after_imports": most - start,
            "round_medians": self.medians,
        }


def steps_for(worker: Worker, workload: str, seconds: float, least: int) -> int:
    """How many steps fill a turn; those that it takes to learn this are the warm-up."""
    usual = median(worker.call("turn", workload, 2))
    return max(least, min(MOST_STEPS, round(seconds / usual)))


def trial(worker: Worker, workload: str, options: Namespace) -> float:
    """The seconds of a step, roughly: the least of one short turn, which other work on the machine changes little."""
    return min(worker.call("turn", workload, steps_for(worker, workload, options.trial_seconds, 1)))


def alternate(tasks: Mapping[str, Task], options: Namespace, done: Callable[[], Any]) -> dict[str, Measured]:
    """By name, what each task took. done: called after each round."""
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(task.side, task.problem, options.threads)) for name, task in tasks.items()}
        steps = {name: steps_for(worker, tasks[name].workload, options.seconds, options.steps) for name, worker in workers.items()}
        rounds: dict[str, list[list[float]]] = {name: [] for name in tasks}
        for _ in range(options.rounds):
            for name, worker in workers.items():
                sleep(PAUSE)
                rounds[name].append(worker.call("turn", tasks[name].workload, steps[name]))
            done()
        return {name: Measured(rounds[name], worker.call("memory")) for name, worker in workers.items()}
