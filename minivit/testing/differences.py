"""Comparison of gradients with central differences.

The gradient of L = Σ weights·results, with fixed random weights, as computed by backward, is compared with central differences of the
forward in float64,

    (L(x + h·v) - L(x - h·v)) / 2h  =  v·dL/dx + O(h²) + O(u / h),      u = 1.1e-16

along random directions v over all inputs together, which depend slightly on every element, and along single elements, which test a few
elements exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .result import CheckResult

# The step, in units of an input's root mean square, near the optimum (3u)^(1/3) = 7e-6 of a second-order difference, where truncation
# (h² = 1e-10 times the third derivative over the first) and rounding (u / h = 1e-11) are both of the order of 1e-10.
STEP = 1e-5
# Allows for sums of many terms and high curvature, and is still far below the error of any wrong formula: a gradient that is wrong in one
# element of a million, by its own size, changes a directional derivative by a relative 1e-3.
TOLERANCE = 1e-6
# A difference across a kink, as relu has, is no derivative. So a difference that disagrees is taken again with a smaller step, which meets
# fewer kinks; a wrong gradient agrees with none.
FRACTIONS = (1.0, 0.1, 0.01)


def slopes(
    evaluate: Callable[[], Sequence[np.ndarray]], weights: Sequence[np.ndarray], move: Callable[[float], None], step: float
) -> list[float]:
    """The central difference of Σ weights·result for each result of evaluate(), between displacements of ±step by `move`, which ends at 0.

    Results are subtracted before summation, so that unchanged ones add no rounding error.
    """
    move(step)
    above = evaluate()
    move(-step)
    below = evaluate()
    move(0.0)
    return [float(np.vdot(w, a - b)) / (2 * step) for w, a, b in zip(weights, above, below)]


def _along_directions(arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray]) -> Callable[[float], None]:
    """A function that displaces `arrays` from their current values along `directions`."""
    start = [a.copy() for a in arrays]

    def move(distance: float) -> None:
        for array, origin, direction in zip(arrays, start, directions):
            array[...] = origin + distance * direction

    return move


def along_element(array: np.ndarray, index: tuple[int, ...]) -> Callable[[float], None]:
    """A function that displaces one element of `array` from its current value."""
    start = array[index]

    def move(distance: float) -> None:
        array[index] = start + distance

    return move


def compare(
    result: CheckResult,
    what: str,
    evaluate: Callable[[], Sequence[np.ndarray]],
    weights: Sequence[np.ndarray],
    variables: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    directions: int,
    elements: int,
) -> None:
    """Compare `gradients` of Σ weights·evaluate() with central differences.

    variables: float64 arrays that `evaluate` reads; they are displaced and restored. elements: the number to check of each variable.
    The error along a direction is relative to the gradient's norm, the expected derivative in a random direction. The error of an element
    is relative to its own size plus the root mean square of the gradient, since errors of the order of other elements are acceptable. Both
    allow for the rounding of the difference.
    """
    arrays = list(variables.values())
    scales = [_rms(a) or 1.0 for a in arrays]
    rounding = _rounding(evaluate, weights, arrays, scales, rng) / STEP

    def check(move: Callable[[float], None], step: float, derivative: float, size: float, rounding: float, where: str) -> None:
        for fraction in FRACTIONS:
            difference = sum(slopes(evaluate, weights, move, fraction * step))
            error = abs(derivative - difference) / (size + rounding / fraction / TOLERANCE or 1.0)
            if error <= TOLERANCE:
                break
        result.note(error, error <= TOLERANCE, f"{where}: backward gives {derivative:.10g}, the central difference {difference:.10g}")

    for _ in range(directions):
        vectors = [scale * rng.standard_normal(a.shape) for a, scale in zip(arrays, scales)]
        derivative = sum(float(np.vdot(v, gradients[n])) for n, v in zip(variables, vectors))
        norm = sum(float(np.vdot(gradients[n], gradients[n])) * scale**2 for n, scale in zip(variables, scales)) ** 0.5
        check(
            _along_directions(arrays, vectors), STEP, derivative, norm, rounding, f"{what}: along a direction over {', '.join(variables)}"
        )
        result.directions += 1
    for (name, array), scale in zip(variables.items(), scales):
        size = _rms(gradients[name])
        positions = range(array.size) if array.size <= elements else np.sort(rng.choice(array.size, elements, replace=False))
        for position in positions:
            index = tuple(int(i) for i in np.unravel_index(position, array.shape))
            derivative, where = float(gradients[name][index]), f"{what}: d{name}[{', '.join(map(str, index))}]"
            check(along_element(array, index), STEP * scale, derivative, size + abs(derivative), rounding / scale, where)
            result.elements += 1


def _rounding(
    evaluate: Callable[[], Sequence[np.ndarray]],
    weights: Sequence[np.ndarray],
    arrays: Sequence[np.ndarray],
    scales: Sequence[float],
    rng: np.random.Generator,
) -> float:
    """The approximate rounding error of Σ weights·evaluate().

    It consists of the rounding of each result (at least that of its operands, even if the result is 0), and of the propagated effect of one
    rounding of every argument, which grows in a deep model; the latter twice, because a difference has two ends.
    """
    unit = float(np.finfo(np.float64).eps)
    results = evaluate()
    result_error = sum(float(np.sum(w**2 * (r**2 + max(scales) ** 2))) for w, r in zip(weights, results)) ** 0.5
    move = _along_directions(arrays, [a * rng.choice((-1.0, 1.0), a.shape) for a in arrays])
    move(unit)
    propagated = sum(float(np.sum((w * (r - other)) ** 2)) for w, r, other in zip(weights, results, evaluate())) ** 0.5
    move(0.0)
    return unit * result_error + 2 * propagated


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0
