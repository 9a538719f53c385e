"""python -m benchmarks.kernels --against-blas: the product of matrices beside those of NumPy (OpenBLAS) and PyTorch (MKL or oneDNN).

The shapes are those of all products of matrices in a training step of the presets, without the epilogues, which no other library has. Each
library has a process of its own, once with one thread and once with all. They multiply the same numbers and must agree; then they take
turns, a few shapes at a time.

Reported for each number of threads: the geometric mean of the fastest rival's time over minivit's, and the shapes where this is least; and
how many instructions minivit's inner loop takes for each of its multiply-adds. The time of a library is the median of its fastest turn: on
a machine shared with others, a turn that they disturb may take twice as long, and which are disturbed is chance.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import geometric_mean, median
from time import perf_counter, sleep
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

import minivit
from minivit import Tensor
from minivit.functional import cross_entropy
from minivit.kernels.cpu import primitives
from minivit.kernels.cpu.gemm import gemm, tile_of
from minivit.kernels.cpu.product import product_assembly
from minivit.runtime.plan import Plan

from .measure import table, write_result
from .sides import Side
from .turns import PAUSE
from .worker import Worker

LIBRARIES = ("minivit", "NumPy", "PyTorch")
BATCHES = {64: 64, 10**9: 8}  # images by size: up to 64 pixels a side, and above
GROUP = 16  # shapes in a turn
WORST = 10  # shapes that are listed
TOLERANCE = 1e-4  # relative to the largest number


class Shape(NamedTuple):
    """A product as `gemm` takes it: shapes of both operands in memory, whether they are transposed, whether it is summed over the batch."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    transpose_a: bool
    transpose_b: bool
    sum_batch: bool

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """(batch, rows, columns, depth)."""
        rows, depth = self.a[:-3:-1] if self.transpose_a else self.a[-2:]
        batch = max(m[0] if len(m) == 3 else 1 for m in (self.a, self.b))
        return batch, rows, self.b[-2 if self.transpose_b else -1], depth

    @property
    def flops(self) -> int:
        batch, rows, columns, depth = self.sides
        return 2 * batch * rows * columns * depth

    def __str__(self) -> str:
        batch, rows, columns, depth = self.sides
        turned = " · ".join(name + "ᵀ" * turn for name, turn in (("a", self.transpose_a), ("b", self.transpose_b)))
        return f"{f'{batch} x ' if batch > 1 else ''}{rows} x {columns} x {depth}, {turned}{', summed' if self.sum_batch else ''}"


# ------------------------------------------------------------------------------------------------------------------------ shapes
def shapes_of(name: str) -> set[Shape]:
    """Of a training step of a preset. Nothing is multiplied: no other shape depends on it."""
    model: Any = minivit.create_model(name, init="zeros")
    found = set()

    def spy(c: Any, a: Any, b: Any, *, transpose_a: bool = False, transpose_b: bool = False, sum_batch: bool = False, **_: Any) -> None:
        found.add(Shape(a.shape, b.shape, transpose_a, transpose_b, sum_batch))
        c.fill(0)

    rows, columns = minivit.sides.both(model.config.image_size)
    batch = next(batch for size, batch in BATCHES.items() if max(rows, columns) <= size)
    images = np.zeros((batch, model.config.in_channels, rows, columns), np.float32)
    with patch.object(primitives, "gemm", spy):
        cross_entropy(model.train()(Tensor(images)), np.zeros(batch, int)).backward()
    return found


# --------------------------------------------------------------------------------------------------------------------- libraries
class Multiplier(Side):
    """A library whose Contender is the one below."""

    @property
    def module(self) -> str:
        return "products"


