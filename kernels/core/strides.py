"""A copy or a sum over arrays of any axes as nested loops: each loop has a size, and a step in every array.

Arrays are flat here, and neighbouring axes that every array steps through as through one are joined.
"""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np

from .op import Shape

ADD, MULTIPLY, DIVIDE = range(3)  # what `combine` does with two numbers, on either device
LOOPS = 4  # in a kernel, the innermost among them; more are rare, and become several launches


def strides(shape: Shape) -> Shape:
    """The steps, in elements, of a C-contiguous array along its axes."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def broadcast_strides(shape: Shape, target: Shape) -> Shape:
    """The steps of a C-contiguous array that is broadcast to a shape: 0 where it repeats."""
    shape = (1,) * (len(target) - len(shape)) + shape
    return tuple(0 if size == 1 else step for size, step in zip(shape, strides(shape)))


@cache
def nests(shape: Shape, *steps: Shape) -> list[tuple[np.ndarray, list[int]]]:
    """The loops over a shape for arrays with these steps: rows of (size, step in each array), and where each array starts."""
    loops: list[Shape] = []
    for loop in zip(shape, *steps):
        if loops and all(outer == loop[0] * inner for outer, inner in zip(loops[-1][1:], loop[1:])):
            loops[-1] = (loops[-1][0] * loop[0], *loop[1:])
        elif loop[0] != 1:
            loops.append(loop)
    loops = [(1,) * (1 + len(steps))] * (LOOPS - len(loops)) + loops
    outer, table = loops[:-LOOPS], np.array(loops[-LOOPS:], np.int64)
    rounds = np.ndindex(*(loop[0] for loop in outer))
    return [(table, [sum(i * loop[array] for i, loop in zip(index, outer)) for array in range(1, 1 + len(steps))]) for index in rounds]


def reduction(shape: Shape, result: Shape) -> tuple[tuple[int, int, int], Shape, bool]:
    """How to sum an array of a shape over the axes along which a result is broadcast to it: the last run of neighbouring ones first.

    Returns the sizes (A, R, C) before, along and after that run of axes, the shape that is left, and whether it is the result's already.
    """
    kept = (1,) * (len(shape) - len(result)) + result
    stop = len(shape)  # behind the last axis of size > 1 that is summed; then `start`, before the axes that are summed with it
    while stop and kept[stop - 1] == shape[stop - 1]:
        stop -= 1
    start = stop
    while start and kept[start - 1] == 1:
        start -= 1
    left = shape[:start] + (1,) * (stop - start) + shape[stop:]
    return (prod(shape[:start]), prod(shape[start:stop]), prod(shape[stop:])), left, left == kept
