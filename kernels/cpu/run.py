"""Running compiled kernels: one loop over the bands, shared by all kernels, and the replay of a list of calls without Python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from math import inf
from threading import get_ident, local
from time import monotonic
from typing import Any

import numba
import numpy as np

from .compile import compiled_loop
from .team import Team
from .views import call_entry


def _run_alone(address, bands, table):
    for band in range(bands):
        call_entry(address, band, table)


def _replay_alone(addresses, bands, tables):
    for i in range(len(addresses)):
        for band in range(bands[i]):
            call_entry(addresses[i], band, tables[i])


def most_threads() -> int:
    """The maximal number of threads: the cores available to this process, or NUMBA_NUM_THREADS."""
    return numba.config.NUMBA_NUM_THREADS


_run_bands_alone = compiled_loop("void(int64, int64, int64)", _run_alone, nogil=True)


@cache
def _compiled_replay_alone() -> Any:
    return compiled_loop("void(int64[::1], int64[::1], int64[::1])", _replay_alone, nogil=True)


SHARED = 0.1  # seconds: how long a thread of Python counts as a caller after it last ran kernels


class _Cores:
    """The cores of this process, which threads of Python that run kernels at the same time share, each with a team of its own.

    A child of fork has none of the helpers: there, every caller runs its kernels alone, with the same results.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.teams: list[Team] = []  # those that nobody leads
        self.last: dict[int, float] = {}  # when each caller ran kernels last; while it does, infinity

    def share(self, caller: int) -> int:
        """The number of cores for this caller, which begins to run kernels now."""
        since = monotonic() - SHARED
        for other, time in list(self.last.items()):
            if time < since:
                self.last.pop(other, None)
        self.last[caller] = inf
        return max(1, self.number // len(self.last))

    def team(self) -> Team:
        """A team that nobody leads now."""
        with suppress(IndexError):
            return self.teams.pop()
        return Team(self.number)


_cores = _Cores(most_threads())


def _after_fork() -> None:
    global _cores
    _cores = _Cores(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_bands(address: int, bands: int, table: int) -> None:
    """Run all bands of a compiled kernel now: address of its entry, and of the table of its arguments."""
    if bands == 1 or threads() == 1:
        _run_bands_alone(address, bands, table)
    else:
        replay(np.array([address]), np.array([bands]), np.array([table]), threads())


def replay(entries: np.ndarray, bands: np.ndarray, addresses: np.ndarray, number: int) -> None:
    """Run a list of calls, each with its entry, bands and table, shared among at most so many threads."""
    cores, caller = _cores, get_ident()
    try:
        number = min(number, cores.share(caller))
        if number == 1:
            _compiled_replay_alone()(entries, bands, addresses)
            return
        team = cores.team()
        try:
            team.run(entries, bands, addresses, number)
        finally:
            cores.teams.append(team)
    finally:
        cores.last[caller] = monotonic()


class _Setting(local):
    """What a thread of Python has set."""

    def __init__(self) -> None:
        self.threads = most_threads()


_setting = _Setting()


def threads() -> int:
    """The number of threads that the bands of a kernel are distributed to."""
    return min(_setting.threads, _cores.number)


@contextmanager
def threads_set(number: int) -> Iterator[None]:
    """Context manager: kernels that this thread launches or records run on `number` threads, 1 ... most_threads()."""
    previous, _setting.threads = _setting.threads, number
    try:
        yield
    finally:
        _setting.threads = previous