def by_minivit(shape: Shape, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
    def multiply() -> np.ndarray:
        for _ in range(repeats(shape)):
            gemm(c, a, b, transpose_a=shape.transpose_a, transpose_b=shape.transpose_b, sum_batch=shape.sum_batch)
        return c

    return Plan(multiply).replay


def operands(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape.a, np.float32), rng.standard_normal(shape.b, np.float32)


def repeats(shape: Shape) -> int:
    """Small products follow each other in one plan, as they do in a model's."""
    return max(1, min(50, round(5e7 / shape.flops)))


def by_numpy(shape: Shape, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
    left, right = (m.swapaxes(-2, -1) if turn else m for m, turn in ((a, shape.transpose_a), (b, shape.transpose_b)))
    if shape.sum_batch:
        return lambda: np.copyto(c, np.tensordot(left, right, ((0, 2), (0, 1))))
    return lambda: np.matmul(left, right, out=c)


def by_torch(shape: Shape, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
    import torch

    left, right, out = map(torch.from_numpy, (a, b, c))
    left, right = (m.transpose(-2, -1) if turn else m for m, turn in ((left, shape.transpose_a), (right, shape.transpose_b)))
    if shape.sum_batch:
        return lambda: out.copy_(torch.einsum("bmk,bkn->mn", left, right))
    return lambda: torch.matmul(left, right, out=out)


class Contender:
    """One library at work on one of the shapes after the other."""

    def __init__(self, seconds: float, side: Side) -> None:
        self.seconds, self.make = seconds, dict(zip(LIBRARIES, (by_minivit, by_numpy, by_torch)))[side.library]

    def _product(self, shape: Shape) -> tuple[Callable[[], Any], np.ndarray]:
        batch, rows, columns, _ = shape.sides
        batched = 3 in (len(shape.a), len(shape.b)) and not shape.sum_batch
        c = np.zeros((batch, rows, columns) if batched else (rows, columns), np.float32)
        return self.make(shape, *operands(shape), c), c

    def sample(self, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """A few elements of each result."""
        found = []
        for shape in shapes:
            multiply, c = self._product(shape)
            multiply()
            found.append(c.reshape(-1)[:: max(1, c.size // 97)].copy())
        return found

    def times(self, shapes: Sequence[Shape]) -> list[float]:
        """The median seconds of a product of each shape."""
        found = []
        for shape in shapes:
            multiply, _ = self._product(shape)
            count = repeats(shape) if self.make is by_minivit else 1
            multiply()
            times, end = [], perf_counter() + self.seconds
            while not times or perf_counter() < end:
                start = perf_counter()
                multiply()
                times.append((perf_counter() - start) / count)
            found.append(median(times))
        return found


# ---------------------------------------------------------------------------------------------------------------------- the loop
@dataclass(frozen=True)
class InnerLoop:
    """The loop of the compiled product with the most multiply-adds."""

    instructions: int
    multiply_adds: int  # vector instructions
    loads_of_spilled: int  # from the stack

    @classmethod
    def of(cls, assembly: str) -> InnerLoop:
        lines = [line.strip() for line in assembly.splitlines()]
        places = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
        best: list[str] = []
        for i, line in enumerate(lines):
            jump = re.fullmatch(r"j\w+\s+(\S+)|b\.\w+\s+(\S+)", line)
            start = places.get(next(filter(None, jump.groups())), i) if jump else i
            body = [each for each in lines[start : i + 1] if each and each[0] not in ".#" and not each.endswith(":")]
            if start < i and sum(map(cls.multiplies, body)) > sum(map(cls.multiplies, best)) and not any("call" in each for each in body):
                inside = any(start < places.get(each.split()[-1], -1) < i for each in body[:-1] if each.startswith("j"))
                best = best if inside else body
        return cls(len(best), sum(map(cls.multiplies, best)), sum("(%rsp)" in each for each in best))

    @staticmethod
    def multiplies(line: str) -> bool:
        return bool(re.match(r"vfn?madd|fmla|vdpbf16ps", line))


# -------------------------------------------------------------------------------------------------------------------------- main
def measure(shapes: Sequence[Shape], sides: Sequence[Side], threads: int, options: Namespace) -> dict[str, list[list[float]]]:
    """By library, for each shape the seconds of each round. Raises RuntimeError if the results differ."""
    groups = [shapes[i : i + GROUP] for i in range(0, len(shapes), GROUP)]
    found: dict[str, list[list[float]]] = {side.library: [] for side in sides}
    with ExitStack() as stack, tqdm(total=len(groups), disable=None, leave=False, unit="group", desc=f"threads: {threads}") as progress:
        workers = {side.library: stack.enter_context(Worker(side, options.seconds, threads)) for side in sides}
        for group in groups:
            results = {library: worker.call("sample", group) for library, worker in workers.items()}
            for library, samples in results.items():
                for shape, sample, expected in zip(group, samples, results[LIBRARIES[0]]):
                    if not np.allclose(sample, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max()):
                        raise RuntimeError(f"{library} and {LIBRARIES[0]} disagree about {shape}")
            rounds: dict[str, list[list[float]]] = {library: [] for library in workers}
            for _ in range(options.rounds):
                for library, worker in workers.items():
                    sleep(PAUSE)
                    rounds[library].append(worker.call("times", group))
            for library, times in rounds.items():
                found[library] += map(list, zip(*times))
            progress.update()
    return found


def entries_of(shapes: Sequence[Shape], found: Mapping[str, list[list[float]]], threads: int) -> Iterator[dict[str, Any]]:
    ours = found[LIBRARIES[0]]
    for i, shape in enumerate(shapes):
        rivals = {library: times[i] for library, times in found.items() if library != LIBRARIES[0]}
        best = min(rivals, key=lambda library: min(rivals[library]))
        yield {
            **shape._asdict(),
            "threads": threads,
            "seconds": {library: min(times[i]) for library, times in found.items()},
            "best": best,
            "times_as_fast": min(rivals[best]) / min(ours[i]),
        }


COLUMNS = {"threads": ">", "shape": "<", "GFLOP/s": ">", "fastest rival": "<", "its GFLOP/s": ">", "times as fast": ">"}


def row(entry: Mapping[str, Any]) -> list[str]:
    shape, seconds = Shape(*(entry[name] for name in Shape._fields)), entry["seconds"]
    rates = [f"{shape.flops / seconds[library] / 1e9:.0f}" for library in (LIBRARIES[0], entry["best"])]
    return [str(entry["threads"]), str(shape), rates[0], entry["best"], rates[1], f"{entry['times_as_fast']:.2f}"]


def compare(options: Namespace, found: Mapping[str, Any]) -> int:
    """Measure, print and write what the module's docstring says."""
    sides = [Multiplier(library, "float32") for library in LIBRARIES if library != "PyTorch" or find_spec("torch")]
    loop = InnerLoop.of(product_assembly(tile_of(np.dtype(np.float32))))
    print(
        f"inner loop: {loop.instructions} instructions for {loop.multiply_adds} vector multiply-adds, {loop.loads_of_spilled} of them "
        f"loads of what no register holds; {loop.instructions / max(1, loop.multiply_adds):.2f} each"
    )
    uses = Counter(shape for name in options.models for shape in shapes_of(name))
    shapes = sorted(uses, key=lambda shape: shape.flops)
    entries = []
    for threads in dict.fromkeys((1, found["cores"])):
        entries += entries_of(shapes, measure(shapes, sides, threads, options), threads)
        mine = [entry["times_as_fast"] for entry in entries if entry["threads"] == threads]
        print(
            f"threads: {threads}, {len(shapes)} shapes of {len(options.models)} presets: {geometric_mean(mine):.3f} times as fast as the "
            f"fastest rival in the geometric mean, at least as fast in {np.mean([m >= 1 for m in mine]):.0%}, below 0.9 in "
            f"{np.mean([m < 0.9 for m in mine]):.0%}",
            file=sys.stdout,
            flush=True,
        )
    print("\n" + table(COLUMNS, [row(entry) for entry in sorted(entries, key=lambda entry: entry["times_as_fast"])[:WORST]]))
    write_result(options, "products", found, loop=vars(loop), results=entries)
    return 0
