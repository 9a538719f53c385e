"""A gradient against central differences of the function it is of.

L = Σ weights·results with fixed random weights; its gradient, as backward gives it, is held against central differences of the same forward
in float64,

    (L(x + h·v) - L(x - h·v)) / 2h  =  v·dL/dx + O(h²) + O(u / h),      u = 1.1e-16

along random directions v over everything at once, which sees every element a little, and along single elements, which sees a few exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .result import CheckResult

# The step, in units of an input's root mean square, near the optimum (3u)^(1/3) = 7e-6 of a second-order difference: there truncation
# (h² = 1e-10 times the third derivative over the first) and rounding (u / h = 1e-11) both lie near 1e-10.
STEP = 1e-5
# What may remain for sums of many terms and sharp curvature, and still far below what any wrong formula causes: a gradient that is wrong in
# one element of a million, by its own size, moves a direction by 1e-3 of what it is.
TOLERANCE = 1e-6


def slope(evaluate: Callable[[], Sequence[np.ndarray]], weights: Sequence[np.ndarray], move: Callable[[float], None], step: float) -> float:
    """The central difference of Σ weights·evaluate() as `move` takes the inputs to -step and +step; it ends at 0.

    Results are subtracted before they are summed: one that does not move adds no rounding error.
    """
    move(step)
    above = evaluate()
    move(-step)
    below = evaluate()
    move(0.0)
    return sum(float(np.vdot(w, a - b)) for w, a, b in zip(weights, above, below)) / (2 * step)


def _along(arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray]) -> Callable[[float], None]:
    start = [a.copy() for a in arrays]

    def move(distance: float) -> None:
        for array, origin, direction in zip(arrays, start, directions):
            array[...] = origin + distance * direction

    return move


def along_element(array: np.ndarray, index: tuple[int, ...]) -> Callable[[float], None]:
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
    """Hold `gradients` of Σ weights·evaluate() against central differences.

    variables: float64 arrays that `evaluate` reads; they are moved, and put back. elements: of each variable, all where it has no more.
    A direction's error is relative to what a random direction gives (the gradient's norm); an element's, to itself and the root mean square
    of its gradient, since an error of another element's order is no fault; either, to at least what rounding may make of a difference.
    """
    arrays = list(variables.values())
    scales = [_rms(a) or 1.0 for a in arrays]
    rounding = _rounding(evaluate, weights, arrays, scales, rng) / STEP
    for _ in range(directions):
        vectors = [scale * rng.standard_normal(a.shape) for a, scale in zip(arrays, scales)]
        difference = slope(evaluate, weights, _along(arrays, vectors), STEP)
        given = sum(float(np.vdot(v, gradients[n])) for n, v in zip(variables, vectors))
        norm = sum(float(np.vdot(gradients[n], gradients[n])) * scale**2 for n, scale in zip(variables, scales)) ** 0.5
        _judge(result, given, difference, norm, rounding, f"{what}: along a direction over {', '.join(variables)}")
        result.directions += 1
    for (name, array), scale in zip(variables.items(), scales):
        size = _rms(gradients[name])
        chosen = range(array.size) if array.size <= elements else np.sort(rng.choice(array.size, elements, replace=False))
        for position in chosen:
            index = tuple(int(i) for i in np.unravel_index(position, array.shape))
            difference = slope(evaluate, weights, along_element(array, index), STEP * scale)
            given = float(gradients[name][index])
            _judge(
                result,
                given,
                difference,
                size + max(abs(given), abs(difference)),
                rounding / scale,
                f"{what}: d{name}[{', '.join(map(str, index))}]",
            )
            result.elements += 1


def _rounding(
    evaluate: Callable[[], Sequence[np.ndarray]],
    weights: Sequence[np.ndarray],
    arrays: Sequence[np.ndarray],
    scales: Sequence[float],
    rng: np.random.Generator,
) -> float:
    """By about how much roundings change Σ weights·evaluate().

    A result carries the roundings of its own size, those of the numbers it was made of even where it is 0, and what becomes of one
    rounding of every argument on its way through: a deep model's grow. Twice that, since a difference has two ends.
    """
    unit = float(np.finfo(np.float64).eps)
    results = evaluate()
    own = sum(float(np.sum(w**2 * (r**2 + max(scales) ** 2))) for w, r in zip(weights, results)) ** 0.5
    move = _along(arrays, [a * rng.choice((-1.0, 1.0), a.shape) for a in arrays])
    move(unit)
    moved = sum(float(np.sum((w * (r - other)) ** 2)) for w, r, other in zip(weights, results, evaluate())) ** 0.5
    move(0.0)
    return unit * own + 2 * moved


def _judge(result: CheckResult, given: float, difference: float, size: float, rounding: float, where: str) -> None:
    error = abs(given - difference) / (size + rounding / TOLERANCE or 1.0)
    result.note(error, error <= TOLERANCE, f"{where}: backward gives {given:.10g}, the central difference {difference:.10g}")


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0
