"""A recorded step: one arena, one flat list of kernel calls, replayed without Python.

The first step of a shape runs eagerly while every launch and allocation is recorded (`kernels/device.py`). Buffers that are never alive
together then share memory in one arena, and the calls become three arrays, entry, bands and argument table, which one compiled loop runs.
Inputs, parameters, learning rate and random state live in arrays that exist before the recording; everything else is a constant.
"""
from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from .kernels import cpu, device
from .kernels.device import ALIGNMENT, Recording, View


class Plan:
    """Record `step()` by running it once; `replay()` repeats it, bit for bit.

    step: a function without arguments that returns an array or a tuple of arrays, the results; it computes through ops alone.
    results: what the step returned, as arrays that a replay overwrites.
    arena_bytes: the memory of all its buffers together; buffer_bytes: what they would take if each were kept.
    threads: how many recorded the step, and share its replays. labels: of each launch the op's `Work` it is part of, or None, and the
        kernel's name.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        with device.record() as recording:
            returned = step()
            arrays = returned if isinstance(returned, tuple) else (returned,)
            first, views = [np.array(a) for a in arrays], [recording.keep(a) for a in arrays]
            del returned, arrays
        offsets, self.arena_bytes = _share(recording)
        self.buffer_bytes = sum(recording.sizes)
        self.launches, self.threads = len(recording.calls), cpu.threads()
        self.labels = [(work, kernel.__name__) for work, (kernel, *_) in zip(recording.works, recording.calls)]
        self._arena = device.empty((self.arena_bytes,), np.uint8)
        self._keep = recording.calls                    # the arrays outside the arena must stay where they are

        def place(value: Any) -> Any:
            if not isinstance(value, View):
                return value
            return np.ndarray(value.shape, value.dtype, self._arena, offsets[value.serial] + value.offset, value.strides)

        prepared = [(bands, *kernel.prepare(bands, [place(a) for a in arguments])) for kernel, bands, arguments in recording.calls]
        self._bands = np.array([p[0] for p in prepared], np.int64)
        self._entries = np.array([p[1] for p in prepared], np.int64)
        self._tables = np.concatenate([p[2] for p in prepared])
        lengths = np.cumsum([0] + [len(p[2]) for p in prepared[:-1]])
        self._addresses = self._tables.ctypes.data + lengths * self._tables.itemsize
        self.results = tuple(place(v) for v in views)
        for result, value in zip(self.results, first):
            result[...] = value

    def replay(self) -> None:
        """Run the recorded calls again over what the outer arrays hold now."""
        cpu.replay(self._entries, self._bands, self._addresses, self.threads)

    def timed_replay(self) -> list[float]:
        """The same, launch by launch: the seconds that each took, of which some 0.3 µs are Python's."""
        seconds = []
        with cpu.threads_set(self.threads):
            for launch in zip(self._entries.tolist(), self._bands.tolist(), self._addresses.tolist()):
                start = perf_counter()
                cpu.run_bands(*launch)
                seconds.append(perf_counter() - start)
        return seconds


def _share(recording: Recording) -> tuple[list[int], int]:
    """An offset in one arena for each buffer, such that buffers alive at the same time do not overlap; and the arena's size.

    Largest first, each at the lowest offset that is free throughout its life: first use to last use, counted in launches.
    """
    number = len(recording.sizes)
    first, last = np.full(number, len(recording.calls)), np.full(number, -1)
    for i, (_, _, arguments) in enumerate(recording.calls):
        for view in arguments:
            if isinstance(view, View):
                first[view.serial] = min(first[view.serial], i)
                last[view.serial] = i
    for serial in recording.kept:
        last[serial] = len(recording.calls)
    sizes = -(-np.array(recording.sizes, np.int64) // ALIGNMENT) * ALIGNMENT
    offsets = np.zeros(number, np.int64)
    placed = np.zeros(0, np.int64)
    total = 0
    for serial in np.argsort(-sizes, kind="stable"):
        if last[serial] < 0:
            continue
        rivals = placed[(first[placed] <= last[serial]) & (last[placed] >= first[serial])]
        start = 0
        for rival in rivals[np.argsort(offsets[rivals], kind="stable")]:
            if start + sizes[serial] <= offsets[rival]:
                break
            start = max(start, offsets[rival] + sizes[rival])
        offsets[serial] = start
        total = max(total, start + sizes[serial])
        placed = np.append(placed, serial)
    return offsets.tolist(), int(total)
