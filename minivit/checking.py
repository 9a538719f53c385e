"""Whether gradients are right and kernels accurate: on this machine, for every op, for a model, for a function of yours.

Gradients. L = Σ weights·results with fixed random weights; its gradient, as backward gives it, is held against central differences of the
same forward in float64,

    (L(x + h·v) - L(x - h·v)) / 2h  =  v·dL/dx + O(h²) + O(u / h),      u = 1.1e-16

along random directions v over everything at once, which sees every element a little, and along single elements, which sees a few exactly.

Accuracy. Flash-attention's rule (2205.14135, its tests): a fast version may err, against the reference in float64, at most twice as much as
the plain reference in the same low precision does, plus a floor of a few roundings; in bfloat16 of one. With products of split
bfloat16 ("bf16x3"), whose roundings are 64 times float32's, it may err by 64 times what the reference does in float32, plus one of them.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from .errors import UserError, nearest
from .functional import concatenate
from .kernels import OPS, Op
from .kernels.call import Arrays, Call, cast, is_floating, make_inputs, shrunk
from .kernels.device import BFLOAT16
from .kernels.gemm import split_products
from .module import Module
from .tensor import Tensor, no_grad

# The step, in units of an input's root mean square, near the optimum (3u)^(1/3) = 7e-6 of a second-order difference: there truncation
# (h² = 1e-10 times the third derivative over the first) and rounding (u / h = 1e-11) both lie near 1e-10.
STEP = 1e-5
# What may remain for sums of many terms and sharp curvature, and still far below what any wrong formula causes: a gradient that is wrong in
# one element of a million, by its own size, moves a direction by 1e-3 of what it is.
TOLERANCE = 1e-6
# The floor under flash-attention's rule, in roundings of the largest number that took part: where the naive version happens to be exact.
FLOOR = 4.0
BFLOAT16_ROUNDING = 2.0 ** -8                           # of bfloat16, the most that one rounding changes a number by, relative to it
SPLIT_ROUNDING = 2.0 ** -17                             # of the sum of two bfloat16


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


@dataclass
class Tally:
    """What a check has tried so far."""

    directions: int = 0
    elements: int = 0
    worst: float = 0.0
    failure: str = ""                                   # the first

    def note(self, error: float, passed: bool, failure: str) -> None:
        self.worst = max(self.worst, float(error)) if np.isfinite(error) else np.inf
        if not passed and not self.failure:
            self.failure = failure


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


def compare(tally: Tally, what: str, evaluate: Callable[[], Sequence[np.ndarray]], weights: Sequence[np.ndarray],
            variables: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray], rng: np.random.Generator, directions: int,
            elements: int) -> None:
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
        norm = sum(float(np.vdot(gradients[n], gradients[n])) * scale ** 2 for n, scale in zip(variables, scales)) ** 0.5
        _judge(tally, given, difference, norm, rounding, f"{what}: along a direction over {', '.join(variables)}")
        tally.directions += 1
    for (name, array), scale in zip(variables.items(), scales):
        size = _rms(gradients[name])
        chosen = range(array.size) if array.size <= elements else np.sort(rng.choice(array.size, elements, replace=False))
        for position in chosen:
            index = tuple(int(i) for i in np.unravel_index(position, array.shape))
            difference = slope(evaluate, weights, _at(array, index), STEP * scale)
            given = float(gradients[name][index])
            _judge(tally, given, difference, size + max(abs(given), abs(difference)), rounding / scale,
                   f"{what}: d{name}[{', '.join(map(str, index))}]")
            tally.elements += 1


def _rounding(evaluate: Callable[[], Sequence[np.ndarray]], weights: Sequence[np.ndarray], arrays: Sequence[np.ndarray],
              scales: Sequence[float], rng: np.random.Generator) -> float:
    """By about how much roundings change Σ weights·evaluate().

    A result carries the roundings of its own size, those of the numbers it was made of even where it is 0, and what becomes of one
    rounding of every argument on its way through: a deep model's grow. Twice that, since a difference has two ends.
    """
    unit = float(np.finfo(np.float64).eps)
    results = evaluate()
    own = sum(float(np.sum(w ** 2 * (r ** 2 + max(scales) ** 2))) for w, r in zip(weights, results)) ** 0.5
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


def check_gradients(call: Call, implementation: str, rng: np.random.Generator, directions: int, elements: int, tally: Tally) -> None:
    """An op's backward against central differences of its forward, both of one implementation, in float64."""
    weights = call.weights(rng)
    present = [n for n, w in weights.items() if w is not None]
    gradients = call.backward(implementation, call.forward(implementation), weights)

    def evaluate() -> list[np.ndarray]:
        outputs = call.forward(implementation)
        return [outputs[n] for n in present]

    compare(tally, call.op.name, evaluate, [weights[n] for n in present], {n: call.inputs[n] for n in gradients}, gradients, rng,
            directions, elements)


