"""Sizes with two sides, of images, patches and grids of patches: (rows, columns), or one number for a square."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Annotated

from .errors import UserError, shown
from .schema import Count, Limits, Size

Sides = int | Sequence[int]


def both(size: Sides) -> tuple[int, int]:
    """(rows, columns). Raises UserError for what is neither a number nor two."""
    if isinstance(size, Integral):
        return int(size), int(size)
    try:
        rows, columns = size  # type: ignore[misc]
    except (TypeError, ValueError):
        raise UserError(f"a size must be a whole number, or two for rows and columns, not {shown(size)}") from None
    return rows, columns


def simplest(size: Sides) -> int | tuple[int, int]:
    """One number for a square, otherwise (rows, columns)."""
    rows, columns = both(size)
    return rows if rows == columns else (rows, columns)


def times(*sizes: Sides) -> str:
    """Sizes for a message: "64×96"."""
    return "×".join(str(side) for size in sizes for side in ([size] if isinstance(size, Integral) else size))  # type: ignore[union-attr]


# Annotations of fields (`schema.py`): pixels, in their simplest form.
ImageSide = Annotated[int, Limits(1, 4096)]
ImageSize = Annotated[ImageSide | tuple[ImageSide, ImageSide], simplest]
PatchSize = Annotated[Size | tuple[Size, Size], simplest]
Padding = Annotated[Count | tuple[Count, Count], simplest]
