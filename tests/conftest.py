"""What all tests share."""

import os
import signal
from contextlib import ExitStack, nullcontext

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported: the processes of the tests share the cores already

import numpy as np
import pytest
from cuda_emulation import emulator, listing
from hypothesis import HealthCheck, settings

from minivit.errors import DeviceError
from minivit.kernels.core import arrays, devices
from minivit.kernels.cpu import run

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs in the background ignore it, and so would what tests start

settings.register_profile(
    "minivit",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("minivit")


def gpu_missing() -> str:
    """Why there is no GPU to test on, or ""."""
    try:
        devices.runtime()
    except DeviceError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def cuda_runtime():
    """What runs the CUDA kernels: a GPU, or the emulator where there is none."""
    if gpu_missing():
        if emulator.unavailable():
            pytest.skip(emulator.unavailable())
        with emulator.alone():  # what one process of the tests builds, another finds
            emulator.build(listing.kernels_of_ops())
        return emulator.Emulator()
    return devices.runtime()


@pytest.fixture
def kernels_of(request):
    """kernels_of(implementation): what runs inside can run an op's "cpu", "cuda" or "reference"."""
    return lambda implementation: devices.using(request.getfixturevalue("cuda_runtime")) if implementation == "cuda" else nullcontext()


class _Poisoned:
    """NumPy, but `empty` is full of NaN."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def empty(shape, dtype):
        return np.full(shape, 0xFF, np.uint8).view(dtype)


@pytest.fixture
def poisoned_scratch(monkeypatch):
    """A kernel's scratch memory starts as NaN, so that reading what was never written shows."""
    monkeypatch.setattr(arrays, "np", _Poisoned())


@pytest.fixture
def set_threads():
    """Set the number of threads that share a kernel; afterwards it is as before. Skips the test where the machine has fewer."""
    with ExitStack() as stack:

        def set_or_skip(number):
            if number > run.most_threads():
                pytest.skip(f"needs {number} threads, this process has {run.most_threads()}")
            stack.enter_context(run.threads_set(number))

        yield set_or_skip
