"""Orthogonalisation by Newton-Schulz iterations (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks").

    X₀      = x / max(‖x‖, EPS), with the Frobenius norm,              y = X after `steps` iterations
    Xₖ₊₁    = p(Aₖ)·Xₖ,         Aₖ = Xₖ·Xₖᵀ,         p(A) = a·I + b·A + c·A²

The singular vectors of x stay as they are; its singular values become about 1 (0.7 ... 1.2), but for the smallest. The formulas are those
for N <= M. Of a matrix with N > M, the transpose is orthogonalised.

Each Aₖ is a polynomial in A₀, so they commute, and follow from each other without X:

    Aₖ₊₁    = p(Aₖ)·Aₖ·p(Aₖ),         Xₖ = p(Aₖ₋₁)···p(A₀)·X₀

A symmetric product takes half of the multiply-adds (`symmetric_product`). With r = M / N, an iteration takes (1.5·r + 0.5)·N³ in the first
form, and 2·N³ in the second, which takes 1.5·r·N³ more at its beginning and end. For square matrices this is the same, and they are
computed in the first form. For others A is computed from X only after SPAN iterations, since p multiplies what rounding has added to the
smallest eigenvalues of A by up to a², or 2·10⁴ in four iterations: in float32 this is of no importance, as these eigenvalues belong to
singular values below 10⁻³ of the largest. Matrices in bfloat16 are computed in the first form, as in the authors' code.

Letters: B batch, N rows, M columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from .core.arrays import constant, empty, empty_like
from .core.devices import device_of
from .core.dtypes import BFLOAT16, accumulator_dtype
from .core.op import Cost, Implementation, Op, Shape
from .core.strides import MAXIMUM, MULTIPLY, POWER
from .cpu import primitives as cpu
from .cpu.gemm import products_in
from .cuda import primitives as cuda

COEFFICIENTS = 3.4445, -4.775, 2.0315  # a, b, c: steep at 0, so that small singular values grow fast
EPS = 1e-7
SPAN = 5


def spans(rows: int, columns: int, steps: int, most: int = SPAN) -> list[int]:
    """The numbers of iterations between two computations of A from X, which sum to `steps`."""
    span = 1 if rows == columns else most
    return [min(span, steps - start) for start in range(0, steps, span)]


# ------------------------------------------------------------------------------------------------------------- reference
def forward_reference(y, x, steps):
    if x.shape[1] > x.shape[2]:
        y, x = y.swapaxes(1, 2), x.swapaxes(1, 2)
    a, b, c = map(x.dtype.type, COEFFICIENTS)
    identity = np.eye(x.shape[1], dtype=x.dtype)
    x = x / np.maximum(np.sqrt((x * x).sum((1, 2), keepdims=True)), x.dtype.type(EPS))
    for span in spans(x.shape[1], x.shape[2], steps):
        A, q = x @ x.swapaxes(1, 2), identity
        for _ in range(span):
            p = a * identity + b * A + c * (A @ A)
            A, q = p @ A @ p, p @ q
        x = q @ x
    y[...] = x


# ----------------------------------------------------------------------------------------------------------- CPU and CUDA
def normalise(on, x, dtype):
    """x / max(‖x‖, EPS) for each matrix of x (B, N, M), in `dtype`."""
    device, x = device_of(x), on.astype(x, accumulator_dtype(x.dtype))
    squares, larger, factors = (empty((len(x), 1, 1), x.dtype, device) for _ in range(3))
    least, exponent = (constant(np.full((1, 1, 1), value, x.dtype), device) for value in (EPS**2, -0.5))
    on.sum_into(squares, x, x)
    on.combine(MAXIMUM, larger, squares, least)
    on.combine(POWER, factors, larger, exponent)
    y = empty_like(x)
    on.combine(MULTIPLY, y, x, factors)
    return on.astype(y, dtype)


def forward(on, y, x, steps):
    B, N, M = x.shape
    a, b, c = COEFFICIENTS
    side, wide = min(N, M), N <= M

    def symmetric(left, right, **terms):
        result = empty((B, side, side), y.dtype, device_of(y))
        on.symmetric_product(result, left, right, **terms)
        return result

    x = normalise(on, x, y.dtype)
    parts = spans(N, M, steps, 1 if y.dtype == BFLOAT16 else SPAN)
    for number, span in enumerate(parts, 1):
        A = symmetric(x, x, transpose_a=not wide, transpose_b=wide)
        q = None
        for k in range(span):
            p = symmetric(A, A, scale=c, extra=A, extra_scale=b, diagonal=a)
            q = p if q is None else symmetric(p, q)
            if k + 1 < span:
                A = symmetric(symmetric(p, A), p)
        target = y if number == len(parts) else empty_like(x)
        on.gemm(target, *((q, x) if wide else (x, q)))
        x = target


def forward_cpu(y, x, steps):
    with products_in("float32"):  # also where others are "bf16x3": the iterations multiply errors
        forward(cpu, y, x, steps)


# ------------------------------------------------------------------------------------------------------------------ spec
def multiply_adds(N: int, M: int, steps: int) -> int:
    """The multiply-adds for one matrix, with half of those of symmetric products."""
    side, parts = min(N, M), spans(N, M, steps)
    return side * (len(parts) * 3 * N * M + (4 * steps - 3 * len(parts)) * side**2) // 2


def make_matrices(rng: np.random.Generator, shape: Shape, sizes: Mapping[str, Any]) -> np.ndarray:
    """Numbers whose size is about the same, since the result does not depend on it, but the bound of its error does."""
    return rng.choice((-1.0, 1.0), shape) * rng.uniform(2, 5, shape)


orthogonalise = Op(
    "orthogonalise",
    shapes={"x": "B N M"},
    constants={"steps": 5},
    outputs=lambda x, *_: {"y": x},
    parameters=("x",),
    forward=Implementation(forward_reference, forward_cpu, partial(forward, cuda)),
    cases=[dict(B=3, N=5, M=7), dict(B=2, N=24, M=24), dict(B=2, N=70, M=33, steps=7), dict(B=9, N=48, M=192)],
    cost=lambda x, steps: Cost(forward=2 * x[0] * multiply_adds(x[1], x[2], steps)),
    values={"x": make_matrices},
)
