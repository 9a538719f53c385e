"""python -m benchmarks.gpu: what minivit does on this GPU, against the card's own limits and PyTorch, in at most eight minutes.

1. The limits, measured: bytes a second of a large copy, operations a second of a bfloat16 product of 8192 x 8192 matrices.
2. Whether it is right: every op against its reference in float32 and bfloat16; 100 training steps in float32 against the same on the CPU.
3. Every op's kernels on arrays that fit no cache: GB/s and TFLOP/s, and the fractions of the limits; attention beside PyTorch's.
4. Training steps in bfloat16 beside PyTorch's in all its modes (`gpu_torch.py`), by turns: time, host time, memory.
5. With --data, a short training on images.

Nothing is downloaded. Without a GPU it says so, and measures nothing.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

import minivit
from minivit import Trainer, create_model
from minivit.errors import DeviceError
from minivit.kernels import OPS
from minivit.kernels.core import arrays, devices
from minivit.kernels.core.cases import Sample, letters, make_inputs, shrunk, total_elements
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.core.op import Op
from minivit.runtime.plan import Plan
from minivit.testing.numerics import check_accuracy
from minivit.testing.result import CheckResult
from minivit.training.profiling import memory_rate, product_rate

from .measure import machine, machine_line, milliseconds, option_parser, percent, table, write_result

BYTES = 128 << 20  # of an op's inputs, at least: beyond any cache
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {  # name -> family or preset, options, batches
    "ViT 384x7, 32x32, p4": ("vit", {"image_size": 32, "patch_size": 4, "dim": 384, "depth": 7, "heads": 6, "mlp_ratio": 1.0}, (128, 1024)),
    "vit_small_patch16_224": ("vit_small_patch16_224", {}, (256,)),
    "mixer_s16_224": ("mixer_s16_224", {}, (256,)),
}
TINY_MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {"vit_nano_patch2_8": ("vit_nano_patch2_8", {}, (8,))}
ATTENTION = ((1024, 65), (256, 197), (256, 257))  # batch, tokens; 6 heads of 64


# ---------------------------------------------------------------------------------------------------------------------- timing
def seconds_of(run: Callable[[], Any], budget: float, wait: Callable[[], None] | None = None) -> float:
    """Seconds a call takes when many follow one another without waiting: the median of five such rows."""
    wait = wait or devices.runtime().synchronize
    run()
    wait()
    start = perf_counter()
    run()
    wait()
    calls = max(1, int(budget / 5 / max(perf_counter() - start, 1e-6)))
    rows = []
    for _ in range(5):
        start = perf_counter()
        for _ in range(calls):
            run()
        wait()
        rows.append((perf_counter() - start) / calls)
    return median(rows)


def _then(_: None, result: Any) -> Any:
    return result


# ----------------------------------------------------------------------------------------------------------------- correctness
def wrong_ops(tiny: bool) -> list[str]:
    """What is wrong with the ops' kernels on this GPU."""
    failures = []
    for op in OPS.values():
        for case in op.cases[:1] if tiny else op.cases:
            for dtype in ("float32", "bfloat16"):
                rng, result = np.random.default_rng(0), CheckResult()
                call = Sample(op, *make_inputs(op, shrunk(op, case), dtype, rng))
                if call.dtype == dtype:
                    check_accuracy(call, "cuda", rng, result)
                    failures += [result.failure] * bool(result.failure)
    return failures


def curve_distance(steps: int) -> float:
    """The largest difference between the loss curves of the GPU and the CPU in float32, of a ViT that learns random images by heart."""
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((64, 1, 8, 8), np.float32), rng.integers(0, 10, 64)
    curves = []
    for place in ("cpu", "cuda"):
        trainer = Trainer(create_model("vit_nano_patch2_8", seed=0), device=place, lr=3e-4)
        curves.append([trainer.step(images, labels) for _ in range(steps)])
    return float(np.max(np.abs(np.subtract(*curves))))


