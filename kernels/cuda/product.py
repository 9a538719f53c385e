"""A matrix product of cuBLASLt, as a kernel like any other: recorded, and captured into a graph.

    c = a·b + bias + extra,    a (batch, M, K), b (batch, K, N), bias (N,), extra and c (batch, M, N), all C-contiguous; 16-bit numbers are
                               summed in float32, others in their own type, never in TF32

CuPy's own products raise an error while a graph is captured, and nvmath-python would be one more dependency for the ten functions that are
needed here (`cublaslt.py`). The workspace is an array like any other, so that it lives as long as what was recorded with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..core.devices import runtime

WORKSPACE = 32 << 20  # bytes: what NVIDIA advises for Hopper


class Product(NamedTuple):
    """The shape of a product. Steps: elements from one matrix of the batch to the next, 0 where all share one."""

    batch: int
    rows: int  # M
    columns: int  # N
    depth: int  # K
    a_step: int
    b_step: int
    transpose_a: bool  # a is stored as (batch, K, M)
    transpose_b: bool  # b is stored as (batch, N, K)

    @property
    def prepares(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return f"product {self.batch}x{self.rows}x{self.columns}x{self.depth}"

    def run(self, grid: None, arguments: Sequence[Any]) -> None:
        """arguments: c, a, b, bias or None, extra or None, workspace."""
        runtime().multiply(self, arguments)
