"""Matrix products on a GPU, by cuBLASLt, as kernels like any other: recorded, and captured into a graph.

    c = a·b + bias + extra,    a (batch, M, K), b (batch, K, N), bias (N,), extra and c (batch, M, N), all C-contiguous; of 16-bit numbers
                               summed in float32, else in their own type, never in TF32

CuPy's own products raise an error while a graph is captured, and nvmath-python would be one more dependency for the ten functions that are
needed here (`cublaslt.py`). The workspace is an array like any other, so that it lives as long as what was recorded with it.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import runtime

WORKSPACE = 32 << 20                                    # bytes: what NVIDIA advises for Hopper


class Product(NamedTuple):
    """The shape of a product. transpose_a: whether a is stored as (batch, K, M); transpose_b: b as (batch, N, K). Steps of 0 where all of
    the batch share one matrix."""

    batch: int
    rows: int                                           # M
    columns: int                                        # N
    depth: int                                          # K
    a_step: int                                         # elements from one matrix to the next
    b_step: int
    transpose_a: bool = False
    transpose_b: bool = False

    @property
    def __name__(self) -> str:
        return f"product {self.batch}x{self.rows}x{self.columns}x{self.depth}"

    def run(self, grid: None, arguments: Sequence[Any]) -> None:
        """arguments: c, a, b, bias or None, extra or None, workspace."""
        runtime().multiply(self, arguments)


def product_of(c: Any, a: Any, b: Any, transpose_a: bool, transpose_b: bool) -> Product:
    """The product that makes c of a and b, each of them a matrix or a batch of matrices."""
    rows, columns = c.shape[-2:]
    depth = a.shape[-2] if transpose_a else a.shape[-1]
    batch = len(c) if c.ndim == 3 else 1
    steps = (int(np.prod(m.shape[-2:])) if m.ndim == 3 and len(m) > 1 else 0 for m in (a, b))
    return Product(batch, rows, columns, depth, *steps, bool(transpose_a), bool(transpose_b))
