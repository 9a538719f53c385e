"""A recorded step on a batch, computed in parts of a few samples, which the threads take one after the other.

Where samples do not depend on each other, as in inference, this beats a batch whose rows are split among the threads kernel by kernel: what
a few samples need stays in the second-level cache from one kernel to the next, and no thread waits for another between two kernels.

    step on one part        recorded once (`plan.py`), for one thread, with a set of buffers for each thread
    a list of one call      whose bands are the parts: each takes a free set, notes its own number there, and replays the step
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..kernels.core.arrays import empty
from ..kernels.core.devices import address_of
from ..kernels.core.recording import launch
from ..kernels.cpu import atomics
from ..kernels.cpu.kernel import Calls, kernel
from ..kernels.cpu.run import threads, threads_set
from ..kernels.cpu.views import call_entry, view
from .plan import Plan

MOST = 8  # samples in a part: more do not stay in the cache, and leave fewer parts to share
ELEMENTS = 2**20  # of a part's images, for the same reasons
USED, NEARLY = 0.95, 0.03  # what of the threads' time must be used at the least; how much less is as good


def part_size(samples: int, elements: int) -> int:
    """The samples of a part: as many as leave hardly any thread idle; 0 if none do, or for one sample. elements: of one sample."""
    if samples == 1:
        return 0
    used = {}  # by size, what of the threads' time is used
    for size in range(1, max(1, min(MOST, samples, ELEMENTS // elements)) + 1):
        rounds = -(-samples // (size * threads()))
        used[size] = samples / (rounds * size * threads())
    best = max(used.values())
    return max(size for size in used if used[size] >= best - NEARLY) if best >= USED else 0


@kernel
def _copy_part(band, bands, part, whole, number, store):
    """part (n,) = its bytes of `whole`, or with `store` the other way round."""
    n = len(part)
    its = whole[number[0] * n : (number[0] + 1) * n]
    if store:
        for i in range(n):
            its[i] = part[i]
    else:
        for i in range(n):
            part[i] = its[i]


@kernel
def _replay_part(band, bands, copies):
    """Replay a step on the part with the number `band`, on a set of buffers that no other thread uses.

    copies (T, 6): for each set whether it is in use, and the addresses of the part's number, of a list of entries, of their numbers of
    bands and of their tables; and the list's length.
    """
    address, row, i = copies.ctypes.data, 8 * copies.shape[1], 0
    while atomics.exchange(address + i * row, 1):
        i = i + 1 if i + 1 < len(copies) else 0
    number, entries, counts, tables = copies[i, 1], view(0, copies[i, 2]), view(0, copies[i, 3]), view(0, copies[i, 4])
    view(0, number)[0] = band
    for call in range(copies[i, 5]):
        for each in range(counts[call]):
            call_entry(entries[call], each, tables[call])
    atomics.store(address + i * row, 0)


class Parts:
    """Record `step` for parts of a batch and run it; `replay()` repeats it for the whole batch.

    step: from one part of each of the `batch` arrays to a tuple of arrays, the results, each with a row for each sample; as in `Plan`.
    batch: arrays (R, ...) or None, where R is a multiple of `size`, the samples of a part. constants: as in `Plan`.
    results: arrays (R, ...), which a replay overwrites.
    """

    def __init__(self, step: Callable[..., tuple[Any, ...]], batch: Sequence[Any], size: int, constants: Sequence[Any]) -> None:
        self.threads, self.parts = threads(), next(len(a) for a in batch if a is not None) // size
        number = np.zeros(1, np.int64)
        self.results: tuple[np.ndarray, ...] = ()

        def on_part() -> tuple[Any, ...]:
            given = [None if a is None else empty((size, *a.shape[1:]), a.dtype) for a in batch]
            for part, whole in zip(given, batch):
                if part is not None:
                    launch(_copy_part, 1, _bytes(part), _bytes(whole), number, False)
            found = step(*given)
            self.results = tuple(np.empty((self.parts * size, *a.shape[1:]), a.dtype) for a in found)
            for part, whole in zip(found, self.results):
                launch(_copy_part, 1, _bytes(part), _bytes(whole), number, True)
            return found

        with threads_set(1):
            self.plan = Plan(on_part, constants, copies=min(self.threads, self.parts), own=[number])
        lists = [[calls.entries, calls.bands, calls.addresses] for calls in self.plan.calls]
        self._copies = np.array([[0, address_of(own), *map(address_of, a), len(a[0])] for (own,), a in zip(self.plan.owned, lists)])
        self._calls = Calls([(_replay_part, self.parts, (self._copies,))], self.threads)
        self.launches, self.labels = self.parts * self.plan.launches, self.parts * self.plan.labels
        self.work = self.parts * self.plan.work
        self.prepare, self.arena_bytes = self.plan.prepare, self.plan.arena_bytes

    def replay(self) -> None:
        """Run the step again on every part of the current content of the batch."""
        self._calls.run()

    def timed_replay(self) -> list[float]:
        """The seconds of each launch of each part, one after the other, over the number of threads that share the parts."""
        seconds, (number,) = [], self.plan.owned[0]
        for part in range(self.parts):
            number[0] = part
            seconds += [each / len(self._copies) for each in self.plan.timed_replay()]
        return seconds


def _bytes(array: Any) -> Any:
    return array.reshape(-1).view(np.uint8)
