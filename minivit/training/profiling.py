"""`profile`: what a step's time goes to, by op, beside what the machine would need for it at least.

The recorded step is replayed launch by launch. An op's floors are what it says of itself, the arithmetic of `Op.cost` and the bytes of
`Op.least_bytes`, at rates that are measured in the same minute: of minivit's own product of two large matrices, and of arrays that fit
no cache. An op that takes hardly longer than its larger floor is done; one whose arrays stay in a cache takes less than the memory's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import UserError
from ..inference.predictor import Predictor
from ..kernels import OPS
from ..kernels.core.arrays import empty
from ..kernels.cpu.gemm import gemm
from ..kernels.cpu.run import threads as threads_now
from ..kernels.cpu.run import threads_set
from ..models import Model, create_model
from ..nn.module import Module
from ..runtime.plan import Plan
from ..runtime.precision import precision_for
from ..runtime.threads import thread_count
from .trainer import Trainer

PRODUCT, TINY_PRODUCT = 2048, 64  # rows, columns and depth of the product whose rate counts as the machine's
STREAM, TINY_STREAM = 128 << 20, 64 << 10  # bytes of each of the two arrays that are streamed
SECONDS = 1.0  # spent on each rate
STEPS, STEP_SECONDS = 5, 1.0  # replays at least, and the time for more


@dataclass(frozen=True)
class Row:
    """All launches of one op in one phase of a step; a kernel that is no op's has no phase and no floors."""

    name: str
    phase: str  # forward, backward, update (of the weights)
    launches: int
    milliseconds: float
    share: float  # of all launches' time, 0..1
    arithmetic: float  # floor in milliseconds
    memory: float  # floor in milliseconds

    @property
    def times(self) -> float:
        """How many times the larger floor it takes; NaN where there is none."""
        floor = max(self.arithmetic, self.memory)
        return self.milliseconds / floor if floor else float("nan")


@dataclass(frozen=True)
class Profile:
    """What `profile` gives. As text, a table."""

    title: str  # model, kind of step, batch, dtype, threads
    rows: tuple[Row, ...]  # the slowest first
    step: float  # milliseconds of a replay as a whole; the rows' sum has the timing on top
    product_rate: float  # floating-point operations a second
    memory_rate: float  # bytes a second

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


def profile(
    model: str | Module = "vit_nano_patch2_8",
    batch: int = 64,
    precision: str = "float32",
    train: bool = True,
    threads: int | None = None,
    **trainer: Any,
) -> Profile:
    """The time of a step by op, with floors; some seconds on an otherwise idle machine. `print` shows it as a table.

    model: a name, or a Model, of which a copy is measured. batch: images of a step. precision, threads: as the Trainer's.
    train: a training step, else inference, all exits of a cascade. trainer: other options of the Trainer, such as optimizer or ema.
    Each floor of a backward is that of all gradients, though the first layer need not give its input's. Raises UserError.
    """
    if batch < 1:
        raise UserError(f"batch must be 1 or more, got {batch}")
    options: dict[str, Any] = {"dtype": "float64"} if precision == "float64" else {}
    measured = create_model(model, **options) if isinstance(model, str) else deepcopy(model.unwrapped())
    if not isinstance(measured, Model):
        raise UserError(f"profile() takes a model of create_model, not {type(measured).__name__}")
    with threads_set(thread_count(threads)):
        plans = _recorded(measured, batch, precision, train, trainer)
        exactness = precision_for(precision, np.dtype(measured.config.dtype))
        title = (
            f"{measured.name}, {'training step' if train else 'inference'}, batch {batch}, {exactness.name}, {threads_now()} "
            f"thread{'s' if threads_now() > 1 else ''}, {sum(plan.launches for plan in plans)} launches"
        )
        with exactness.products():
            rates = product_rate(exactness.activations), memory_rate()
        step = 1e3 * median(repeat(lambda: _replay(plans), STEP_SECONDS, STEPS))
        replays: list[list[float]] = []
        repeat(lambda: replays.append([seconds for plan in plans for seconds in plan.timed_replay()]), STEP_SECONDS, STEPS)
    seconds = np.median(replays[1:], axis=0)  # of each launch
    return Profile(title, _rows([label for plan in plans for label in plan.labels], seconds.tolist(), *rates), step, *rates)


