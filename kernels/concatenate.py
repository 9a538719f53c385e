"""Concatenation along an axis, and splitting. There is one op per number of parts; the two are each other's transpose.

concatenate  y = a, then b, ...                     da, db, ... = the parts of dy
split        y0, y1, ... = the parts of x           dx = dy0, then dy1, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from .core.op import Cost, Implementation, Op, Shape, require
from .core.strides import strides
from .cpu import primitives as cpu
from .cuda import primitives as cuda


def _join(on: Any, whole: np.ndarray, parts: Sequence[np.ndarray | None], lengths: Shape, axis: int) -> None:
    steps = strides(whole.shape)
    for i, part in enumerate(parts):
        if part is not None:
            on.copy(whole, part, part.shape, steps, strides(part.shape), y_start=sum(lengths[:i]) * steps[axis])


def _cut(on: Any, parts: Sequence[np.ndarray | None], whole: np.ndarray, lengths: Shape, axis: int) -> None:
    steps = strides(whole.shape)
    for i, part in enumerate(parts):
        if part is not None:
            on.copy(part, whole, part.shape, strides(part.shape), steps, x_start=sum(lengths[:i]) * steps[axis])


def _cut_reference(parts: Sequence[np.ndarray | None], whole: np.ndarray, lengths: Shape, axis: int) -> None:
    for part, values in zip(parts, np.split(whole, np.cumsum(lengths)[:-1], axis)):
        if part is not None:
            part[...] = values


def _resized(shape: Shape, axis: int, length: int) -> Shape:
    axis %= len(shape)
    return *shape[:axis], length, *shape[axis + 1 :]


@cache
def concatenation(number: int) -> Op:
    """The op that concatenates `number` arrays: forward(y, *parts, lengths, axis), backward(*dparts, dy, lengths, axis)."""
    names = tuple("abcdefghijklmnopqrstuvwxyz"[:number]) if number <= 26 else tuple(f"a{i}" for i in range(number))
    symbols = [f"N{i}" for i in range(number)]

    def forward_reference(y, *rest):
        y[...] = np.concatenate(rest[:number], rest[-1])

    def forward(on, y, *rest):
        _join(on, y, rest[:number], *rest[number:])

    def backward_reference(*arguments):
        _cut_reference(arguments[:number], *arguments[number:])

    def backward(on, *arguments):
        _cut(on, arguments[:number], *arguments[number:])

    def outputs(*shapes_and_constants):
        *shapes, lengths, axis = shapes_and_constants
        if len(lengths) != number or not -len(shapes[0]) <= axis < len(shapes[0]):
            raise ValueError(f"concatenate: {lengths} along axis {axis} are not {number} lengths along an axis of {shapes[0]}")
        require("concatenate", **{n: (s, _resized(shapes[0], axis, length)) for n, s, length in zip(names, shapes, lengths)})
        return {"y": _resized(shapes[0], axis, sum(lengths))}

    def lengths(sizes):
        return tuple(sizes[symbol] for symbol in symbols)

    sizes = {symbol: 1 + 4 * i for i, symbol in enumerate(symbols)}
    return Op(
        "concatenate" if number == 2 else f"concatenate_{number}",
        shapes={name: f"B {symbol} C" for name, symbol in zip(names, symbols)},
        accepts=dict.fromkeys(names, "*"),
        constants={"lengths": (), "axis": 1},  # of each array along the axis
        outputs=outputs,
        forward=Implementation.composed(forward_reference, forward, cpu, cuda),
        backward=Implementation.composed(backward_reference, backward, cpu, cuda),
        cases=[
            dict(B=2, **sizes, C=7, lengths=lengths),
            dict(B=64, **dict.fromkeys(symbols, 32), C=192, lengths=lengths),
            dict({n: f"B {s}" for n, s in zip(names, symbols)}, B=3, **sizes, lengths=lengths, axis=-1),
            dict({n: f"{s} C" for n, s in zip(names, symbols)}, **dict.fromkeys(symbols, 1), C=1, lengths=lengths, axis=0),
        ],
        cost=lambda *_: Cost(forward=0),
    )


@cache
def splitting(number: int) -> Op:
    """The op that splits an array into `number` parts: forward(*parts, x, lengths, axis), backward(dx, *dparts, lengths, axis)."""
    names = tuple(f"y{i}" for i in range(number))
    symbols = [f"N{i}" for i in range(number)]

    def forward_reference(*arguments):
        _cut_reference(arguments[:number], *arguments[number:])

    def forward(on, *arguments):
        _cut(on, arguments[:number], *arguments[number:])

    def backward_reference(dx, *rest):
        dx[...] = 0
        for part, values in zip(np.split(dx, np.cumsum(rest[number])[:-1], rest[-1]), rest):
            part[...] = 0 if values is None else values

    def backward(on, dx, *rest):
        if any(part is None for part in rest[:number]):
            on.fill(dx, 0.0)
        _join(on, dx, rest[:number], *rest[number:])

    def lengths(sizes):
        return tuple(sizes[symbol] for symbol in symbols)

    def outputs(x, lengths, axis):
        if len(lengths) != number or not -len(x) <= axis < len(x) or sum(lengths) != x[axis] or min(lengths) < 0:
            raise ValueError(f"split: {lengths} along axis {axis} are not {number} lengths of {x}")
        return {name: _resized(x, axis, length) for name, length in zip(names, lengths)}

    sizes = {symbol: 1 + 4 * i for i, symbol in enumerate(symbols)}
    total = "+".join(symbols)
    return Op(
        "split" if number == 2 else f"split_{number}",
        shapes={"x": f"B {total} C"},
        accepts={"x": "*"},
        constants={"lengths": (), "axis": 1},  # of each part along the axis
        outputs=outputs,
        forward=Implementation.composed(forward_reference, forward, cpu, cuda),
        backward=Implementation.composed(backward_reference, backward, cpu, cuda),
        results=names,
        cases=[
            dict(B=2, **sizes, C=7, lengths=lengths),
            dict(B=64, **dict.fromkeys(symbols, 32), C=192, lengths=lengths),
            dict(x=f"B {total}", B=3, **sizes, lengths=lengths, axis=-1),
            dict(x=f"{total} C", **sizes, C=1, lengths=lengths, axis=0),
        ],
        cost=lambda *_: Cost(forward=0),
    )


concatenate, concatenate_3 = map(concatenation, (2, 3))
split, split_3 = map(splitting, (2, 3))
