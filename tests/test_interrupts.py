"""Interrupts: none is lost, also in callbacks from C, where Python only prints a KeyboardInterrupt."""

import ctypes
import os
import signal
import threading

import numpy as np
import pytest
from numba.core.ccallback import CFunc

import minivit
from minivit import interrupts
from minivit.interrupts import check_interrupt, deferred, interruptible, received
from minivit.kernels.cpu.kernel import kernel

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
INTERRUPT = signal.SIGINT


def interrupt(number=INTERRUPT):
    signal.raise_signal(number)


def interrupt_in_a_callback():
    ctypes.CFUNCTYPE(None)(interrupt)()


@pytest.fixture(autouse=True)
def handlers():
    """Python's own handlers before each test, and again after it."""
    numbers = INTERRUPT, signal.SIGTERM
    before = [signal.signal(number, handler) for number, handler in zip(numbers, (signal.default_int_handler, signal.SIG_DFL))]
    yield
    assert signal.getsignal(INTERRUPT) is signal.default_int_handler
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_an_interrupt_that_a_callback_swallows_comes_at_the_next_check():
    with interruptible(INTERRUPT):
        check_interrupt()
        interrupt_in_a_callback()
        assert received() == INTERRUPT
        with pytest.raises(KeyboardInterrupt):
            check_interrupt()
    check_interrupt()


def test_an_interrupt_waits_for_the_end_of_a_deferred_block():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():
        with deferred():
            pass
        interrupt()
        done.append("inner")
    with interruptible(INTERRUPT), pytest.raises(KeyboardInterrupt), deferred():
        interrupt()
        done.append("outer")
    assert done == ["inner", "outer"]


def test_another_error_in_a_deferred_block_goes_first():
    with pytest.raises(ValueError, match="first"), deferred():
        interrupt()
        raise ValueError("first")


def test_a_second_interrupt_does_not_wait(monkeypatch):
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():
        interrupt()
        interrupt()  # some programs send a signal to a process and again to its group
        done.append("the same")
        monkeypatch.setattr(interrupts, "SAME", -1.0)
        interrupt()
        done.append("another")
    assert done == ["the same"]


def test_handlers_of_others_stay():
    calls = []
    for handler in (signal.SIG_IGN, lambda number, frame: calls.append(number)):
        signal.signal(INTERRUPT, handler)
        with interruptible(INTERRUPT), deferred():
            assert signal.getsignal(INTERRUPT) is handler
            interrupt()
        signal.signal(INTERRUPT, signal.default_int_handler)
    assert calls == [INTERRUPT]


def test_other_threads_are_not_interrupted():
    found = []

    def work():
        with interruptible(INTERRUPT), deferred():
            started.set()
            sent.wait(10)
        check_interrupt()
        found.append("done")

    started, sent = threading.Event(), threading.Event()
    worker = threading.Thread(target=work)
    with interruptible(INTERRUPT):
        worker.start()
        started.wait(10)
        with pytest.raises(KeyboardInterrupt):  # at once: what the other thread defers does not count
            interrupt()
        sent.set()
        worker.join()
    assert found == ["done"]


def test_an_interrupt_while_numba_compiles_is_not_lost(monkeypatch):
    def _copied(band, bands, y, x):
        y[:] = x

    monkeypatch.setattr(CFunc, "compile", lambda self: interrupt_in_a_callback())
    x = np.arange(3.0)
    with pytest.raises(KeyboardInterrupt):
        kernel(_copied).prepare(1, [np.empty_like(x), x])


def test_an_interrupt_that_is_swallowed_ends_training_at_the_same_step(tmp_path, monkeypatch):
    steps = []

    def step(self):
        steps.append(self)
        interrupt_in_a_callback()

    monkeypatch.setattr("minivit.training.loop.Progress.step", step)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted; .*run holds the model after 0 of 2 epochs"):
        minivit.train(
            epochs=2, limit=48, batch_size=16, out=tmp_path / "run", progress=False, model_options={"dim": 8, "depth": 1, "heads": 1}
        )
    assert len(steps) == 1
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "config.json", "model.safetensors"]
