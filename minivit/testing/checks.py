"""Checks of every op and of models on this machine: correctness of gradients (`differences.py`) and accuracy (`numerics.py`)."""

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
    """One row of the table printed by `minivit gradcheck`.

    name: the op or model; backend: "cpu", "reference", ...; dtype: "float64", "float32" or "bfloat16".
    against: "differences" (check of gradients) or "reference" (accuracy of results and gradients).
    directions, elements: the number that was checked (all elements of arrays compared with the reference).
    worst: the largest error, relative to the size of the gradient or, for "reference", to the largest element of the array.
    failure: "" if the check passed; otherwise the location of the first failure and both values.
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
    """Check an op's backward against central differences of its forward, both of the same implementation, in float64."""
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
    """Check one implementation of an op on its cases (or on `cases`), large ones shrunk: gradients in float64, accuracy in every dtype.

    work: approximate number of operations for the element-wise differences of one input of one case (2 to 100 elements are checked).
    Returns one Report each for gradients and the accuracy in float64, float32 and bfloat16. The reference has only the first, an op without
    backward does not have the first, and an op without activations does not have the last.
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
                total_size = sum(prod(s) for s in shapes if s is not None)
                # reading and writing an element costs about 20 operations
                operations = op.cost(*shapes, *sample.constants.values()).forward + 20 * total_size
                elements = int(np.clip(work / operations, 2, 100))
                check_gradients(sample, implementation, rng, directions, elements, gradients)
    rows = [("float64", "differences", gradients)] if op.backward else []
    rows += [(str(dtype), "reference", accuracy) for dtype, accuracy in accuracies.items() if accuracy.elements]
    return [Report(op.name, implementation, dtype, against, r.directions, r.elements, r.worst, r.failure) for dtype, against, r in rows]


def check_model(model: Module, images: np.ndarray, *, name: str = "model", seed: int = 0, directions: int = 3, elements: int = 2) -> Report:
    """Check the gradients of a float64 model: along directions over all parameters and the images together, and at `elements` elements of
    each.

    images: (B, C, H, W). The weights are perturbed for the check and restored afterwards, because a zero bias or a small LayerScale could
    hide a wrong gradient. Raises UserError if a parameter is not float64 or two evaluations differ.
    """
    rng = np.random.default_rng(seed)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wrong_dtype = next((f"{n} is {p.dtype}" for n, p in parameters.items() if p.dtype != np.float64), None)
    if wrong_dtype:
        raise UserError(f'gradients are checked in float64: {wrong_dtype}; create the model with dtype="float64"')
    images = np.array(images, np.float64)  # (B, C, H, W)
    state = {n: p.data.copy() for n, p in parameters.items()}

    def output(x: Tensor) -> Tensor:
        return concatenate(*model.exits(x), axis=1)

    def evaluate() -> list[np.ndarray]:
        with no_grad():
            return [output(Tensor(images)).numpy().copy()]

    check_result = CheckResult()
    try:
        for p in parameters.values():
            p.data += 0.1 * rng.standard_normal(p.shape)
        source = Tensor(images, requires_grad=True)
        model.zero_grad()
        result = output(source)
        weights = rng.standard_normal(result.shape)
        if not np.array_equal(evaluate()[0], evaluate()[0]):  # which may fold normalisations into weights, unlike `result`
            raise UserError(f"two evaluations of {name} differ: call model.eval() to switch dropout off")
        result.backward(weights)
        leaves = {**parameters, "images": source}
        gradients = {n: np.zeros(t.shape) if t.grad is None else t.grad.numpy().copy() for n, t in leaves.items()}
        compare(
            check_result,
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
    return Report(
        name, "cpu", "float64", "differences", check_result.directions, check_result.elements, check_result.worst, check_result.failure
    )


def check(
    names: Sequence[str] = (), models: Mapping[str, Callable[[], tuple[Module, np.ndarray]]] | None = None, implementation: str = "cpu"
) -> Iterator[Report]:
    """The rows of `minivit gradcheck`, each yielded as soon as it is computed.

    names: names of ops and models; empty: all ops and all of `models`.
    models: by model name, a function that returns a float64 model in evaluation mode and images for it; it is called when needed.
    Raises UserError for an unknown name, before anything is computed.
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
