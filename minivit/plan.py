"""A recorded step: one arena, one flat list of kernel calls, replayed without Python.

The first step of a shape is walked through without running any kernel, while every launch and allocation is recorded (`kernels/device.py`).
Buffers that are never alive together then share memory in one arena, and the calls become three arrays, entry, bands and argument table,
which one compiled loop runs: the first step, and all later ones.
Inputs, parameters, learning rate and random state live in arrays that exist before the recording; everything else is a constant.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from .kernels import cpu, device
from .kernels.device import ALIGNMENT, GUARD, Recording, View


class Plan:
    """Record `step()` and run it once; `replay()` repeats it, bit for bit.

    step: a function without arguments that returns an array or a tuple of arrays, the results; it computes through ops alone, and looks at
        no value.
    constants: arrays that change seldom: weights of a model that only predicts. What kernels make of them alone, as panels of weights, is
        kept, and `prepare()` makes it again after they have changed.
    results: what the step returned, as arrays that a replay overwrites.
    arena_bytes: the memory of all its buffers together; buffer_bytes: what they would take if each were kept.
    threads: how many recorded the step, and share its replays. labels: of each launch the op's `Work` it is part of, or None, and the
        kernel's name.
    """

    def __init__(self, step: Callable[[], Any], constants: Sequence[np.ndarray] = ()) -> None:
        with device.record() as recording:
            returned = step()
            arrays = returned if isinstance(returned, tuple) else (returned,)
            views = [recording.keep(a) for a in arrays]
            del returned, arrays
        once = _preparations(recording, {cpu.address_of(a) for a in constants})
        offsets, self.arena_bytes = _share(recording)
        self.buffer_bytes = sum(recording.sizes)
        self.threads = cpu.threads()
        self.labels = [(work, call[0].__name__) for i, (work, call) in enumerate(zip(recording.works, recording.calls)) if i not in once]
        self._arena = device.empty((self.arena_bytes,), np.uint8)
        self._keep = recording.calls                    # the arrays outside the arena must stay where they are

        def place(value: Any) -> Any:
            if not isinstance(value, View):
                return value
            return np.ndarray(value.shape, value.dtype, self._arena, offsets[value.serial] + value.offset, value.strides)

        prepared = [(bands, *kernel.prepare(bands, [place(a) for a in arguments])) for kernel, bands, arguments in recording.calls]
        self._preparations = _Calls([p for i, p in enumerate(prepared) if i in once])
        self._calls = _Calls([p for i, p in enumerate(prepared) if i not in once])
        self.launches = len(self._calls.bands)
        self.results = tuple(place(v) for v in views)
        self.prepare()
        self.replay()

    def prepare(self) -> None:
        """Make anew what depends on the `constants` alone."""
        self._preparations.run(self.threads)

    def replay(self) -> None:
        """Run the recorded calls again over what the outer arrays hold now."""
        self._calls.run(self.threads)

    def timed_replay(self) -> list[float]:
        """The same, launch by launch: the seconds that each took, of which some 0.3 µs are Python's."""
        seconds = []
        with cpu.threads_set(self.threads):
            for launch in zip(self._calls.entries.tolist(), self._calls.bands.tolist(), self._calls.addresses.tolist()):
                start = perf_counter()
                cpu.run_bands(*launch)
                seconds.append(perf_counter() - start)
        return seconds


class _Calls:
    """Calls of kernels as three arrays, (bands, entry, table) of each."""

    def __init__(self, prepared: Sequence[tuple[int, int, np.ndarray]]) -> None:
        self.bands = np.array([p[0] for p in prepared], np.int64)
        self.entries = np.array([p[1] for p in prepared], np.int64)
        self.tables = np.concatenate([np.zeros(0, np.int64), *(p[2] for p in prepared)])
        lengths = np.cumsum([0] + [len(p[2]) for p in prepared])[:len(prepared)]
        self.addresses = self.tables.ctypes.data + lengths * self.tables.itemsize

    def run(self, threads: int) -> None:
        cpu.replay(self.entries, self.bands, self.addresses, threads)


def _preparations(recording: Recording, constants: set[int]) -> set[int]:
    """Which calls compute from arrays at these addresses alone; what they make lives as long as the plan."""
    found = set()
    for i, (kernel, _, arguments) in enumerate(recording.calls):
        arrays = [a for a in arguments if isinstance(a, (np.ndarray, View))]
        if kernel.prepares and isinstance(arrays[0], View) and all(
                isinstance(a, np.ndarray) and cpu.address_of(a) in constants for a in arrays[1:]):
            found.add(i)
            recording.permanent.add(arrays[0].serial)
    return found


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
    for serial in recording.kept | recording.permanent:
        last[serial] = len(recording.calls)
    for serial in recording.permanent:
        first[serial] = 0
    sizes = -(-np.array(recording.sizes, np.int64) // ALIGNMENT) * ALIGNMENT + GUARD
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
