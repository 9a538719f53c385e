"""Whether gradients are right and kernels accurate: on this machine, for every op, for a model, for a function of yours.

Gradients. L = Σ weights·results with fixed random weights; its gradient, as backward gives it, is held against central differences of the
same forward in float64,

    (L(x + h·v) - L(x - h·v)) / 2h  =  v·dL/dx + O(h²) + O(u / h),      u = 1.1e-16

along random directions v over everything at once, which sees every element a little, and along single elements, which sees a few exactly.

Accuracy. `accuracy.py` has the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from .accuracy import Tally, check_accuracy
from .errors import UserError, nearest
from .functional import concatenate
from .kernels import OPS
from .kernels.core.cases import Sample, make_inputs, shrunk
from .kernels.core.dtypes import BFLOAT16
from .kernels.core.op import Op
from .module import Module
from .tensor import Tensor, no_grad

# The step, in units of an input's root mean square, near the optimum (3u)^(1/3) = 7e-6 of a second-order difference: there truncation
# (h² = 1e-10 times the third derivative over the first) and rounding (u / h = 1e-11) both lie near 1e-10.
STEP = 1e-5
# What may remain for sums of many terms and sharp curvature, and still far below what any wrong formula causes: a gradient that is wrong in
# one element of a million, by its own size, moves a direction by 1e-3 of what it is.
TOLERANCE = 1e-6


class GradientError(RuntimeError):
    """A gradient differs from the central difference; the message names the input, the index and both values."""


@dataclass(frozen=True)
class Report:
    """A line of the table that `minivit gradcheck` prints.

    name: the op or model; backend: "cpu", "reference", ...; dtype: "float64", "float32" or "bfloat16".
    against: "differences" (the gradients' check) or "reference" (the accuracy of results and gradients).
    directions, elements: how many were tried (of arrays compared with the reference, all elements are).
    worst: the largest relative error. A gradient's is relative to its own size, that of the largest element for "reference".
    failure: "" where it passed; else where it failed first, and both values.
    """

    name: str
    backend: str
    dtype: str
    against: str
    directions: int
    elements: int
    worst: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure


# ------------------------------------------------------------------------------------------------------------ gradients
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


def _at(array: np.ndarray, index: tuple[int, ...]) -> Callable[[float], None]:
    start = array[index]

    def move(distance: float) -> None:
        array[index] = start + distance

    return move


def compare(
    tally: Tally,
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
        _judge(tally, given, difference, norm, rounding, f"{what}: along a direction over {', '.join(variables)}")
        tally.directions += 1
    for (name, array), scale in zip(variables.items(), scales):
        size = _rms(gradients[name])
        chosen = range(array.size) if array.size <= elements else np.sort(rng.choice(array.size, elements, replace=False))
        for position in chosen:
            index = tuple(int(i) for i in np.unravel_index(position, array.shape))
            difference = slope(evaluate, weights, _at(array, index), STEP * scale)
            given = float(gradients[name][index])
            _judge(
                tally,
                given,
                difference,
                size + max(abs(given), abs(difference)),
                rounding / scale,
                f"{what}: d{name}[{', '.join(map(str, index))}]",
            )
            tally.elements += 1


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


def _judge(tally: Tally, given: float, difference: float, size: float, rounding: float, where: str) -> None:
    error = abs(given - difference) / (size + rounding / TOLERANCE or 1.0)
    tally.note(error, error <= TOLERANCE, f"{where}: backward gives {given:.10g}, the central difference {difference:.10g}")


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0


def check_gradients(call: Sample, implementation: str, rng: np.random.Generator, directions: int, elements: int, tally: Tally) -> None:
    """An op's backward against central differences of its forward, both of one implementation, in float64."""
    weights = call.weights(rng)
    present = [n for n, w in weights.items() if w is not None]
    gradients = call.backward(implementation, call.forward(implementation), weights)

    def evaluate() -> list[np.ndarray]:
        outputs = call.forward(implementation)
        return [outputs[n] for n in present]

    compare(
        tally,
        call.op.name,
        evaluate,
        [weights[n] for n in present],
        {n: call.inputs[n] for n in gradients},
        gradients,
        rng,
        directions,
        elements,
    )


# ------------------------------------------------------------------------------------------------------------ ops and models
def check_op(
    op: Op,
    implementation: str = "cpu",
    *,
    cases: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    directions: int = 2,
    work: float = 2e7,
) -> list[Report]:
    """Check one implementation of an op on its cases (or these), with large ones shrunk: gradients in float64, accuracy in every dtype.

    work: about how many operations the element-by-element differences of one input of one case may take (at least 2 and at most 100
    elements are tried). Returns a Report each for gradients, float64, float32 and bfloat16; the first alone for the reference, and not for
    an op without backward; the last not for an op without activations.
    """
    gradients, tallies = Tally(), {np.dtype(t): Tally() for t in (np.float64, np.float32, BFLOAT16)}
    for case in op.cases if cases is None else cases:
        case = shrunk(op, case)
        for dtype, tally in tallies.items():
            rng = np.random.default_rng(seed)
            call = Sample(op, *make_inputs(op, case, dtype, rng))
            if implementation != "reference" and call.dtype == dtype:
                check_accuracy(call, implementation, rng, tally)
                if op.accumulates:
                    check_accuracy(call, implementation, rng, tally, accumulate=True)
            if op.backward and dtype == np.float64:
                shapes = [None if a is None else a.shape for a in call.inputs.values()]
                touched = sum(prod(s) for s in shapes if s is not None)
                effort = op.cost(*shapes, *call.constants.values()).forward + 20 * touched  # an element moved costs about 20 operations
                elements = int(np.clip(work / effort, 2, 100))
                check_gradients(call, implementation, rng, directions, elements, gradients)
    rows = [("float64", "differences", gradients)] if op.backward else []
    rows += [(str(dtype), "reference", tally) for dtype, tally in tallies.items() if tally.elements]
    return [Report(op.name, implementation, dtype, against, t.directions, t.elements, t.worst, t.failure) for dtype, against, t in rows]


def check_model(model: Module, images: np.ndarray, *, name: str = "model", seed: int = 0, directions: int = 3, elements: int = 2) -> Report:
    """Check the gradients of a float64 model: along directions over all its parameters and the images at once, and at `elements` elements
    of each.

    images: (B, C, H, W). The check is done near the model's weights, not at them, where a zero bias or a small LayerScale would hide
    a wrong gradient; they are put back. Raises UserError where a parameter is not float64 or two evaluations differ.
    """
    rng = np.random.default_rng(seed)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    other = next((f"{n} is {p.dtype}" for n, p in parameters.items() if p.dtype != np.float64), None)
    if other:
        raise UserError(f'gradients are checked in float64: {other}; create the model with dtype="float64"')
    images = np.array(images, np.float64)  # (B, C, H, W)
    state = {n: p.data.copy() for n, p in parameters.items()}

    def answer(given: Tensor) -> Tensor:
        return concatenate(*model.exits(given), axis=1)

    def evaluate() -> list[np.ndarray]:
        with no_grad():
            return [answer(Tensor(images)).numpy().copy()]

    tally = Tally()
    try:
        for p in parameters.values():
            p.data += 0.1 * rng.standard_normal(p.shape)
        source = Tensor(images, requires_grad=True)
        model.zero_grad()
        result = answer(source)
        weights = rng.standard_normal(result.shape)
        if not np.array_equal(evaluate()[0], result.numpy()):
            raise UserError(f"two evaluations of {name} differ: call model.eval() to switch dropout off")
        result.backward(weights)
        leaves = {**parameters, "images": source}
        gradients = {n: np.zeros(t.shape) if t.grad is None else t.grad.numpy().copy() for n, t in leaves.items()}
        compare(
            tally,
            name,
            evaluate,
            [weights],
            {**{n: p.data for n, p in parameters.items()}, "images": images},
            gradients,
            rng,
            directions,
            elements,
        )
    finally:
        model.zero_grad()
        for n, p in parameters.items():
            p.data[...] = state[n]
    return Report(name, "cpu", "float64", "differences", tally.directions, tally.elements, tally.worst, tally.failure)


def check(
    names: Sequence[str] = (), models: Mapping[str, Callable[[], tuple[Module, np.ndarray]]] | None = None, implementation: str = "cpu"
) -> Iterator[Report]:
    """The table of `minivit gradcheck`, line by line as it is computed.

    names: of ops and of models; none means every op and every one of `models`.
    models: a float64 model, in evaluation mode, and images for it, by the model's name, each made when it is its turn.
    Raises UserError for a name that is neither, before anything is computed.
    """
    models = models or {}
    for name in names:
        if name not in OPS and name not in models:
            raise UserError(f"no op or model is called {name!r}{nearest(name, [*OPS, *models])}")

    def rows() -> Iterator[Report]:
        for name in names or [*OPS, *models]:
            if name in OPS:
                yield from check_op(OPS[name], implementation)
            else:
                yield check_model(*models[name](), name=name)

    return rows()


# ------------------------------------------------------------------------------------------------------------ functions
def gradcheck(function: Callable[..., Tensor], inputs: Any, *, eps: float = 1e-6, rtol: float = 1e-5, atol: float = 1e-7) -> bool:
    """Check a function's gradient, element by element, against central differences of step `eps`.

    function: takes a Tensor an input (an array of integers is handed over as it is) and returns a Tensor of any shape, which is
        contracted with fixed random weights.
    inputs: an array or Tensor, or a sequence of them, in float64. Arrays of floats are checked, and Tensors with requires_grad.
    Returns True where each |backward - difference| <= atol + rtol·|difference|, as torch.autograd.gradcheck.
    Raises GradientError naming the first input and index that differ and both values, or where two calls of the function differ;
    UserError where an input is not float64 or there is nothing to check.
    """
    given = [inputs] if isinstance(inputs, (Tensor, np.ndarray)) else list(inputs)
    wanted = [t.requires_grad if isinstance(t, Tensor) else np.asarray(t).dtype.kind == "f" for t in given]
    arrays = [np.array(t.data if isinstance(t, Tensor) else t, order="C") for t in given]
    for i, a in enumerate(arrays):
        if a.dtype.kind == "f" and a.dtype != np.float64:
            raise UserError(f'gradcheck needs float64: input {i} is {a.dtype}; convert it with astype("float64")')
    if not any(wanted):
        raise UserError("gradcheck has nothing to check: no input is an array of floats or a Tensor with requires_grad=True")

    def call() -> tuple[list, Tensor]:
        sources = [Tensor(a.copy(), requires_grad=w) if a.dtype.kind == "f" else a for a, w in zip(arrays, wanted)]
        result = function(*sources)
        if not isinstance(result, Tensor):
            raise TypeError(f"gradcheck: the function must return a Tensor, not {type(result).__name__}")
        return sources, result

    def evaluate() -> list[np.ndarray]:
        with no_grad():
            return [call()[1].numpy().copy()]

    sources, result = call()
    if not result.requires_grad:
        raise GradientError("the result depends on no input that requires a gradient")
    if not np.array_equal(result.numpy(), evaluate()[0], equal_nan=True):
        raise GradientError("two calls of the function with the same inputs differ: switch dropout off")
    weights = np.random.default_rng(0).standard_normal(result.shape)
    result.backward(weights)
    for i, (source, array) in enumerate(zip(sources, arrays)):
        if not wanted[i]:
            continue
        gradient = np.zeros(array.shape) if source.grad is None else source.grad.numpy()
        for index in np.ndindex(array.shape):
            difference = slope(evaluate, [weights], _at(array, index), eps)
            if not abs(gradient[index] - difference) <= atol + rtol * abs(difference):
                raise GradientError(
                    f"input {i}, index {index}: backward gives {gradient[index]:.10g}, the central difference {difference:.10g}"
                )
    return True