def _recorded(model: Model, batch: int, precision: str, train: bool, options: dict[str, Any]) -> list[Plan]:
    """The plans of a step on random images."""
    config, rng = model.config, np.random.default_rng(0)
    images = rng.standard_normal((batch, config.in_channels, config.image_size, config.image_size), np.float32)
    if train:
        trainer = Trainer(model, precision=precision, **options)
        trainer.step(images, rng.integers(0, config.num_classes, batch))
        return trainer.plans
    if options:
        raise UserError(f"inference has no {', '.join(options)}: those are a training step's")
    predictor = Predictor(model, precision=precision, batch_size=batch)
    predictor.logits(images)
    return predictor.plans


def _replay(plans: list[Plan]) -> None:
    for plan in plans:
        plan.replay()


def _rows(labels: Iterable[tuple[Any, str]], seconds: Iterable[float], product: float, memory: float) -> tuple[Row, ...]:
    """labels: as `Plan.labels`; seconds: of each launch."""
    found: dict[tuple[str, str], list[float]] = {}  # (name, phase) -> launches, seconds, arithmetic, bytes
    met: set[int] = set()  # calls whose floors are counted: one may have several launches
    for (op_call, kernel), time in zip(labels, seconds):
        entry = found.setdefault((op_call.op.name, op_call.phase) if op_call else (kernel, ""), [0, 0.0, 0, 0])
        operations, least = op_call.least() if op_call and id(op_call) not in met else (0, 0)
        met.add(id(op_call))
        entry[:] = np.add(entry, (1, time, operations, least))
    whole = sum(time for _, time, *_ in found.values())
    rows = [
        Row(*key, int(launches), 1e3 * time, time / whole, 1e3 * operations / product, 1e3 * least / memory)
        for key, (launches, time, operations, least) in found.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.milliseconds))


# ------------------------------------------------------------------------------------------------------------------------- rates
def product_rate(dtype: Any = np.float32, tiny: bool = False) -> float:
    """Floating-point operations a second of a large product by minivit's own kernels, as it multiplies now: the best of several.

    tiny: so small a one that only whether it works can be learnt.
    """
    size = TINY_PRODUCT if tiny else PRODUCT
    a, b = np.random.default_rng(0).standard_normal((2, size, size)).astype(dtype)
    c = empty(a.shape, dtype)

    def multiply() -> np.ndarray:
        gemm(c, a, b)
        return c

    return 2 * size**3 / min(repeat(Plan(multiply).replay, 0 if tiny else SECONDS))


def memory_rate(tiny: bool = False) -> float:
    """Bytes a second that a = a + b reads and writes, of arrays that fit no cache: the best of several. tiny: as above.

    In place, for what is written elsewhere is read by the processor too, unasked and uncounted.
    """
    a, b = (empty(((TINY_STREAM if tiny else STREAM) // 4,), np.float32) for _ in range(2))
    a[:], b[:] = 1, 0
    return 3 * a.nbytes / min(repeat(Plan(lambda: _then(OPS["add"].forward.cpu(a, a, b), a[:1])).replay, 0 if tiny else SECONDS))


def _then(_: None, result: np.ndarray) -> np.ndarray:
    return result


def repeat(function: Callable[[], Any], seconds: float, least: int = 5) -> list[float]:
    """The seconds that each call took: after one that is not counted, for `seconds` in all and at least `least` calls."""
    function()
    times: list[float] = []
    end = perf_counter() + seconds
    while len(times) < least or perf_counter() < end:
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return times
