"""Jobs done side by side by copies of the process: each once, by nobody for ever, and no copy outlives its parent."""

import os
import sys
import time
import warnings
from pathlib import Path

import pytest

from minivit.kernels.cpu import copies

linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled one after the other here")


def working(path, do=lambda: time.sleep(0.02)):
    """A job that notes who does it."""

    def job():
        with path.open("a") as file:
            file.write(f"{os.getpid()}\n")
        do()

    return job


def living(path):
    """The copies of this process among those that `working` noted."""
    return [number for number in {*path.read_text().split()} - {str(os.getpid())} if Path(f"/proc/{number}").exists()]


@linux
def test_copies_of_the_process_share_the_jobs(tmp_path):
    copies.side_by_side([working(tmp_path / "who")] * 12, 2)
    who = (tmp_path / "who").read_text().split()
    assert len(who) == 12 and len(set(who)) == 2 and str(os.getpid()) in who


@linux
@pytest.mark.parametrize("category", [DeprecationWarning, RuntimeWarning])
def test_nobody_is_warned_of_copies(tmp_path, monkeypatch, category):
    """Python and JAX warn of copies of a process with threads; these do nothing that waits for one."""
    fork = os.fork

    def warning_fork():
        warnings.warn("os.fork() was called", category, stacklevel=2)
        return fork()

    monkeypatch.setattr(os, "fork", warning_fork)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copies.side_by_side([working(tmp_path / "who")] * 12, 2)
    assert len({*(tmp_path / "who").read_text().split()}) == 2


@pytest.mark.parametrize("jobs, processes", [(12, 1), (5, 2)])
def test_little_is_left_to_whoever_needs_it(tmp_path, jobs, processes):
    copies.side_by_side([working(tmp_path / "who")] * jobs, processes)
    assert not (tmp_path / "who").exists()


@linux
@pytest.mark.parametrize("end", [lambda: os._exit(1), lambda: time.sleep(60), lambda: 1 / 0, lambda: os.kill(os.getpid(), 9)])
def test_a_copy_that_fails_stops_nobody(tmp_path, monkeypatch, end):
    monkeypatch.setattr(copies, "WAIT", 0.3)
    parent = os.getpid()
    start = time.monotonic()
    copies.side_by_side([working(tmp_path / "who", lambda: time.sleep(0.05) if os.getpid() == parent else end())] * 6, 2)
    assert time.monotonic() - start < 10
    assert not living(tmp_path / "who")


@linux
def test_an_interrupt_ends_the_copies(tmp_path):
    parent = os.getpid()

    def do():
        if os.getpid() == parent:
            raise KeyboardInterrupt
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        copies.side_by_side([working(tmp_path / "who", do)] * 6, 2)
    assert not living(tmp_path / "who")


@linux
def test_copies_end_with_a_process_that_is_killed(tmp_path):
    process = os.fork()
    if not process:
        copies.side_by_side([working(tmp_path / "who", lambda: time.sleep(60))] * 6, 2)
    end = time.monotonic() + 20
    while time.monotonic() < end and not ((tmp_path / "who").exists() and (tmp_path / "who").read_text().count("\n") == 2):
        time.sleep(0.01)
    os.kill(process, 9)
    os.waitpid(process, 0)
    while living(tmp_path / "who") and time.monotonic() < end:
        time.sleep(0.01)
    assert len((tmp_path / "who").read_text().split()) == 2 and not living(tmp_path / "who")
