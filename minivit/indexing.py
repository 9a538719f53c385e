"""What x[key] picks, by NumPy's rules, in terms of slices, a permutation, and rows by number."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .kernels.core.op import Shape
from .kernels.core.strides import strides


class Picked(NamedTuple):
    """How x[key] is computed: slice every axis, permute the axes, take rows of the array as (A, R, C), reshape to `shape`.

    bounds: the starts, stops and steps of all axes; None if every slice is the whole axis and rows are taken. order: None if axes stay
        where they are. rows: int64; None if no array is in the key: then the sliced array has the elements of the result.
    """

    shape: Shape
    bounds: tuple[Shape, ...] | None
    order: Shape | None = None
    sizes: Shape = ()
    rows: np.ndarray | None = None


def _entry(key: Any) -> Any:
    """An entry of a key: an integer, a slice, None, ... or an array of one axis or more."""
    if isinstance(key, (bool, np.bool_)):
        raise TypeError(f"a Tensor takes an array of bools as an index, not {key!r} alone")
    if key is None or key is ... or isinstance(key, (int, np.integer, slice)):
        return key
    array = np.asarray(key)
    if array.dtype == bool and not array.ndim:
        raise TypeError("a Tensor takes an array of bools as an index, not one without axes")
    if isinstance(key, Sequence) and not array.size:
        array = array.astype(np.int64)  # an empty list: of integers, as for NumPy
    return array if array.ndim or array.dtype.kind not in "iu" else int(array)


def picked(key: Any, shape: Shape) -> Picked:
    """What x[key] picks from an x of this shape. Raises NumPy's errors, and TypeError for a bool that is no array."""
    result = np.broadcast_to(np.uint8(0), shape)[key].shape
    entries = [_entry(each) for each in (key if isinstance(key, tuple) else (key,))]
    by_arrays = any(isinstance(each, np.ndarray) for each in entries)
    axes: list[Any] = []  # for each axis its slice, its integer or the array of its numbers
    places: list[bool] = []  # for each entry whether it is one of those that NumPy broadcasts together
    for each in entries:
        if each is ...:
            taken = sum(e.ndim if _is_mask(e) else e is not None and e is not ... for e in entries)
            axes += [slice(None)] * (len(shape) - taken)
        elif each is not None:
            axes += each.nonzero() if _is_mask(each) else [each]
        places.append(by_arrays and isinstance(each, (np.ndarray, int, np.integer)))
    axes += [slice(None)] * (len(shape) - len(axes))
    numbered = [i for i, each in enumerate(axes) if by_arrays and not isinstance(each, slice)]
    bounds = [(0, n, 1) if i in numbered else _bounds(each, n) for i, (each, n) in enumerate(zip(axes, shape))]
    sliced = tuple(len(range(*each)) for each in bounds)
    starts_stops_steps = tuple(zip(*bounds)) or ((), (), ())
    if not by_arrays:
        return Picked(result, starts_stops_steps)
    together = np.diff(np.flatnonzero(places)).max(initial=1) == 1  # otherwise their axes come first
    before = numbered[0] if together else 0
    rest = [i for i in range(len(shape)) if i not in numbered]
    order = tuple(rest[:before] + numbered + rest[before:])
    rows_shape = tuple(sliced[i] for i in numbered)
    numbers = np.broadcast_arrays(*(np.asarray(axes[i], np.int64) % n for i, n in zip(numbered, rows_shape)))
    rows = sum(step * each for step, each in zip(strides(rows_shape), numbers))
    return Picked(
        result,
        None if all(each == (0, n, 1) for each, n in zip(bounds, shape)) else starts_stops_steps,
        None if order == tuple(range(len(shape))) else order,
        (prod(sliced[i] for i in rest[:before]), prod(rows_shape), prod(sliced[i] for i in rest[before:])),
        np.ascontiguousarray(rows, np.int64).reshape(-1),
    )


def _is_mask(entry: Any) -> bool:
    return isinstance(entry, np.ndarray) and entry.dtype == bool


def _bounds(entry: Any, length: int) -> tuple[int, int, int]:
    if isinstance(entry, slice):
        return entry.indices(length)
    return entry % length, entry % length + 1, 1