# ------------------------------------------------------------------------------------------------------------ accuracy
def check_accuracy(call: Call, implementation: str, rng: np.random.Generator, tally: Tally, accumulate: bool = False,
                   split: bool = False) -> None:
    """Outputs and gradients against the reference in float64, by flash-attention's rule; integer outputs must be equal.

    accumulate: with gradients that run already to the inputs the op adds to. split: products of float32 made of bfloat16 ("bf16x3").
    In bfloat16, parameters are rounded to it first, since products round weights.
    """
    if call.dtype == BFLOAT16:
        inputs = {n: a.astype(BFLOAT16).astype(a.dtype) if is_floating(a) else a for n, a in call.inputs.items()}
        call = Call(call.op, inputs, call.constants)
    op = call.op
    weights, running = call.weights(rng), call.running(rng) if accumulate else {}
    with split_products(split):
        fast = call.run(implementation, weights, running)
    doubts = _bfloat16_doubt(call, weights, running, rng) if call.dtype == BFLOAT16 else _doubt(call, weights, running, rng, split)
    truth, doubt, rounding = doubts
    read = [a for a in (*call.inputs.values(), *weights.values(), *running.values(), *(truth.get(n) for n in op.saves)) if is_floating(a)]
    largest = max(_largest(a) for a in read)
    for name, value in fast.items():
        if value is None:
            continue
        tally.elements += value.size
        if not is_floating(value):
            equal = np.array_equal(value, truth[name])
            tally.note(float(not equal), equal, f"{op.name}: {name} differs from the reference")
            continue
        errors = np.abs(value.astype(np.float64) - truth[name])
        size = _largest(truth[name])
        allowed = doubt[name] + rounding * max(size, largest)
        error = _largest(errors)                        # NaN where an element is
        where = np.unravel_index(np.argmax(errors), errors.shape)
        tally.note(error / (size or 1.0), error <= allowed,
                   f"{op.name} {'bf16x3' if split else call.dtype}: {name}[{', '.join(map(str, where))}] is {value[where]:.9g}, the "
                   f"reference in float64 {truth[name][where]:.9g}; they may differ by {allowed:.2g}")


def _doubt(call: Call, weights: Arrays, running: Arrays, rng: np.random.Generator,
           split: bool) -> tuple[Arrays, dict[str, float], float]:
    """The truth, how far each result may be from it for what the op is, and how far for each unit of the largest number.

    How far a result can be trusted is measured in float32, where the truth is known, and carries over to float64 in units of the last
    place. It is the error of the reference in float32, or what one rounding of every argument does to it: where a result is ill-conditioned
    (a layer norm over two channels that are almost equal), or sums many terms, one float32 run may be right by luck.
    """
    unit = float(np.finfo(np.float32).eps)
    low = [cast(arrays, np.float32) for arrays in (call.inputs, weights, running)]

    def run(arguments: list[Arrays], dtype: Any) -> Arrays:
        inputs, w, r = (cast(arrays, dtype) for arrays in arguments)
        return Call(call.op, inputs, call.constants).run("reference", w, r)

    high = run(low, np.float64)
    doubt = _distances(high, run(low, np.float32))
    for _ in range(_tries(high)):
        beside = [_nudged(arrays, np.float32, rng) for arrays in low]
        there = run(beside, np.float64)
        for other in (_distances(high, there), _distances(there, run(beside, np.float32))):
            doubt = {n: max(d, other[n]) for n, d in doubt.items()}
    own, factor, floor = float(np.finfo(call.dtype).eps), 2, FLOOR      # flash-attention's 2
    if split:
        own, factor, floor = SPLIT_ROUNDING, 1, 1.0
    doubt = {n: factor * own / unit * d for n, d in doubt.items()}
    if call.dtype == np.float64:                        # where the little precision that there is above it shows what the reference errs
        given = [call.inputs, weights, running]
        high = run(given, np.longdouble)
        naive = _distances(high, run(given, np.float64))
        doubt = {n: max(d, factor * naive[n]) for n, d in doubt.items()}
    return high, doubt, floor * own


