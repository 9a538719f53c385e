"""Stages for the tests of first_contact."""

import os
import signal
import time


def fine(setting):
    yield {"tiny": setting.tiny, "result": "a result"}


def wrong(setting):
    yield {"right": True}
    yield {"right": False, "failure": "a wrong number"}


def hangs(setting):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield {"before": "it hangs"}
    if os.fork() == 0:  # and so does a process that it began
        time.sleep(600)
    time.sleep(600)


def fails(setting):
    yield {"before": "it fails"}
    raise ValueError("a stage that fails")
