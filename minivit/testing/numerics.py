"""Whether an op's kernels are accurate.

Flash-attention's rule (2205.14135, its tests): a fast version may err, against the reference in float64, at most twice as much as
the plain reference in the same low precision does, plus a floor of a few roundings; in bfloat16 of one. With products of split
bfloat16 ("bf16x3"), whose roundings are 64 times float32's, it may err by twice 64 times what the reference does in float32, plus one of
them.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ..kernels.core.cases import Arrays, Sample, cast, is_floating
from ..kernels.core.dtypes import BFLOAT16
from ..kernels.cpu.gemm import split_products
from .result import CheckResult

# The floor under flash-attention's rule, in roundings of the largest number that took part: where the naive version happens to be exact.
FLOOR = 4.0
BFLOAT16_ROUNDING = 2.0**-8  # of bfloat16, the most that one rounding changes a number by, relative to it
SPLIT_ROUNDING = 2.0**-17  # of the sum of two bfloat16


def check_accuracy(
    sample: Sample, implementation: str, rng: np.random.Generator, result: CheckResult, accumulate: bool = False, split: bool = False
) -> None:
    """Outputs and gradients against the reference in float64, by flash-attention's rule; integer outputs must be equal.

    accumulate: with gradients that run already to the inputs the op adds to. split: products of float32 made of bfloat16 ("bf16x3").
    In bfloat16, parameters are rounded to it first, since products round weights.
    """
    if sample.dtype == BFLOAT16:
        inputs = {n: a.astype(BFLOAT16).astype(a.dtype) if is_floating(a) else a for n, a in sample.inputs.items()}
        sample = Sample(sample.op, inputs, sample.constants)
    op = sample.op
    weights, running = sample.weights(rng), sample.running(rng) if accumulate else {}
    with split_products(split):
        fast = sample.run(implementation, weights, running)
    doubts = _bfloat16_doubt(sample, weights, running, rng) if sample.dtype == BFLOAT16 else _doubt(sample, weights, running, rng, split)
    truth, doubt, rounding = doubts
    read = [a for a in (*sample.inputs.values(), *weights.values(), *running.values(), *(truth.get(n) for n in op.saves)) if is_floating(a)]
    largest = max(_largest(a) for a in read)
    for name, value in fast.items():
        if value is None:
            continue
        result.elements += value.size
        if not is_floating(value):
            equal = np.array_equal(value, truth[name])
            result.note(float(not equal), equal, f"{op.name}: {name} differs from the reference")
            continue
        errors = np.abs(value.astype(np.float64) - truth[name])
        size = _largest(truth[name])
        allowed = doubt[name] + rounding * max(size, largest)
        error = _largest(errors)  # NaN where an element is
        where = np.unravel_index(np.argmax(errors), errors.shape)
        result.note(
            error / (size or 1.0),
            error <= allowed,
            f"{op.name} {'bf16x3' if split else sample.dtype}: {name}[{', '.join(map(str, where))}] is {value[where]:.9g}, the "
            f"reference in float64 {truth[name][where]:.9g}; they may differ by {allowed:.2g}",
        )


def _doubt(
    sample: Sample, weights: Arrays, running: Arrays, rng: np.random.Generator, split: bool
) -> tuple[Arrays, dict[str, float], float]:
    """The truth, how far each result may be from it for what the op is, and how far for each unit of the largest number.

    How far a result can be trusted is measured in float32, where the truth is known, and carries over to float64 in units of the last
    place. It is the error of the reference in float32, or what one rounding of every argument does to it: where a result is ill-conditioned
    (a layer norm over two channels that are almost equal), or sums many terms, one float32 run may be right by luck.
    """
    unit = float(np.finfo(np.float32).eps)
    low = [cast(arrays, np.float32) for arrays in (sample.inputs, weights, running)]

    high = _reference(sample, low, np.float64)
    doubt = _distances(high, _reference(sample, low, np.float32))
    for _ in range(_tries(high)):
        beside = [_nudged(arrays, np.float32, rng) for arrays in low]
        there = _reference(sample, beside, np.float64)
        for other in (_distances(high, there), _distances(there, _reference(sample, beside, np.float32))):
            doubt = {n: max(d, other[n]) for n, d in doubt.items()}
    own, factor, floor = float(np.finfo(sample.dtype).eps), 2, FLOOR  # flash-attention's 2
    if split:
        own, floor = SPLIT_ROUNDING, 1.0
    doubt = {n: factor * own / unit * d for n, d in doubt.items()}
    if sample.dtype == np.float64:  # where the little precision that there is above it shows what the reference errs
        given = [sample.inputs, weights, running]
        high = _reference(sample, given, np.longdouble)
        naive = _distances(high, _reference(sample, given, np.float64))
        doubt = {n: max(d, factor * naive[n]) for n, d in doubt.items()}
    return high, doubt, floor * own


def _reference(sample: Sample, arguments: list[Arrays], dtype: Any = None) -> Arrays:
    """Results and gradients of the reference on [inputs, weights, running] in place of the call's own, converted to a dtype."""
    inputs, weights, running = arguments if dtype is None else (cast(arrays, dtype) for arrays in arguments)
    return Sample(sample.op, inputs, sample.constants).run("reference", weights, running)


def _distances(these: Arrays, others: Arrays) -> dict[str, float]:
    return {n: _largest(others[n] - a) for n, a in these.items() if is_floating(a)}


def _bfloat16_doubt(sample: Sample, weights: Arrays, running: Arrays, rng: np.random.Generator) -> tuple[Arrays, dict[str, float], float]:
    """The same in bfloat16, where the naive version is the reference on bfloat16 arrays: what it saves and all between is rounded too."""

    def naive(arguments: list[Arrays]) -> Arrays:
        try:
            return cast(_reference(sample, arguments), np.float64)
        except TypeError as error:
            if "einsum" not in str(error):  # which NumPy has not for bfloat16: there, only results are rounded
                raise
            return cast(cast(_reference(sample, arguments, np.float32), BFLOAT16), np.float64)

    given = [sample.inputs, weights, running]
    truth = _reference(sample, given, np.float64)
    doubt = _distances(truth, naive(given))
    for _ in range(_tries(truth)):
        beside = [_nudged(arrays, BFLOAT16, rng) for arrays in given]
        other = _distances(_reference(sample, beside, np.float64), naive(beside))
        doubt = {n: max(d, other[n]) for n, d in doubt.items()}
    return truth, {n: 2 * d for n, d in doubt.items()}, BFLOAT16_ROUNDING


def _tries(results: Arrays) -> int:
    """On how many other arguments the naive version is tried, so that luck with one of them decides nothing."""
    return 4 if sum(a.size for a in results.values() if is_floating(a)) < 100_000 else 1


def _nudged(arrays: Arrays, dtype: Any, rng: np.random.Generator) -> Arrays:
    """The arrays with each element of floats moved up or down by one unit of the last place of a dtype, as their numbers are of it."""
    unit = float(ml_dtypes.finfo(dtype).eps)
    return {
        n: (a * (1 + unit * rng.choice((-1, 1), a.shape))).astype(dtype).astype(a.dtype) if is_floating(a) else a for n, a in arrays.items()
    }


def _largest(array: np.ndarray) -> float:
    return float(np.max(np.abs(array), initial=0.0))
