"""python -m benchmarks.kernels [OP...]: every op's production kernels in a precision, on its largest case, against the machine's limits.

First the op's outputs and gradients are held against its reference (`minivit.checking`). Then forward and backward, each recorded as a
plan so that nothing but kernels runs, are timed; GFLOP/s are of the arithmetic that the op states (`Op.cost`), GB/s of the least bytes
that it must read and write (`Op.least_bytes`). The limits are measured in the same run: minivit's product of 2048 x 2048 matrices in this
precision, and a sum a = a + b of arrays that fit no cache. An op is done where one of its fractions is near
100 %; a fraction of memory above that means that arrays stayed in a cache from one call to the next, as they may in a model.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

import minivit
from minivit.errors import nearest
from minivit.kernels import OPS
from minivit.kernels.core.cases import Arrays, Sample, input_shapes, make_inputs
from minivit.kernels.core.op import Op
from minivit.runtime.plan import Plan
from minivit.runtime.precision import PRECISIONS, precision_for
from minivit.testing.numerics import check_accuracy
from minivit.testing.result import CheckResult
from minivit.training.profiling import memory_rate, product_rate, repeat

from .measure import Summary, machine, machine_line, milliseconds, option_parser, percent, table, write_result
from .products import compare

TINY_MODELS = ("vit_nano_patch2_8", "mixer_nano_patch2_8")
SECONDS = 0.5  # spent on each direction of each op


def size(op: Op, case: Mapping[str, Any]) -> int:
    """Elements of all inputs."""
    return sum(prod(shape) for shape in input_shapes(op, case).values() if shape is not None)


def choose_case(op: Op, tiny: bool) -> Mapping[str, Any]:
    """The largest; for --tiny, the smallest."""
    return (min if tiny else max)(op.cases, key=lambda case: size(op, case))


def describe(case: Mapping[str, Any], call: Sample) -> str:
    """The case as its author wrote it, with constants as the call has them."""
    return " ".join(f"{n}={call.constants.get(n, value)}".replace(" ", "") for n, value in case.items())


def measure(call: Sample, seconds: float) -> Iterator[dict[str, Any]]:
    """An entry for each direction that launches a kernel: times in seconds, arithmetic and least bytes of one call."""
    op = call.op
    outputs, weights = call.forward("cpu"), call.weights(np.random.default_rng(0))
    steps = {"forward": lambda: _present(call.forward("cpu"))}
    if op.backward:
        steps["backward"] = lambda: _present(call.backward("cpu", outputs, weights))
    shapes = [None if a is None else a.shape for a in call.inputs.values()]
    cost = op.cost(*shapes, *call.constants.values())
    least = dict(zip(("forward", "backward"), op.least_bytes(tuple(call.inputs.values()), call.constants)))
    for direction, step in steps.items():
        plan = Plan(step)
        if plan.launches:
            times = Summary.of(repeat(plan.replay, seconds))
            yield {
                "direction": direction,
                "seconds": times.median,
                "spread": times.spread,
                "flops": getattr(cost, direction),
                "bytes": least[direction],
                "launches": plan.launches,
            }


def _present(arrays: Arrays) -> tuple[np.ndarray, ...]:
    return tuple(a for a in arrays.values() if a is not None)


COLUMNS = {"op": "<", "": "<", "case": "<", "ms": ">", "spread": ">", "GFLOP/s": ">", "of product": ">", "GB/s": ">", "of memory": ">"}


def row(entry: Mapping[str, Any], product: float, memory: float) -> list[str]:
    flop_rate, byte_rate = entry["flops"] / entry["seconds"], entry["bytes"] / entry["seconds"]
    arithmetic = [f"{flop_rate / 1e9:.1f}", percent(flop_rate / product)] if entry["flops"] else ["", ""]
    return [
        entry["op"],
        entry["direction"],
        entry["case"],
        milliseconds(entry["seconds"]),
        percent(entry["spread"]),
        *arithmetic,
        f"{byte_rate / 1e9:.1f}",
        percent(byte_rate / memory),
    ]


def run(options: Namespace, dtype: np.dtype, product: float, memory: float) -> tuple[list[dict[str, Any]], list[str]]:
    """(entries of the result, what is wrong). An op of parameters alone has no form in bfloat16."""
    entries, failures = [], []
    for name in options.ops or OPS:
        op, rng = OPS[name], np.random.default_rng(0)
        case = choose_case(op, options.tiny)
        call = Sample(op, *make_inputs(op, case, dtype, rng))
        if call.dtype != dtype:
            continue
        result = CheckResult()
        check_accuracy(call, "cpu", rng, result, split=options.precision == "bf16x3")
        if result.failure:
            failures.append(result.failure)
            continue
        for entry in measure(call, 0 if options.tiny else SECONDS):
            entries.append({"op": name, "case": describe(case, call), "worst_error": result.worst, **entry})
            print(*row(entries[-1], product, memory), sep="  ", file=sys.stderr, flush=True)
    return entries, failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser("kernels", "Every op's kernels against its arithmetic and the bytes it must move.")
    parser.add_argument("ops", nargs="*", metavar="OP", help="names (default: all)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: %(default)s)"
    )
    parser.add_argument("--against-blas", action="store_true", help="instead, the product beside other libraries' (`products.py`)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="for --against-blas: presets (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="for --against-blas: turns of each library (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.02, help="for --against-blas: of a shape in a turn (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.against_blas:
        found = machine()
        print(machine_line(found))
        if options.tiny:
            options.models, options.rounds, options.seconds = TINY_MODELS, 2, 0.0
        options.models = options.models or minivit.list_models()
        return compare(options, found)
    for name in options.ops:
        if name not in OPS:
            parser.error(f"unknown op {name!r}{nearest(name, OPS)}: choose {', '.join(OPS)}")
    found = machine()
    print(machine_line(found))
    exactness = precision_for(options.precision, np.dtype(np.float64 if options.precision == "float64" else np.float32))
    with exactness.products():
        product, memory = product_rate(exactness.activations, options.tiny), memory_rate(options.tiny)
        print(f"limits: {product / 1e9:.0f} GFLOP/s in {options.precision}, {memory / 1e9:.1f} GB/s")
        entries, failures = run(options, exactness.activations, product, memory)
    print(table(COLUMNS, [row(entry, product, memory) for entry in entries]))
    for failure in failures:
        print(f"WRONG, not timed: {failure}")
    write_result(
        options, "kernels", found, precision=options.precision, product_rate=product, memory_rate=memory, results=entries, failures=failures
    )
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
