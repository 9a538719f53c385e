"""`profile`: the time of a step by op, compared with lower bounds (floors) of the machine.

The recorded step is replayed launch by launch. An op's floors are the arithmetic of `Op.cost` and the memory traffic of `Op.least_bytes`,
at rates that are measured in the same run: of minivit's own product of two large matrices, and of arrays that exceed all caches. An op
whose time is close to its larger floor cannot be improved much; an op whose arrays stay in a cache can be faster than its memory floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import UserError
from ..inference.predictor import Predictor
from ..kernels import OPS, primitives
from ..kernels.core.arrays import array_on, empty
from ..kernels.core.devices import runtime
from ..kernels.cpu.run import threads as threads_now
from ..kernels.cpu.run import threads_set
from ..models import Model, create_model
from ..nn.module import Module, device_of
from ..runtime.parts import Parts
from ..runtime.plan import Plan
from ..runtime.precision import precision_for
from ..runtime.threads import thread_count
from .trainer import Trainer

PRODUCT, GPU_PRODUCT, TINY_PRODUCT = 2048, 8192, 64  # rows, columns and depth of the matrix product that measures the arithmetic rate
STREAM, GPU_STREAM, TINY_STREAM = 128 << 20, 4 << 30, 64 << 10  # bytes of each of the two arrays that measure the memory rate
BLOCK = 1 << 20  # random numbers that are drawn
SECONDS = 1.0  # duration of the measurement of each rate
STEPS, STEP_SECONDS = 5, 1.0  # minimum number of replays, and their minimum duration


@dataclass(frozen=True)
class Row:
    """All launches of one op in one phase of a step; a kernel that does not belong to an op has no phase and no floors."""

    name: str
    phase: str  # forward, backward, update (of the weights)
    launches: int
    milliseconds: float
    share: float  # fraction of the time of all launches, 0..1
    arithmetic: float  # floor in milliseconds
    memory: float  # floor in milliseconds

    @property
    def times(self) -> float:
        """The time as a multiple of the larger floor; NaN if there is none."""
        floor = max(self.arithmetic, self.memory)
        return self.milliseconds / floor if floor else float("nan")


@dataclass(frozen=True)
class Launch:
    """One launch of a step."""

    op: str  # "" if the kernel does not belong to an op
    phase: str
    kernel: str
    milliseconds: float
    bytes: int  # of all arrays that the kernel is given
    operations: int  # of a matrix product on a GPU; 0 for other kernels
    floor: float  # milliseconds that these bytes or operations take at the machine's rates, the larger of the two


@dataclass(frozen=True)
class Profile:
    """The result of `profile`. As text, a table; `by_launch()` is another one."""

    title: str  # model, kind of step, batch, dtype, threads
    rows: tuple[Row, ...]  # slowest first
    launches: tuple[Launch, ...]  # in the order of the step
    step: float  # milliseconds of a replay; the sum of the rows includes the overhead of timing
    product_rate: float  # floating-point operations per second
    memory_rate: float  # bytes per second

    @property
    def total(self) -> Row:
        """The sum of all rows."""
        sums = (sum(getattr(row, name) for row in self.rows) for name in ("launches", "milliseconds", "share", "arithmetic", "memory"))
        return Row("all", "", *sums)  # type: ignore[arg-type]

    def __str__(self) -> str:
        lines = [
            f"{'op':<{max(2, *(len(row.name) for row in self.rows))}}  {'phase':<8}  launches        ms    share  arithmetic, ms  "
            "memory, ms  × floor"
        ]
        width = lines[0].index("  phase")
        for row in (*self.rows, self.total):
            times = f"{row.times:.1f}" if row.times == row.times else ""
            lines.append(
                f"{row.name:<{width}}  {row.phase:<8}  {row.launches:>8}  {row.milliseconds:>8.3f}  {100 * row.share:>5.1f} %  "
                f"{row.arithmetic:>14.3f}  {row.memory:>10.3f}  {times:>7}"
            )
        return "\n".join(
            [
                f"{self.title}: {self.step:.3f} ms",
                f"floors: arithmetic at {self.product_rate / 1e9:.1f} GFLOP/s, memory at "
                f"{self.memory_rate / 1e9:.1f} GB/s; below the latter is what stays in a cache",
                *lines,
            ]
        )

    def by_launch(self) -> str:
        """A table with a line for each launch, in the order of the step: its rates, and the share of its floor in its time."""
        lines = [f"{'op':<18}  {'phase':<8}  {'kernel':<28}         µs    GB/s  TFLOP/s  of floor"]
        for launch in self.launches:
            seconds = launch.milliseconds / 1e3
            product = f"{launch.operations / seconds / 1e12:>7.1f}" if launch.operations else f"{'':>7}"
            lines.append(
                f"{launch.op:<18}  {launch.phase:<8}  {launch.kernel:<28}  {1e6 * seconds:>9.1f}  {launch.bytes / seconds / 1e9:>6.0f}  "
                f"{product}  {launch.floor / launch.milliseconds:>8.0%}"
            )
        return "\n".join(lines)


def profile(
    model: str | Module = "vit_nano_patch2_8",
    batch: int = 64,
    precision: str = "float32",
    train: bool = True,
    threads: int | None = None,
    device: str | None = None,
    rates: tuple[float, float] | None = None,
    **trainer_options: Any,
) -> Profile:
    """The time of a step by op, with floors, as a table for `print`. Takes some seconds; the machine should be otherwise idle.

    model: a name, or a Model, of which a copy is measured. batch: batch size. precision, threads: as for Trainer.
    device: "cpu" or "cuda"; None: that of the model. rates: floating-point operations and bytes per second that floors are computed
    with; None: measured.
    train: profile a training step, otherwise inference with all exits of a cascade. trainer_options: other options of Trainer, such as
    optimizer or ema. The floors of a backward are for all gradients, although the first layer does not need that of its input. Raises
    UserError.
    """
    if batch < 1:
        raise UserError(f"batch must be 1 or more, got {batch}")
    options: dict[str, Any] = {"dtype": "float64"} if precision == "float64" else {}
    profiled = create_model(model, **options) if isinstance(model, str) else deepcopy(model.unwrapped())
    if not isinstance(profiled, Model):
        raise UserError(f"profile() takes a model of create_model, not {type(profiled).__name__}")
    device = device or device_of(profiled)
    with threads_set(thread_count(threads)):
        plans = _record_plans(profiled, batch, precision, train, device, trainer_options)
        step_precision = precision_for(precision, np.dtype(profiled.config.dtype), device)
        place = runtime().name if device == "cuda" else f"{threads_now()} thread{'s' if threads_now() > 1 else ''}"
        title = (
            f"{profiled.name}, {'training step' if train else 'inference'}, batch {batch}, {step_precision.name}, {place}, "
            f"{sum(plan.launches for plan in plans)} launches"
        )
        with step_precision.products():
            rates = rates or (product_rate(step_precision.activations, device=device), memory_rate(device=device))
        step = 1e3 * median(repeat(lambda: _replay(plans, device), STEP_SECONDS, STEPS))
        replays: list[list[float]] = []
        repeat(lambda: replays.append([seconds for plan in plans for seconds in plan.timed_replay()]), STEP_SECONDS, STEPS)
    seconds = np.median(replays[1:], axis=0)  # of each launch, the first replay excluded
    labels = [label for plan in plans for label in plan.labels]
    launches = _launches(labels, [work for plan in plans for work in plan.work], seconds.tolist(), *rates)
    return Profile(title, _rows(labels, seconds.tolist(), *rates), launches, step, *rates)


def _record_plans(model: Model, batch: int, precision: str, train: bool, device: str, options: dict[str, Any]) -> Sequence[Plan | Parts]:
    """Record the plans of a step on random images. Raises UserError for trainer options of inference."""
    config, rng = model.config, np.random.default_rng(0)
    images = rng.standard_normal((batch, *config.image_shape), np.float32)
    if train:
        trainer = Trainer(model, precision=precision, device=device, **options)
        trainer.step(images, rng.integers(0, config.num_classes, batch))
        return trainer.plans
    if options:
        raise UserError(f"inference has no {', '.join(options)}: those are a training step's")
    predictor = Predictor(model, precision=precision, batch_size=batch, device=device)
    predictor.logits(images)
    return predictor.plans


def _replay(plans: Sequence[Plan | Parts], device: str) -> None:
    for plan in plans:
        plan.replay()
    if device == "cuda":
        runtime().synchronize()


def _launches(
    labels: Iterable[tuple[Any, str]], works: Iterable[tuple[int, int]], seconds: Iterable[float], product: float, memory: float
) -> tuple[Launch, ...]:
    """labels, works: of the launches, as in `Plan`; seconds: of each; product, memory: rates."""
    return tuple(
        Launch(
            op_call.op.name if op_call else "",
            op_call.phase if op_call else "",
            kernel,
            1e3 * time,
            size,
            operations,
            1e3 * max(size / memory, operations / product),
        )
        for (op_call, kernel), (size, operations), time in zip(labels, works, seconds)
    )


def _rows(labels: Iterable[tuple[Any, str]], seconds: Iterable[float], product: float, memory: float) -> tuple[Row, ...]:
    """The rows of a profile, slowest first. labels: of the launches, as `Plan.labels`; seconds: of each launch; product, memory: rates."""
    sums: dict[tuple[str, str], list[float]] = {}  # (name, phase) -> launches, seconds, operations, bytes
    counted: set[int] = set()  # calls that are counted already: a call may have several launches
    for (op_call, kernel), time in zip(labels, seconds):
        entry = sums.setdefault((op_call.op.name, op_call.phase) if op_call else (kernel, ""), [0, 0.0, 0, 0])
        operations, min_bytes = op_call.least() if op_call and id(op_call) not in counted else (0, 0)
        counted.add(id(op_call))
        entry[:] = np.add(entry, (1, time, operations, min_bytes))
    total = sum(time for _, time, *_ in sums.values())
    rows = [
        Row(*key, int(launches), 1e3 * time, time / total, 1e3 * operations / product, 1e3 * min_bytes / memory)
        for key, (launches, time, operations, min_bytes) in sums.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.milliseconds))


# ------------------------------------------------------------------------------------------------------------------------- rates
def product_rate(dtype: Any = np.float32, tiny: bool = False, device: str = "cpu") -> float:
    """Floating-point operations per second of a large matrix product by minivit's kernels, in the current precision: the best of several.

    tiny: a small product, only to test that the measurement works.
    """
    size = TINY_PRODUCT if tiny else GPU_PRODUCT if device == "cuda" else PRODUCT
    a, b = (_random(size * size, dtype, device, seed).reshape(size, size) for seed in (0, 1))
    c = empty(a.shape, dtype, device)

    def multiply() -> Any:
        primitives(device).gemm(c, a, b)
        return c

    plan = Plan(multiply, device=device)
    return 2 * size**3 / min(repeat(lambda: _replay([plan], device), 0 if tiny else SECONDS))


def memory_rate(tiny: bool = False, device: str = "cpu") -> float:
    """Bytes per second read and written by a = a + b, for arrays that exceed all caches: the best of several; on a GPU those of b = a.

    In place, because a write to another array would make a processor read it first, which would not be counted. The numbers are random: a
    GPU is faster with zeros. tiny: see `product_rate`.
    """
    size = (TINY_STREAM if tiny else GPU_STREAM if device == "cuda" else STREAM) // 4
    a, b = (_random(size, np.float32, device, seed) for seed in (0, 1))

    def stream() -> Any:
        if device == "cuda":
            primitives(device).convert(b, a)
            return b[:1]
        OPS["add"].forward.cpu(a, a, b)
        return a[:1]

    plan = Plan(stream, device=device)
    return (2 if device == "cuda" else 3) * a.nbytes / min(repeat(lambda: _replay([plan], device), 0 if tiny else SECONDS))


def _random(size: int, dtype: Any, device: str, seed: int) -> Any:
    """Normally distributed numbers (size,): one block of them, drawn on the CPU, as often as it fits."""
    block = np.random.default_rng(seed).standard_normal(min(size, BLOCK), np.float32).astype(dtype)
    whole = empty((-(-size // len(block)), len(block)), dtype, device)
    if device == "cpu":
        whole[...] = block
    else:
        primitives(device).copy(whole, array_on(device, block), whole.shape, (len(block), 1), (0, 1))
    return whole.reshape(-1)[:size]


def repeat(function: Callable[[], Any], seconds: float, least: int = 5) -> list[float]:
    """The seconds of each call, after an unmeasured one: calls for at least `seconds` in total and at least `least` times."""
    function()
    times: list[float] = []
    end = perf_counter() + seconds
    while len(times) < least or perf_counter() < end:
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return times
