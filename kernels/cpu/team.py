"""A team of threads that runs a list of compiled kernels, band by band.

The caller and its helpers go through the list side by side. Of each call, a thread first runs the bands of its own share, then those that
others have not begun yet; it goes on to the next call when all bands of this one are done. So nobody waits for a helper that sleeps or that
the system has suspended, unless in the middle of a band, and each thread finds the rows that it wrote in its own caches.

Helpers wait for the next list in a loop, and sleep after about 0.4 ms, until a caller wakes them, which takes 0.1 ms. Whoever waits for the
bands of others for more than 0.1 ms gives way to other threads.
"""

from __future__ import annotations

import _thread
import os
from functools import cache
from typing import Any

import numpy as np

from ..core.devices import address_of
from . import atomics
from .compile import compiled_loop, routine
from .views import call_entry

# The words that a team shares, as offsets in bytes. Those that are written while others read have a cache line of their own.
LIST, JOINED, LEFT = 0, 64, 128  # the number of the list that is being run, or 0; how many helpers have begun a list, and ended it
CALLS, THREADS, ENTRIES, BANDS, TABLES, PROGRESS = 192, 200, 208, 216, 224, 232  # the list: two numbers, and addresses
HELPERS, HELPER = 256, 64  # from here on, so many bytes for each helper:
SLEEPS, PIPE_IN, PIPE_OUT, BYTE = 0, 8, 16, 24  # 1 while it sleeps or is about to; where a byte wakes it
SPINS = 4096  # turns of a waiting loop, of 10 to 40 ns, before others are let go first
IDLE = 4 * SPINS  # turns before a helper sleeps


@routine
def _run_share(entry, bands, table, progress, thread, threads):
    """Run bands of one call: those of this thread's share, then those that are left of others'.

    progress: address of 1 + threads words: how many bands are done, and how many each share has given away.
    """
    count = 0
    for i in range(threads):
        share = (thread + i) % threads
        first, last = (share * bands + threads - 1) // threads, ((share + 1) * bands + threads - 1) // threads
        given = progress + 8 + 8 * share
        while first + atomics.load(given) < last:
            band = first + atomics.add(given, 1)
            if band < last:
                call_entry(entry, band, table)
                count += 1
    if count:
        atomics.add(progress, count)


@routine
def _wait(address, number):
    """Wait until this word is at least the number."""
    turns = 0
    while atomics.load(address) < number:
        if turns < SPINS:
            turns += 1
            atomics.pause()
        else:
            atomics.give_way()


@routine
def _run_list(team, thread):
    """Run the calls of the list with the others."""
    calls, threads = atomics.load(team + CALLS), atomics.load(team + THREADS)
    entries, all_bands, tables = atomics.load(team + ENTRIES), atomics.load(team + BANDS), atomics.load(team + TABLES)
    progress = atomics.load(team + PROGRESS)
    for i in range(calls):
        bands = atomics.load(all_bands + 8 * i)
        if atomics.load(progress) < bands:
            _run_share(atomics.load(entries + 8 * i), bands, atomics.load(tables + 8 * i), progress, thread, threads)
            _wait(progress, bands)
        progress += 8 + 8 * threads


def _lead(team, calls, entries, bands, tables, progress, threads, number):
    """Run a list of calls with the helpers 1 ... threads - 1.

    progress: address of zeros, 1 + threads words for each call. number: of the list; another than of all lists before, and not 0.
    """
    atomics.store(team + CALLS, calls)
    atomics.store(team + THREADS, threads)
    atomics.store(team + ENTRIES, entries)
    atomics.store(team + BANDS, bands)
    atomics.store(team + TABLES, tables)
    atomics.store(team + PROGRESS, progress)
    atomics.store(team + LIST, number)
    for i in range(threads - 1):
        helper = team + HELPERS + i * HELPER
        if atomics.load(helper + SLEEPS) and atomics.exchange(helper + SLEEPS, 0):
            atomics.write(atomics.load(helper + PIPE_IN), helper + BYTE, 1)
    _run_list(team, 0)
    atomics.store(team + LIST, 0)
    _wait(team + LEFT, atomics.load(team + JOINED))  # none joins any more, and those inside have nothing left to run


def _help(team, thread):
    """What a helper does, for ever."""
    helper, seen = team + HELPERS + (thread - 1) * HELPER, 0
    while True:
        turns = 0
        while atomics.load(team + LIST) == 0 or atomics.load(team + LIST) == seen:
            turns += 1
            atomics.pause()
            if turns > IDLE:
                atomics.store(helper + SLEEPS, 1)
                number = atomics.load(team + LIST)
                # If a list came meanwhile, and its caller has already taken the 1, its byte must be read.
                if number == 0 or number == seen or atomics.exchange(helper + SLEEPS, 0) == 0:
                    atomics.read(atomics.load(helper + PIPE_OUT), helper + BYTE, 1)
                turns = 0
        number = atomics.load(team + LIST)
        atomics.add(team + JOINED, 1)
        if number and atomics.load(team + LIST) == number:
            seen = number
            if thread < atomics.load(team + THREADS):
                _run_list(team, thread)
        atomics.add(team + LEFT, 1)


@cache
def compiled_loops() -> tuple[Any, Any]:
    """`_lead` and `_help`."""
    lead = compiled_loop("void(int64, int64, int64, int64, int64, int64, int64, int64)", _lead, nogil=True)
    return lead, compiled_loop("void(int64, int64)", _help, nogil=True)


class Team:
    """A caller and `size` - 1 helpers, which exist as long as the process. One thread of Python leads it at a time."""

    def __init__(self, size: int) -> None:
        self.size, self.lists = size, 0
        self._words, self._progress = _zeros(HELPERS // 8 + (size - 1) * HELPER // 8), _zeros(256)
        self._lead, help_ = compiled_loops()
        team = address_of(self._words)
        _teams.append(self)  # helpers use the words for ever
        for i in range(size - 1):
            first = (HELPERS + i * HELPER) // 8
            try:
                self._words[first + PIPE_OUT // 8], self._words[first + PIPE_IN // 8] = os.pipe()
                _thread.start_new_thread(help_, (team, 1 + i))
            except (OSError, RuntimeError):  # no more open files, or no more threads: those that exist do the work
                break

    def run(self, entries: np.ndarray, bands: np.ndarray, tables: np.ndarray, threads: int) -> None:
        """Run a list of calls, each with its entry, bands and table, on at most `size` threads."""
        calls = len(entries)
        words = calls * (1 + threads)
        if words > len(self._progress):
            self._progress = _zeros(2 * words)
        self._progress[:words] = 0
        self.lists += 1
        self._lead(
            address_of(self._words),
            calls,
            address_of(entries),
            address_of(bands),
            address_of(tables),
            address_of(self._progress),
            threads,
            self.lists,
        )


_teams: list[Team] = []


def _zeros(words: int) -> np.ndarray:
    """An array of words that begins with a cache line."""
    memory = np.zeros(words + 8, np.int64)
    return memory[-(memory.ctypes.data // 8) % 8 :][:words]
