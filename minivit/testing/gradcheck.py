"""`gradcheck`: verify the gradient of a function of tensors, like torch.autograd.gradcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UserError
from ..grad_mode import no_grad
from ..tensor import Tensor
from .differences import along_element, slopes


class GradientError(RuntimeError):
    """A gradient differs from the central difference; the message names the output, the input, the index and both values."""


def gradcheck(function: Callable[..., Any], inputs: Any, *, eps: float = 1e-6, rtol: float = 1e-5, atol: float = 1e-7) -> bool:
    """Check a function's gradients, element by element, against central differences of step `eps`.

    function: takes one Tensor per input (integer arrays are passed unchanged) and returns a Tensor of any shape, or a tuple or list of
        them. Each is contracted with fixed random weights and checked by itself; one without a gradient must not change with the inputs.
    inputs: an array or Tensor, or a sequence of them, in float64. Arrays of floats and Tensors with requires_grad are checked.
    Returns True if every |backward - difference| <= atol + rtol·|difference|, as in torch.autograd.gradcheck.
    Raises GradientError with the first differing input, its index and both values, or if two calls of the function differ;
    UserError if an input is not float64 or there is nothing to check, TypeError for a function that returns something else.
    """
    input_list = [inputs] if isinstance(inputs, (Tensor, np.ndarray)) else list(inputs)
    requires_grad = [t.requires_grad if isinstance(t, Tensor) else np.asarray(t).dtype.kind == "f" for t in input_list]
    arrays = [np.array(t.data if isinstance(t, Tensor) else t, order="C") for t in input_list]
    for i, a in enumerate(arrays):
        if a.dtype.kind == "f" and a.dtype != np.float64:
            raise UserError(f'gradcheck needs float64: input {i} is {a.dtype}; convert it with astype("float64")')
    if not any(requires_grad):
        raise UserError("gradcheck has nothing to check: no input is an array of floats or a Tensor with requires_grad=True")

    def call() -> tuple[list[Any], list[Tensor]]:
        sources = [Tensor(a.copy(), requires_grad=w) if a.dtype.kind == "f" else a for a, w in zip(arrays, requires_grad)]
        returned = function(*sources)
        results = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        for result in results:
            if not isinstance(result, Tensor):
                raise TypeError(f"gradcheck: the function must return a Tensor, or a tuple or list of them, not {type(result).__name__}")
        return sources, results

    def evaluate() -> list[np.ndarray]:
        with no_grad():
            return [result.numpy().copy() for result in call()[1]]

    first, second = call()[1], evaluate()
    if not any(result.requires_grad for result in first):
        raise GradientError("the result depends on no input that requires a gradient")
    if len(first) != len(second) or not all(np.array_equal(a.numpy(), b, equal_nan=True) for a, b in zip(first, second)):
        raise GradientError("two calls of the function with the same inputs differ: switch dropout off")
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(result.shape) for result in first]
    gradients = [_gradients(*call(), output, weights[output]) for output in range(len(first))]
    for i, array in enumerate(arrays):
        for index in np.ndindex(array.shape) if requires_grad[i] else ():
            differences = slopes(evaluate, weights, along_element(array, index), eps)
            for output, difference in enumerate(differences):
                gradient = gradients[output][i][index]
                if not abs(gradient - difference) <= atol + rtol * abs(difference):
                    where = f"output {output}, input {i}" if len(differences) > 1 else f"input {i}"
                    raise GradientError(f"{where}, index {index}: backward gives {gradient:.10g}, the central difference {difference:.10g}")
    return True


def _gradients(sources: list[Any], results: list[Tensor], output: int, weights: np.ndarray) -> list[np.ndarray]:
    """The gradients of Σ weights·results[output], one for each source."""
    if results[output].requires_grad:
        results[output].backward(weights)
    return [np.zeros(s.shape) if getattr(s, "grad", None) is None else s.grad.numpy() for s in sources]
