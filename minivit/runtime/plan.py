"""A recorded step: one arena and one flat list of kernel calls, replayed without Python.

The first step with a given shape executes without running any kernel, while every launch and allocation is recorded
(`kernels/core/recording.py`). Buffers with disjoint lifetimes then share memory in one arena, and the calls are compiled into one object:
on the CPU three arrays (entry points, bands and argument table), which one compiled loop executes; on a GPU a CUDA graph. The first step
and all later ones are replays of it.
Inputs, parameters, learning rate and random state are arrays that exist before the recording; everything else is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..kernels.core import devices
from ..kernels.core.arrays import ALIGNMENT, GPU_ALIGNMENT, GUARD, empty, subarray
from ..kernels.core.recording import Recording, View, record
from ..kernels.cpu.kernel import Calls, compile_missing
from ..kernels.cpu.run import threads
from ..kernels.cuda.product import Product


class Plan:
    """Record `step()` and run it once; `replay()` repeats it, bit for bit.

    step: a function without arguments that returns an array or a tuple of arrays, the results; it computes only through ops, and must not
        read the values of arrays.
    device: the device of all its arrays, "cpu" or "cuda".
    constants: arrays that rarely change, such as the weights of a model used for inference. Data that kernels derive from them alone
        (packed panels of weights) is kept; `prepare()` computes it again after they have changed.
    copies: how many sets of buffers there are, so that as many threads can replay at once (`parts.py`). own: arrays from before the
        recording, of which each copy has its own: itself, then new ones, in `owned`.
    recorded: all calls as they were recorded, (kernel, grid or bands, arguments), with `View`s of buffers.
    results: the arrays that the step returned (of the first copy); a replay overwrites them.
    arena_bytes: the memory of all its buffers, of one copy; buffer_bytes: the memory they would need without sharing.
    threads: the number of threads of the recording and of its replays. labels: for each launch, the `OpCall` that it is part of (or None)
        and the kernel's label. work: for each launch, the bytes of the arrays that it is given, and the operations of a product on a GPU.
    """

    def __init__(
        self, step: Callable[[], Any], constants: Sequence[Any] = (), device: str = "cpu", copies: int = 1, own: Sequence[np.ndarray] = ()
    ) -> None:
        with record() as recording:
            returned = step()
            arrays = returned if isinstance(returned, tuple) else (returned,)
            views = [recording.keep(a) for a in arrays]
            del returned, arrays
        preparations = _preparations(recording, {devices.address_of(a) for a in constants})
        offsets, common_bytes, own_bytes = _assign_offsets(recording, ALIGNMENT if device == "cpu" else GPU_ALIGNMENT)
        self.arena_bytes, self.buffer_bytes = common_bytes + own_bytes, sum(recording.sizes)
        self.threads = threads()
        launches = enumerate(zip(recording.op_calls, recording.calls))
        self.labels = [(op_call, call[0].label) for i, (op_call, call) in launches if i not in preparations]
        self.work = [_work(*call) for i, call in enumerate(recording.calls) if i not in preparations]
        common = empty((common_bytes,), np.uint8, device)
        arenas = [empty((own_bytes,), np.uint8, device) for _ in range(copies)]
        self.owned = [[*own], *([a.copy() for a in own] for _ in range(copies - 1))]
        self.recorded = recording.calls
        self._keep = common, arenas  # keeps arrays alive

        def placed(value: Any, copy: int) -> Any:
            """The array that an argument of a recorded call stands for, in one copy of the buffers."""
            if isinstance(value, View):
                arena = common if value.serial in recording.permanent else arenas[copy]
                return subarray(arena, offsets[value.serial] + value.offset, value.shape, value.dtype)
            return next((theirs for ours, theirs in zip(own, self.owned[copy]) if value is ours), value)

        def calls(copy: int, prepare: bool) -> list[tuple[Any, Any, list[Any]]]:
            chosen = [call for i, call in enumerate(recording.calls) if (i in preparations) is prepare]
            return [(kernel, grid, [placed(a, copy) for a in arguments]) for kernel, grid, arguments in chosen]

        preparing, replayed = calls(0, True), [calls(copy, False) for copy in range(copies)]
        if device == "cpu":
            compile_missing([*preparing, *replayed[0]])
        compile_calls = devices.runtime().prepare if device == "cuda" else lambda calls: Calls(calls, self.threads)
        self._preparations, self.calls = compile_calls(preparing), [*map(compile_calls, replayed)]
        self.launches = len(self.labels)
        self.results = tuple(placed(view, 0) for view in views)
        self.prepare()
        self.replay()

    def prepare(self) -> None:
        """Compute the data that depends on the `constants` alone again."""
        self._preparations.run()

    def replay(self) -> None:
        """Run the recorded calls again on the current content of the arrays outside the arena."""
        self.calls[0].run()

    def timed_replay(self) -> list[float]:
        """Replay launch by launch; returns the seconds of each."""
        return self.calls[0].timed_run()


def _work(kernel: Any, grid: Any, arguments: Sequence[Any]) -> tuple[int, int]:
    operations = 0
    if isinstance(kernel, Product):
        operations, arguments = kernel.operations, arguments[:-1]  # the workspace is no operand
    arrays = [a for a in arguments if isinstance(a, View) or devices.is_array(a)]
    return sum(a.nbytes for a in arrays), operations


def _preparations(recording: Recording, constants: set[int]) -> set[int]:
    """The indices of the calls that read only arrays at these addresses, or results of such calls, which are kept as long as the plan."""
    indices = set()
    for i, (kernel, _, arguments) in enumerate(recording.calls):
        arrays = [a for a in arguments if isinstance(a, View) or devices.is_array(a)]
        if (
            kernel.prepares
            and isinstance(arrays[0], View)
            and all(a.serial in recording.permanent if isinstance(a, View) else devices.address_of(a) in constants for a in arrays[1:])
        ):
            indices.add(i)
            recording.permanent.add(arrays[0].serial)
    return indices


def _assign_offsets(recording: Recording, alignment: int) -> tuple[list[int], int, int]:
    """An offset for each buffer, a multiple of `alignment`, such that buffers alive at the same time do not overlap; and the sizes of two
    arenas: of the permanent buffers, which all copies share, and of all others.

    Buffers are placed largest first, each at the lowest offset that is free throughout its lifetime (first to last use, in launches).
    """
    buffer_count = len(recording.sizes)
    first, last = np.full(buffer_count, len(recording.calls)), np.full(buffer_count, -1)
    for i, (_, _, arguments) in enumerate(recording.calls):
        for view in arguments:
            if isinstance(view, View):
                first[view.serial] = min(first[view.serial], i)
                last[view.serial] = i
    for serial in recording.kept | recording.permanent:
        last[serial] = len(recording.calls)
    sizes = -(-np.array(recording.sizes, np.int64) // alignment) * alignment + GUARD  # a multiple too
    offsets = np.zeros(buffer_count, np.int64)
    placed = np.zeros(0, np.int64)
    common_bytes, own_bytes = 0, 0
    for serial in recording.permanent:
        offsets[serial] = common_bytes
        common_bytes += sizes[serial]
    for serial in np.argsort(-sizes, kind="stable"):
        if last[serial] < 0 or serial in recording.permanent:
            continue
        overlapping = placed[(first[placed] <= last[serial]) & (last[placed] >= first[serial])]
        start = 0
        for neighbour in overlapping[np.argsort(offsets[overlapping], kind="stable")]:
            if start + sizes[serial] <= offsets[neighbour]:
                break
            start = max(start, offsets[neighbour] + sizes[neighbour])
        offsets[serial] = start
        own_bytes = max(own_bytes, start + sizes[serial])
        placed = np.append(placed, serial)
    return offsets.tolist(), int(common_bytes), int(own_bytes)
