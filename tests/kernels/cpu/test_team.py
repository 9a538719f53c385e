"""Teams: every band of every call runs once, after all bands of the calls before, whoever is late, asleep, missing or busy elsewhere."""

import _thread
import os
import time

import numpy as np
import pytest

from minivit.kernels.cpu import run
from minivit.kernels.cpu.kernel import Calls, kernel
from minivit.kernels.cpu.team import Team


@kernel
def _count(band, bands, counts, previous, work):
    """Each band adds to its own count one more than the smallest count that the call before left."""
    least = previous[0]
    for i in range(len(previous)):
        least = min(least, previous[i])
    for _ in range(work):
        least = least * 0.5 + least * 0.5  # takes time
    counts[band] += 1 + least


def chain(bands, work=0):
    """Calls that each read what all bands of the call before wrote, and what they must write."""
    counts = [np.zeros(n) for n in (1, *bands)]
    wanted = [np.full(n, float(i)) for i, n in enumerate(bands, start=1)]
    calls = Calls([(_count, n, (counts[i + 1], counts[i], work)) for i, n in enumerate(bands)], 1)
    return calls, counts, wanted


def check(team, threads, bands, work=0):
    calls, counts, wanted = chain(bands, work)
    team.run(calls.entries, calls.bands, calls.addresses, threads)
    for found, right in zip(counts[1:], wanted):
        assert np.array_equal(found, right)


@pytest.fixture(scope="module")
def teams():
    return {size: Team(size) for size in (1, 2, 5)}  # also more than there are cores


@pytest.mark.parametrize("size, threads", [(1, 1), (2, 1), (2, 2), (5, 2), (5, 5)])
def test_every_band_runs_once_and_in_order(teams, size, threads):
    rng = np.random.default_rng(0)
    for _ in range(100):
        check(teams[size], threads, rng.integers(1, 12, rng.integers(1, 60)).tolist())
    check(teams[size], threads, [1])
    check(teams[size], threads, [3, 1, 1000, 1, 2], work=10_000)


@pytest.mark.parametrize("pause", [0, 1e-5, 1e-4, 1e-3, 1e-2])
def test_helpers_that_fall_asleep_wake(teams, pause):
    for _ in range(20):
        time.sleep(pause)
        check(teams[5], 5, [5] * 10)


def test_helpers_take_part(teams):
    """Two bands of about 50 ms: the caller computes for half of the time that both threads do, once both have a core."""
    parts, end = [1.0], time.monotonic() + 30  # where other processes compile meanwhile, the system may start the helper late
    while min(parts) >= 0.7 and time.monotonic() < end:
        process, caller = time.process_time(), time.thread_time()
        check(teams[2], 2, [2], work=10_000_000)
        parts.append((time.thread_time() - caller) / (time.process_time() - process))
    assert min(parts) < 0.7


@pytest.mark.parametrize("failing", [(_thread, "start_new_thread", RuntimeError), (os, "pipe", OSError)])
def test_without_helpers_the_caller_does_the_work(failing, monkeypatch):
    module, name, error = failing

    def refuse(*arguments):
        raise error

    monkeypatch.setattr(module, name, refuse)
    check(Team(3), 3, [3, 1, 7, 2])


def test_callers_share_the_cores():
    cores = run._Cores(4)
    assert [cores.share(caller) for caller in (1, 2, 3, 4, 5)] == [4, 2, 1, 1, 1]
    cores.last |= dict.fromkeys((2, 3, 4), time.monotonic() - 2 * run.SHARED) | {5: time.monotonic()}
    assert cores.share(1) == 2
    cores.last[5] -= 2 * run.SHARED
    assert cores.share(1) == 4
