"""Whether gradients are right and kernels accurate, on this machine: for every op, and for a model.

`differences.py` checks gradients, `numerics.py` accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..errors import UserError, nearest
from ..functional import concatenate
from ..grad_mode import no_grad
from ..kernels import OPS
from ..kernels.core.cases import Sample, make_inputs, shrunk
from ..kernels.core.dtypes import BFLOAT16
from ..kernels.core.op import Op
from ..nn.module import Module
from ..tensor import Tensor
from .differences import compare
from .numerics import check_accuracy
from .result import CheckResult


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


def check_gradients(
    sample: Sample, implementation: str, rng: np.random.Generator, directions: int, elements: int, result: CheckResult
) -> None:
    """An op's backward against central differences of its forward, both of one implementation, in float64."""
    weights = sample.weights(rng)
    present = [n for n, w in weights.items() if w is not None]
    gradients = sample.backward(implementation, sample.forward(implementation), weights)

    def evaluate() -> list[np.ndarray]:
        outputs = sample.forward(implementation)
        return [outputs[n] for n in present]

    compare(
        result,
        sample.op.name,
        evaluate,
        [weights[n] for n in present],
        {n: sample.inputs[n] for n in gradients},
        gradients,
        rng,
        directions,
        elements,
    )


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
    gradients, accuracies = CheckResult(), {np.dtype(t): CheckResult() for t in (np.float64, np.float32, BFLOAT16)}
    for case in op.cases if cases is None else cases:
        case = shrunk(op, case)
        for dtype, accuracy in accuracies.items():
            rng = np.random.default_rng(seed)
            sample = Sample(op, *make_inputs(op, case, dtype, rng))
            if implementation != "reference" and sample.dtype == dtype:
                check_accuracy(sample, implementation, rng, accuracy)
                if op.accumulates:
                    check_accuracy(sample, implementation, rng, accuracy, accumulate=True)
            if op.backward and dtype == np.float64:
                shapes = [None if a is None else a.shape for a in sample.inputs.values()]
                touched = sum(prod(s) for s in shapes if s is not None)
                effort = op.cost(*shapes, *sample.constants.values()).forward + 20 * touched  # an element moved costs about 20 operations
                elements = int(np.clip(work / effort, 2, 100))
                check_gradients(sample, implementation, rng, directions, elements, gradients)
    rows = [("float64", "differences", gradients)] if op.backward else []
    rows += [(str(dtype), "reference", accuracy) for dtype, accuracy in accuracies.items() if accuracy.elements]
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

    outcome = CheckResult()
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
            outcome,
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
    return Report(name, "cpu", "float64", "differences", outcome.directions, outcome.elements, outcome.worst, outcome.failure)


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
