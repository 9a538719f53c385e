"""Which of cuBLASLt's algorithms computes a product: the fastest of those that its heuristic ranks first, timed once for each GPU.

The heuristic estimates times without running anything. So the first time that a product runs, its candidates are timed on the GPU, into
memory beside the result, and the choice is kept in the user's cache folder, in one file for each product. A kept choice is taken without
timing by any later process, if cuBLASLt still accepts it; NVIDIA allows to store an algorithm's bytes for the same version of the library.
Another algorithm may sum in another order. So a choice never changes within a process, nor as long as the cache folder is there: what there
was no time to measure is kept too, as the heuristic's first algorithm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Protocol

import numpy as np

from ...errors import DeviceError
from ...files import lock
from ..core.cache import cache_folder, is_used, make_private
from .compiled import keep, read_kept

CANDIDATES = 8  # algorithms that are timed
ROUNDS, ROUND = 3, 1e-3  # how often each is timed, and for how many seconds about
LAUNCHES = 20  # at most, in one round
PATIENCE, IN_ALL = 0.1, 5.0  # seconds after which no further candidate of a product is timed, and no further product in this process
CLEARLY = 0.98  # of the time of those ranked before takes what is chosen instead of them
SIZE = 64  # bytes of an algorithm: cublasLtMatmulAlgo_t
NOT_KEPT = "they are chosen anew by each process"


class Device(Protocol):
    """What the choice needs of the GPU's runtime."""

    name: str
    architecture: str

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """See `core.devices.Runtime`."""

    def address(self, array: Any) -> int:
        """See `core.devices.Runtime`."""

    def capturing(self) -> bool:
        """Whether launches are captured into a graph now, and do not run."""

    def timer(self, run: Callable[[], None], launches: int) -> Callable[[], float]:
        """A function that runs `run`, which launches one kernel, so many times: the GPU's seconds for one. Raises DeviceError."""


class Choices:
    """The choices for one GPU and one version of cuBLASLt, which is given as a number."""

    def __init__(self, device: Device, version: int) -> None:
        self._device, self._left = device, IN_ALL
        self._digest = hashlib.sha256(f"{device.name}\n{version}".encode()).hexdigest()[:16]

    def algorithm(
        self, signature: str, accepted: Callable[[bytes], bool], candidates: Callable[[], Sequence[bytes]], launch: Callable[[bytes], None]
    ) -> bytes:
        """The algorithm for the products of this signature, one line of text: the kept one, or the fastest, which is then kept.

        accepted: whether cuBLASLt runs it. candidates: those of the heuristic, best first. launch: run it, into memory that nobody reads;
        raises DeviceError where it does not run, as this function does if none of them runs.
        """
        folder = cache_folder() / "cuda" / f"{self._device.architecture}-products-{self._digest}"
        path = folder / f"{hashlib.sha256(signature.encode()).hexdigest()[:24]}.algorithm"
        used = is_used(folder, instead="algorithms of products are chosen for this process alone")
        kept = _kept(path, signature, accepted) if used else None
        if kept is not None:
            return kept
        chosen = self._chosen(candidates(), launch)
        if not used:
            return chosen
        with _locked(folder):
            kept = _kept(path, signature, accepted)  # by another process meanwhile
            if kept is None:
                keep(path, (signature, chosen), "algorithms of products", NOT_KEPT)
        return chosen if kept is None else kept

    def _chosen(self, candidates: Sequence[bytes], launch: Callable[[bytes], None]) -> bytes:
        if self._device.capturing():
            return candidates[0]
        start = perf_counter()
        try:
            return self._fastest(candidates, launch) if self._left > 0 else _first(candidates, launch)
        finally:
            self._left -= perf_counter() - start

    def _fastest(self, candidates: Sequence[bytes], launch: Callable[[bytes], None]) -> bytes:
        start = perf_counter()
        timers: list[tuple[bytes, Callable[[], float]]] = []
        for algorithm in candidates:
            if timers and perf_counter() - start > PATIENCE:
                break
            try:
                run = partial(launch, algorithm)
                run()  # loads its kernel
                once = self._device.timer(run, 1)
                launches = max(1, min(LAUNCHES, int(ROUND / max(once(), 1e-9))))
                timers.append((algorithm, once if launches == 1 else self._device.timer(run, launches)))
            except DeviceError:
                continue
        if not timers:
            return _first(candidates, launch)
        seconds = [float("inf")] * len(timers)
        for _ in range(ROUNDS):  # by turns, since the clock rate of a GPU that was idle rises
            seconds = [min(least, timer()) for least, (_, timer) in zip(seconds, timers)]
            if perf_counter() - start > PATIENCE:
                break
        best = 0
        for i, taken in enumerate(seconds):
            if taken < CLEARLY * seconds[best]:
                best = i
        return timers[best][0]


def _first(candidates: Sequence[bytes], launch: Callable[[bytes], None]) -> bytes:
    """The first that runs."""
    failure = DeviceError("cuBLASLt has no algorithm for a product")
    for algorithm in candidates:
        try:
            launch(algorithm)
        except DeviceError as error:
            failure = error
        else:
            return algorithm
    raise failure


def _kept(path: Path, signature: str, accepted: Callable[[bytes], bool]) -> bytes | None:
    """What the file has for this signature, if it is whole and cuBLASLt accepts it."""
    name, algorithm = read_kept(path) or ("", b"")
    return algorithm if name == signature and len(algorithm) == SIZE and accepted(algorithm) else None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside, no other process keeps a choice in this folder, so that all take the same; after a second they are waited for no longer."""
    try:
        make_private(folder)
        file = open(folder / "lock", "ab")  # noqa: SIM115
    except OSError:  # which the writing of a choice tells
        yield
        return
    with file:
        for _ in range(100):
            try:
                lock(file.fileno())
            except BlockingIOError:
                sleep(0.01)
            except OSError:  # a file system without locks
                break
            else:
                break
        yield
