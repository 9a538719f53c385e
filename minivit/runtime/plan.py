"""A recorded step: one arena, one flat list of kernel calls, replayed without Python.

The first step of a shape is walked through without running any kernel, while every launch and allocation is recorded
(`kernels/core/recording.py`). Buffers that are never alive together then share memory in one arena, and the calls become one thing to run:
on the CPU three arrays, entry, bands and argument table, which one compiled loop runs; on a GPU a CUDA graph. So the first step runs, and
all later ones.
Inputs, parameters, learning rate and random state live in arrays that exist before the recording; everything else is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..kernels.core import devices
from ..kernels.core.arrays import ALIGNMENT, GUARD, empty, subarray
from ..kernels.core.recording import Recording, View, record
from ..kernels.cpu.kernel import Calls
from ..kernels.cpu.run import threads


class Plan:
    """Record `step()` and run it once; `replay()` repeats it, bit for bit.

    step: a function without arguments that returns an array or a tuple of arrays, the results; it computes through ops alone, and looks at
        no value.
    device: the device, "cpu" or "cuda", that all of its arrays lie on.
    constants: arrays that change seldom: weights of a model that only predicts. What kernels make of them alone, as panels of weights, is
        kept, and `prepare()` makes it again after they have changed.
    results: what the step returned, as arrays that a replay overwrites.
    arena_bytes: the memory of all its buffers together; buffer_bytes: what they would take if each were kept.
    threads: how many recorded the step, and share its replays. labels: of each launch the op's `OpCall` it is part of, or None, and the
        kernel's label.
    """

    def __init__(self, step: Callable[[], Any], constants: Sequence[Any] = (), device: str = "cpu") -> None:
        with record() as recording:
            returned = step()
            arrays = returned if isinstance(returned, tuple) else (returned,)
            views = [recording.keep(a) for a in arrays]
            del returned, arrays
        once = _preparations(recording, {devices.address_of(a) for a in constants})
        offsets, self.arena_bytes = _share(recording)
        self.buffer_bytes = sum(recording.sizes)
        self.threads = threads()
        launches = enumerate(zip(recording.op_calls, recording.calls))
        self.labels = [(op_call, call[0].label) for i, (op_call, call) in launches if i not in once]
        self._arena = empty((self.arena_bytes,), np.uint8, device)
        self._keep = recording.calls  # the arrays outside the arena must stay where they are

        def placed(value: Any) -> Any:
            if not isinstance(value, View):
                return value
            return subarray(self._arena, offsets[value.serial] + value.offset, value.shape, value.dtype)

        calls = [(kernel, grid, [placed(a) for a in arguments]) for kernel, grid, arguments in recording.calls]
        ready = devices.runtime().prepare if device == "cuda" else lambda calls: Calls(calls, self.threads)
        self._preparations, self._calls = (ready([c for i, c in enumerate(calls) if (i in once) is early]) for early in (True, False))
        self.launches = len(self.labels)
        self.results = tuple(map(placed, views))
        self.prepare()
        self.replay()

    def prepare(self) -> None:
        """Make anew what depends on the `constants` alone."""
        self._preparations.run()

    def replay(self) -> None:
        """Run the recorded calls again over what the outer arrays hold now."""
        self._calls.run()

    def timed_replay(self) -> list[float]:
        """The same, launch by launch: the seconds that each took."""
        return self._calls.timed_run()


def _preparations(recording: Recording, constants: set[int]) -> set[int]:
    """Which calls compute from arrays at these addresses alone; what they make lives as long as the plan."""
    found = set()
    for i, (kernel, _, arguments) in enumerate(recording.calls):
        arrays = [a for a in arguments if isinstance(a, View) or devices.is_array(a)]
        if (
            kernel.prepares
            and isinstance(arrays[0], View)
            and all(not isinstance(a, View) and devices.address_of(a) in constants for a in arrays[1:])
        ):
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
