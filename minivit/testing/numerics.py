"""The accuracy of an op's kernels.

The criterion of FlashAttention's tests (2205.14135): the error of the kernel, relative to the reference in float64, may be at most twice
the error of the plain reference in the same low precision, plus a floor of a few roundings (one in bfloat16). With products of split
bfloat16 ("bf16x3"), whose roundings are 64 times those of float32, it may be twice 64 times the error of the reference in float32, plus one
rounding.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ..kernels.core.cases import Arrays, Sample, cast, is_floating
from ..kernels.core.dtypes import BFLOAT16
from ..kernels.cpu.gemm import products_in
from .result import CheckResult

# The floor of the criterion, in roundings of the largest operand, for the case that the reference happens to be exact.
FLOOR = 4.0
BFLOAT16_ROUNDING = 2.0**-8  # the largest relative error of one rounding to bfloat16
SPLIT_ROUNDING = 2.0**-17  # the same for the sum of two bfloat16 numbers


def check_accuracy(
    sample: Sample, implementation: str, rng: np.random.Generator, result: CheckResult, accumulate: bool = False, split: bool = False
) -> None:
    """Compare outputs and gradients with the reference in float64, by FlashAttention's criterion; integer outputs must be equal.

    accumulate: with previously accumulated gradients of the inputs that the op accumulates into. split: products of float32 from split
    bfloat16 ("bf16x3"). In bfloat16, parameters are rounded first, because products round weights.
    """
    if sample.dtype == BFLOAT16:
        inputs = {n: a.astype(BFLOAT16).astype(a.dtype) if is_floating(a) else a for n, a in sample.inputs.items()}
        sample = Sample(sample.op, inputs, sample.constants)
    op = sample.op
    weights, running = sample.weights(rng), sample.running(rng) if accumulate else {}
    with products_in("bf16x3" if split else "float32"):
        fast = sample.run(implementation, weights, running)
    bounds = _bfloat16_bounds(sample, weights, running, rng) if sample.dtype == BFLOAT16 else _bounds(sample, weights, running, rng, split)
    truth, bound, rounding = bounds
    used = [a for a in (*sample.inputs.values(), *weights.values(), *running.values(), *(truth.get(n) for n in op.saves)) if is_floating(a)]
    largest = max(_largest(a) for a in used)
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
        allowed = bound[name] + rounding * max(size, largest)
        error = _largest(errors)  # NaN if any element is NaN
        index = np.unravel_index(np.argmax(errors), errors.shape)
        result.note(
            error / (size or 1.0),
            error <= allowed,
            f"{op.name} {'bf16x3' if split else sample.dtype}: {name}[{', '.join(map(str, index))}] is {value[index]:.9g}, the "
            f"reference in float64 {truth[name][index]:.9g}; they may differ by {allowed:.2g}",
        )


def _bounds(
    sample: Sample, weights: Arrays, running: Arrays, rng: np.random.Generator, split: bool
) -> tuple[Arrays, dict[str, float], float]:
    """(results of the reference in high precision, error bound of each result, additional error per unit of the largest operand).

    Error bounds are measured in float32, where an accurate result is known, and scaled to float64 by the unit in the last place. A bound is
    the error of the reference in float32 or the effect of one rounding of every argument, whichever is larger: if a result is
    ill-conditioned (a layer norm over two almost equal channels) or sums many terms, a single float32 run may be accurate by chance.
    """
    unit = float(np.finfo(np.float32).eps)
    low = [cast(arrays, np.float32) for arrays in (sample.inputs, weights, running)]

    high = _reference(sample, low, np.float64)
    bound = _distances(high, _reference(sample, low, np.float32))
    for _ in range(_trials(high)):
        perturbed = [_perturbed(arrays, np.float32, rng) for arrays in low]
        perturbed_high = _reference(sample, perturbed, np.float64)
        for other in (_distances(high, perturbed_high), _distances(perturbed_high, _reference(sample, perturbed, np.float32))):
            bound = {n: max(b, other[n]) for n, b in bound.items()}
    eps, factor, floor = float(np.finfo(sample.dtype).eps), 2, FLOOR  # the factor of FlashAttention's criterion
    if split:
        eps, floor = SPLIT_ROUNDING, 1.0
    bound = {n: factor * eps / unit * b for n, b in bound.items()}
    if sample.dtype == np.float64:  # also measure the error of the reference in float64, against the slightly more precise long double
        arguments = [sample.inputs, weights, running]
        high = _reference(sample, arguments, np.longdouble)
        naive = _distances(high, _reference(sample, arguments, np.float64))
        bound = {n: max(b, factor * naive[n]) for n, b in bound.items()}
    return high, bound, floor * eps


def _reference(sample: Sample, arguments: list[Arrays], dtype: Any = None) -> Arrays:
    """Results and gradients of the reference on arguments [inputs, weights, running], converted to a dtype."""
    inputs, weights, running = arguments if dtype is None else (cast(arrays, dtype) for arrays in arguments)
    return Sample(sample.op, inputs, sample.constants).run("reference", weights, running)


def _distances(first: Arrays, second: Arrays) -> dict[str, float]:
    return {n: _largest(second[n] - a) for n, a in first.items() if is_floating(a)}


def _bfloat16_bounds(sample: Sample, weights: Arrays, running: Arrays, rng: np.random.Generator) -> tuple[Arrays, dict[str, float], float]:
    """`_bounds` for bfloat16, measured with the reference on bfloat16 arrays, which also rounds saved arrays and intermediate results."""

    def naive(arguments: list[Arrays]) -> Arrays:
        try:
            return cast(_reference(sample, arguments), np.float64)
        except TypeError as error:
            if "einsum" not in str(error):  # NumPy's einsum does not support bfloat16; then only results are rounded
                raise
            return cast(cast(_reference(sample, arguments, np.float32), BFLOAT16), np.float64)

    arguments = [sample.inputs, weights, running]
    truth = _reference(sample, arguments, np.float64)
    bound = _distances(truth, naive(arguments))
    for _ in range(_trials(truth)):
        perturbed = [_perturbed(arrays, BFLOAT16, rng) for arrays in arguments]
        other = _distances(_reference(sample, perturbed, np.float64), naive(perturbed))
        bound = {n: max(b, other[n]) for n, b in bound.items()}
    return truth, {n: 2 * b for n, b in bound.items()}, BFLOAT16_ROUNDING


def _trials(results: Arrays) -> int:
    """The number of perturbed arguments on which the reference is evaluated, so that bounds do not depend on a single evaluation."""
    return 4 if sum(a.size for a in results.values() if is_floating(a)) < 100_000 else 1


def _perturbed(arrays: Arrays, dtype: Any, rng: np.random.Generator) -> Arrays:
    """The arrays with each floating-point element changed by ± one unit in the last place of `dtype`, which represents them exactly."""
    unit = float(ml_dtypes.finfo(dtype).eps)
    return {
        n: (a * (1 + unit * rng.choice((-1, 1), a.shape))).astype(dtype).astype(a.dtype) if is_floating(a) else a for n, a in arrays.items()
    }


def _largest(array: np.ndarray) -> float:
    return float(np.max(np.abs(array), initial=0.0))