# --------------------------------------------------------------------------------------------------------------------- kernels
def grown(op: Op, case: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The case with its first letter doubled until its arrays take so many bytes in bfloat16; the next, where that adds no elements."""
    case = dict(case)
    for letter in letters(op, case):
        while 2 * total_elements(op, case) < size:
            doubled = case | {letter: 2 * case[letter]}
            if total_elements(op, doubled) <= total_elements(op, case):
                break
            case = doubled
    return case


class Repeated:
    """A generator of random numbers whose large normal arrays repeat one small block: to draw them takes minutes."""

    BLOCK = 1 << 20

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)
        self._block = self._generator.standard_normal(self.BLOCK, np.float32)

    def standard_normal(self, shape: Any = ()) -> np.ndarray:
        return np.resize(self._block, shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


def planned(call: Sample) -> Iterator[tuple[str, Plan]]:
    """A plan of each direction that launches kernels, on arrays of the GPU."""
    op, constants = call.op, list(call.constants.values())
    inputs = {n: None if a is None else arrays.to_device(a, "cuda") for n, a in call.inputs.items()}
    outputs = {n: None if a is None else arrays.empty(a.shape, a.dtype, "cuda") for n, a in call.describe().items()}
    some = next(a for a in outputs.values() if a is not None)
    forward = Plan(
        lambda: _then(op.run("forward", (*outputs.values(), *inputs.values(), *constants), inputs.values(), constants), some), device="cuda"
    )
    yield "forward", forward
    if op.backward:
        known, results = inputs | outputs, [outputs[n] for n in op.results]
        gradients = [None if inputs[n] is None else arrays.empty_like(inputs[n]) for n in op.differentiable if n not in op.gradient_aliases]
        arrived = [None if a is None else arrays.array_on("cuda", Repeated().standard_normal(a.shape).astype(a.dtype)) for a in results]
        given = (*gradients, *arrived, *[None] * len(op.accumulates), *(known[n] for n in op.saves), *constants)
        backward = Plan(lambda: _then(op.run("backward", given, inputs.values(), constants), some), device="cuda")
        if backward.launches:
            yield "backward", backward


def measured_ops(options: Namespace, budget: float) -> Iterator[dict[str, Any]]:
    for op in OPS.values():
        cases = [op.cases[0] if options.tiny else grown(op, max(op.cases, key=lambda case, op=op: total_elements(op, case)), BYTES)]
        if op.name == "attention" and not options.tiny:
            cases = [{"B": B, "N": N, "H": 6, "D": 64, "bias": None, "scale": 0.125} for B, N in ATTENTION]
        for case in cases:
            call = Sample(op, *make_inputs(op, case, "bfloat16", Repeated()))
            shapes = [None if a is None else a.shape for a in call.inputs.values()]
            cost = op.cost(*shapes, *call.constants.values())
            least = dict(zip(("forward", "backward"), op.least_bytes(tuple(call.inputs.values()), call.constants)))
            for direction, plan in planned(call):
                yield {
                    "op": op.name,
                    "direction": direction,
                    "case": " ".join(f"{n}={v}" for n, v in letters(op, case).items()),
                    "seconds": seconds_of(plan.replay, budget),
                    "flops": getattr(cost, direction),
                    "bytes": least[direction],
                    "launches": plan.launches,
                }


# ----------------------------------------------------------------------------------------------------------------------- steps
def our_step(family: str, options: dict[str, Any], batch: int, budget: float) -> dict[str, Any]:
    """Time, host time and memory of minivit's training step, on a batch that lies on the GPU."""
    model = create_model(family, **options)
    config, rng = model.config, np.random.default_rng(0)
    images = rng.standard_normal((batch, *config.image_shape), np.float32).astype(BFLOAT16)
    labels = rng.integers(0, config.num_classes, batch)
    trainer = Trainer(model, precision="bfloat16", device="cuda")
    there = arrays.to_device(images, "cuda"), arrays.to_device(labels, "cuda")
    start = perf_counter()
    trainer.step(*there)
    first = perf_counter() - start
    seconds = seconds_of(lambda: trainer.submit(*there), budget)
    plan = trainer.plans[-1]
    start = perf_counter()
    for _ in range(10):
        plan.replay()
    host = (perf_counter() - start) / 10
    devices.runtime().synchronize()
    return {
        "seconds": seconds,
        "first": first,
        "host": host,
        "launches": plan.launches,
        "memory": plan.arena_bytes + 16 * trainer.flat.size,
    }  # weights, gradients, AdamW's two averages


def measured_steps(options: Namespace, budget: float) -> Iterator[dict[str, Any]]:
    for name, (family, fields, batches) in (TINY_MODELS if options.tiny else MODELS).items():
        for batch in batches:
            entry: dict[str, Any] = {"model": name, "batch": batch, "minivit": our_step(family, fields, batch, budget), "rivals": {}}
            with suppress(ImportError):
                from . import gpu_torch

                model = create_model(family, **fields)
                for mode in gpu_torch.MODES[:1] if options.tiny else gpu_torch.MODES:
                    print(f"{name}, batch {batch}: PyTorch {mode}", file=sys.stderr, flush=True)
                    entry["rivals"][mode] = gpu_torch.step(model, batch, mode, lambda run, wait: seconds_of(run, budget, wait))
            yield entry


def trained(path: Path) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        start = perf_counter()
        run = minivit.train(
            "vit_tiny_patch4_32", data=path, device="cuda", epochs=20, batch_size=256, seed=0, out=Path(folder) / "run", progress=False
        )
        return {"data": path.name, "epochs": 20, "seconds": perf_counter() - start, "accuracy": run.test_accuracy}


# ---------------------------------------------------------------------------------------------------------------------- report
KERNELS = {"op": "<", "": "<", "case": "<", "us": ">", "GB/s": ">", "of copy": ">", "TFLOP/s": ">", "of product": ">"}
STEPS = {"model": "<", "batch": ">", "minivit, ms": ">", "host, us": ">", "PyTorch": "<", "ms": ">", "times as fast": ">"}


def kernel_row(entry: Mapping[str, Any], copy: float, product: float) -> list[str]:
    moved, done = entry["bytes"] / entry["seconds"], entry["flops"] / entry["seconds"]
    return [
        entry["op"],
        entry["direction"],
        entry["case"],
        f"{1e6 * entry['seconds']:.1f}",
        f"{moved / 1e9:.0f}",
        percent(moved / copy),
        f"{done / 1e12:.1f}",
        percent(done / product),
    ]


def step_rows(entry: Mapping[str, Any]) -> Iterator[list[str]]:
    ours = entry["minivit"]
    for mode, rival in (entry["rivals"] or {"not installed": None}).items():
        yield [
            entry["model"],
            str(entry["batch"]),
            milliseconds(ours["seconds"]),
            f"{1e6 * ours['host']:.0f}",
            mode,
            *([milliseconds(rival["seconds"]), f"{rival['seconds'] / ours['seconds']:.2f}"] if rival else ["", ""]),
        ]


def draw_roofline(path: Path, title: str, entries: Sequence[Mapping[str, Any]], copy: float, product: float) -> None:
    """Operations a second over operations a byte, under the card's two limits."""
    from minivit.plots.figure import new_figure, save_figure

    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    reach = np.geomspace(0.1, 2000, 200)
    axes.loglog(reach, np.minimum(reach * copy, product) / 1e12, color="0.4")
    for direction, marker in (("forward", "o"), ("backward", "s")):
        chosen = [e for e in entries if e["direction"] == direction and e["flops"]]
        axes.loglog(
            [e["flops"] / e["bytes"] for e in chosen],
            [e["flops"] / e["seconds"] / 1e12 for e in chosen],
            marker,
            label=direction,
            markersize=4,
        )
        for e in chosen:
            axes.annotate(e["op"], (e["flops"] / e["bytes"], e["flops"] / e["seconds"] / 1e12), fontsize=5)
    axes.set(xlabel="operations a byte that must be moved", ylabel="TFLOP/s", title=title)
    axes.legend()
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser("gpu", "minivit on this GPU, against its limits and PyTorch.")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images to train on, as --data of minivit train")
    options = parser.parse_args(arguments)
    try:
        runtime = devices.runtime()
    except DeviceError as error:
        print(f"nothing measured: {error}")
        return 0
    found, budget = machine() | {"gpu": runtime.name, "architecture": runtime.architecture}, 0.02 if options.tiny else 0.2
    print(f"{runtime.name}; {machine_line(found)}")
    copy, product = memory_rate(options.tiny, "cuda"), product_rate(BFLOAT16, options.tiny, "cuda")
    print(f"limits: {copy / 1e9:.0f} GB/s of a copy, {product / 1e12:.1f} TFLOP/s of a product in bfloat16")
    failures = wrong_ops(options.tiny)
    distance = curve_distance(5 if options.tiny else 100)
    print(f"ops that are wrong: {len(failures)}; loss curves of GPU and CPU differ by {distance:.1e} at most")
    for failure in failures:
        print(f"WRONG: {failure}")
    kernels = list(measured_ops(options, budget))
    print(table(KERNELS, [kernel_row(entry, copy, product) for entry in kernels]))
    steps = list(measured_steps(options, 10 * budget))
    print(table(STEPS, [row for entry in steps for row in step_rows(entry)]))
    training = trained(options.data) if options.data else None
    found["cpu"] = runtime.name  # by which the file is named
    paths = write_result(
        options,
        "gpu",
        found,
        copy_rate=copy,
        product_rate=product,
        failures=failures,
        curve_distance=distance,
        kernels=kernels,
        steps=steps,
        training=training,
    )
    for path in paths:
        draw_roofline(path.with_suffix(".png"), runtime.name, kernels, copy, product)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
