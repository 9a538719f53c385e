"""`gradcheck`: verify the gradient of a function of tensors, like torch.autograd.gradcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UserError
from ..grad_mode import no_grad
from ..tensor import Tensor
from .differences import along_element, slope


class GradientError(RuntimeError):
    """A gradient differs from the central difference; the message names the input, the index and both values."""


def gradcheck(function: Callable[..., Tensor], inputs: Any, *, eps: float = 1e-6, rtol: float = 1e-5, atol: float = 1e-7) -> bool:
    """Check a function's gradient, element by element, against central differences of step `eps`.

    function: takes one Tensor per input (integer arrays are passed unchanged) and returns a Tensor of any shape, which is contracted with
        fixed random weights.
    inputs: an array or Tensor, or a sequence of them, in float64. Arrays of floats and Tensors with requires_grad are checked.
    Returns True if every |backward - difference| <= atol + rtol·|difference|, as in torch.autograd.gradcheck.
    Raises GradientError with the first differing input, its index and both values, or if two calls of the function differ;
    UserError if an input is not float64 or there is nothing to check.
    """
    input_list = [inputs] if isinstance(inputs, (Tensor, np.ndarray)) else list(inputs)
    requires_grad = [t.requires_grad if isinstance(t, Tensor) else np.asarray(t).dtype.kind == "f" for t in input_list]
    arrays = [np.array(t.data if isinstance(t, Tensor) else t, order="C") for t in input_list]
    for i, a in enumerate(arrays):
        if a.dtype.kind == "f" and a.dtype != np.float64:
            raise UserError(f'gradcheck needs float64: input {i} is {a.dtype}; convert it with astype("float64")')
    if not any(requires_grad):
        raise UserError("gradcheck has nothing to check: no input is an array of floats or a Tensor with requires_grad=True")

    def call() -> tuple[list[Any], Tensor]:
        sources = [Tensor(a.copy(), requires_grad=w) if a.dtype.kind == "f" else a for a, w in zip(arrays, requires_grad)]
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
        if not requires_grad[i]:
            continue
        gradient = np.zeros(array.shape) if source.grad is None else source.grad.numpy()
        for index in np.ndindex(array.shape):
            difference = slope(evaluate, [weights], along_element(array, index), eps)
            if not abs(gradient[index] - difference) <= atol + rtol * abs(difference):
                raise GradientError(
                    f"input {i}, index {index}: backward gives {gradient[index]:.10g}, the central difference {difference:.10g}"
                )
    return True
