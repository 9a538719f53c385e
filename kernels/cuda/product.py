"""A matrix product by cuBLASLt, with the interface of a kernel, so that it can be recorded and captured into a graph.

    c = a·b + bias + extra,    a (batch, M, K), b (batch, K, N), bias (N,), extra and c (batch, M, N), all C-contiguous; bfloat16 is
                               accumulated in float32, other types in themselves, never in TF32

Where a product `sums`, bias is written instead, which cuBLASLt calls the gradient of a bias:

    bias = the sums of a over K, (M,)       for one matrix, not a batch, of a type that accumulates in float32; bias has c's type

CuPy's own products raise an error during graph capture, and nvmath-python would be a further dependency for the ten functions needed here
(`cublaslt.py`). The workspace is passed as an array, so that it lives as long as the recording that uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

from ..core.devices import runtime
from ..core.dtypes import BFLOAT16

WORKSPACE = 32 << 20  # bytes: NVIDIA's recommendation for Hopper

_rank: ContextVar[int | None] = ContextVar("rank", default=None)


class Product(NamedTuple):
    """The shape of a product. a_step, b_step: elements from one matrix of the batch to the next, 0 if all share one."""

    batch: int
    rows: int  # M
    columns: int  # N
    depth: int  # K
    a_step: int
    b_step: int
    transpose_a: bool  # a is stored as (batch, K, M)
    transpose_b: bool  # b is stored as (batch, N, K)
    sums: bool = False  # a is also summed over K
    rank: int | None = None  # which of cuBLASLt's algorithms, in the order of its heuristic, or the last; None: the fastest (`choices.py`)

    @property
    def prepares(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return f"product {self.batch}x{self.rows}x{self.columns}x{self.depth}{' with sums' if self.sums else ''}"

    @property
    def operations(self) -> int:
        """Floating-point operations."""
        return 2 * self.batch * self.rows * self.columns * self.depth

    def run(self, grid: None, arguments: Sequence[Any]) -> None:
        """Run it. arguments: c, a, b, bias or None, extra or None, workspace."""
        runtime().multiply(self, arguments)


def can_sum(product: Product, dtype: Any, c_dtype: Any) -> bool:
    """Whether NVIDIA's documentation has sums with such a product: of one matrix, a and b bfloat16 or all three float32."""
    return product.batch == 1 and dtype in (BFLOAT16, np.float32) and c_dtype in (dtype, np.float32)


def current_rank() -> int | None:
    """The rank of products that are made now."""
    return _rank.get()


@contextmanager
def ranked(rank: int | None) -> Iterator[None]:
    """Context manager: the `rank` of products that this thread computes or records inside. With 0 nothing is timed, read or kept."""
    token = _rank.set(rank)
    try:
        yield
    finally:
        _rank.reset(token)
