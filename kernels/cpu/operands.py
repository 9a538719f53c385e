"""The arguments of a product, grouped into named tuples of numbers, which kernels accept as arguments."""

from __future__ import annotations

from typing import Any, NamedTuple


class Size(NamedTuple):
    """The size of a product c = a · b: a (rows, depth), b (depth, columns), c (rows, columns)."""

    rows: int
    columns: int
    depth: int


class Matrix(NamedTuple):
    """A matrix in memory; strides are in elements."""

    address: int
    row: int  # stride between rows
    column: int  # stride between columns


class Panels(NamedTuple):
    """The whole of B as packed by `packing.pack`, and the first panel of a product."""

    address: int  # 0: B is not packed
    first: int  # index of the first panel
    number: int  # of panels in total


class Epilogue(NamedTuple):
    """The epilogue of a product (`core/epilogue.py`); pre and extra have the same row stride, and C's type."""

    flags: int
    bias: int  # addresses of bias, pre and extra
    pre: int
    extra: int
    row: int  # stride between rows of pre and extra
    row_scales: int  # addresses of the scales of A's rows and B's columns
    column_scales: int


NO_EPILOGUE = Epilogue(0, 0, 0, 0, 0, 0, 0)


class Method(NamedTuple):
    """Addresses of compiled functions: the product with a tile (`product_entry`), and the epilogue (`finish_entry`; 0 if there is none)."""

    product: Any  # a `kernel.Address`; an int inside kernels
    finish: Any
