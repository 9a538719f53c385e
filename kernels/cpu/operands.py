"""The arguments of a product, in groups: named tuples of numbers, which kernels take like numbers."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """Of a product c = a · b: a (rows, depth), b (depth, columns), c (rows, columns)."""

    rows: int
    columns: int
    depth: int


class Matrix(NamedTuple):
    """A matrix in memory; the steps count elements."""

    address: int
    row: int  # from one row to the next
    column: int  # from one column to the next


class Panels(NamedTuple):
    """All of B as `packing.pack` lays it out, and where in it a product's columns begin."""

    address: int  # 0: B is not packed
    first: int  # panel
    number: int  # of all panels


class Epilogue(NamedTuple):
    """What follows a product (`core/epilogue.py`); pre and extra share a row step, and are of C's type."""

    flags: int
    bias: int  # addresses
    pre: int
    extra: int
    row: int


class Method(NamedTuple):
    """Addresses of compiled functions: the product of a tile (`product_entry`), and its epilogue (`finish_entry`; 0 where none follows)."""

    product: int
    finish: int
