"""Products of matrices, or of batches of matrices.

    y = a·b
    da = dy·bᵀ,  db = aᵀ·dy

Letters: B batch, M rows of y, N columns of y, K inner dimension.
"""

from __future__ import annotations

from math import prod

from .core.op import Cost, Implementation, Op
from .cpu import primitives as cpu
from .cuda import primitives as cuda


def _swapped(x):
    return x.swapaxes(-1, -2)


def matmul_forward_reference(y, a, b):
    y[...] = a @ b


def matmul_backward_reference(da, db, dy, a, b):
    if da is not None:
        da[...] = dy @ _swapped(b)
    if db is not None:
        db[...] = _flat(a, b).T @ _flat(dy, b) if b.ndim == 2 else _swapped(a) @ dy


def _flat(x, b):
    """x reshaped to one matrix if b is one, otherwise to a batch with a single leading axis."""
    return x.reshape(-1, x.shape[-1]) if b.ndim == 2 else x.reshape(-1, *x.shape[-2:])


def matmul_forward(on, y, a, b):
    on.gemm(_flat(y, b), _flat(a, b), _flat(b, b))


def matmul_backward(on, da, db, dy, a, b):
    if da is not None:
        on.gemm(_flat(da, b), _flat(dy, b), _flat(b, b), transpose_b=True)
    if db is not None:
        on.gemm(_flat(db, b), _flat(a, b), _flat(dy, b), transpose_a=True)


def _matmul_outputs(a, b):
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2] or (len(b) > 2 and a[:-2] != b[:-2]):
        raise ValueError(f"matmul: (..., M, K) and (K, N) or (..., K, N) with equal leading lengths, not {a} and {b}")
    return {"y": (*a[:-1], b[-1])}


matmul = Op(
    "matmul",
    shapes={"a": "B M K", "b": "B K N"},
    accepts={"a": "*", "b": "*"},
    outputs=_matmul_outputs,
    forward=Implementation.composed(matmul_forward_reference, matmul_forward, cpu, cuda),
    backward=Implementation.composed(matmul_backward_reference, matmul_backward, cpu, cuda),
    saves=("a", "b"),
    cases=[dict(B=3, M=7, K=5, N=9), dict(B=2, M=130, K=300, N=40), dict(B=2, M=33, K=17, N=50, b="K N"), dict(B=4, M=197, K=64, N=197)],
    cost=lambda a, b: Cost.of_products(prod(a) * b[-1]),
)