def _distances(these: Arrays, others: Arrays) -> dict[str, float]:
    return {n: _largest(others[n] - a) for n, a in these.items() if is_floating(a)}


def _bfloat16_doubt(call: Call, weights: Arrays, running: Arrays, rng: np.random.Generator) -> tuple[Arrays, dict[str, float], float]:
    """The same in bfloat16, where the naive version is the reference on bfloat16 arrays: what it saves and all between is rounded too."""
    def run(arguments: list[Arrays], dtype: Any) -> Arrays:
        inputs, w, r = (cast(arrays, dtype) for arrays in arguments)
        return Call(call.op, inputs, call.constants).run("reference", w, r)

    def naive(arguments: list[Arrays]) -> Arrays:
        inputs, w, r = arguments
        try:
            return cast(Call(call.op, inputs, call.constants).run("reference", w, r), np.float64)
        except TypeError as error:
            if "einsum" not in str(error):              # which NumPy has not for bfloat16: there, only results are rounded
                raise
            return cast(cast(run(arguments, np.float32), BFLOAT16), np.float64)

    given = [call.inputs, weights, running]
    truth = run(given, np.float64)
    doubt = _distances(truth, naive(given))
    for _ in range(_tries(truth)):
        beside = [_nudged(arrays, BFLOAT16, rng) for arrays in given]
        other = _distances(run(beside, np.float64), naive(beside))
        doubt = {n: max(d, other[n]) for n, d in doubt.items()}
    return truth, {n: 2 * d for n, d in doubt.items()}, BFLOAT16_ROUNDING


def _tries(results: Arrays) -> int:
    """On how many other arguments the naive version is tried, so that luck with one of them decides nothing."""
    return 4 if sum(a.size for a in results.values() if is_floating(a)) < 100_000 else 1


def _nudged(arrays: Arrays, dtype: Any, rng: np.random.Generator) -> Arrays:
    """The arrays with each element of floats moved up or down by one unit of the last place of a dtype, as their numbers are of it."""
    unit = float(ml_dtypes.finfo(dtype).eps)
    return {n: (a * (1 + unit * rng.choice((-1, 1), a.shape))).astype(dtype).astype(a.dtype) if is_floating(a) else a
            for n, a in arrays.items()}


def _largest(array: np.ndarray) -> float:
    return float(np.max(np.abs(array), initial=0.0))


# ------------------------------------------------------------------------------------------------------------ ops and models
def check_op(op: Op, implementation: str = "cpu", *, cases: Sequence[Mapping[str, Any]] | None = None, seed: int = 0, directions: int = 2,
             work: float = 2e7) -> list[Report]:
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
            call = Call(op, *make_inputs(op, case, dtype, rng))
            if implementation != "reference" and call.dtype == dtype:
                check_accuracy(call, implementation, rng, tally)
                if op.accumulates:
                    check_accuracy(call, implementation, rng, tally, accumulate=True)
            if op.backward and dtype == np.float64:
                shapes = [None if a is None else a.shape for a in call.inputs.values()]
                touched = sum(prod(s) for s in shapes if s is not None)
                effort = op.cost(*shapes, *call.constants.values()).forward + 20 * touched      # an element moved costs about 20 operations
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
    images = np.array(images, np.float64)               # (B, C, H, W)
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
        compare(tally, name, evaluate, [weights], {**{n: p.data for n, p in parameters.items()}, "images": images}, gradients, rng,
                directions, elements)
    finally:
        model.zero_grad()
        for n, p in parameters.items():
            p.data[...] = state[n]
    return Report(name, "cpu", "float64", "differences", tally.directions, tally.elements, tally.worst, tally.failure)


def check(names: Sequence[str] = (), models: Mapping[str, Callable[[], tuple[Module, np.ndarray]]] | None = None,
          implementation: str = "cpu") -> Iterator[Report]:
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
                raise GradientError(f"input {i}, index {index}: backward gives {gradient[index]:.10g}, "
                                    f"the central difference {difference:.10g}")
    return True
