"""Copies and sums over arrays with any number of axes, as nested loops: each loop has a size, and a stride in every array.

Arrays are treated as flat, and adjacent axes that are contiguous in every array are merged into one loop.
"""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np

from .op import Shape

# The operations of `combine`, on either device: a + b, a·b, a / b, aᵇ with its derivatives by a and by b, the larger and the smaller of a
# and b, and whether a is the larger: 1 where it is, ½ where they are equal, 0 elsewhere.
ADD, MULTIPLY, DIVIDE, POWER, POWER_BY_BASE, POWER_BY_EXPONENT, MAXIMUM, MINIMUM, IS_LARGER = range(9)
LOOPS = 4  # nested loops in a kernel, including the innermost; more are rare and become several launches


def strides(shape: Shape) -> Shape:
    """The strides of a C-contiguous array, in elements."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def broadcast_strides(shape: Shape, target: Shape) -> Shape:
    """The strides, in elements, of a C-contiguous array broadcast to a shape: 0 along repeated axes."""
    shape = (1,) * (len(target) - len(shape)) + shape
    return tuple(0 if size == 1 else step for size, step in zip(shape, strides(shape)))


@cache
def nests(shape: Shape, *steps: Shape) -> list[tuple[np.ndarray, list[int]]]:
    """The loop nests over a shape for arrays with these strides: a table with rows (size, stride in each array), and each array's start."""
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
    """How to sum an array over the axes along which a result is broadcast to its shape, beginning with the last run of adjacent axes.

    Returns the sizes (A, R, C) before, along and after that run of axes, the remaining shape, and whether this is the shape of the result.
    """
    target = (1,) * (len(shape) - len(result)) + result
    stop = len(shape)  # after the last summed axis of size > 1; `start` is the first of the axes that are summed together with it
    while stop and target[stop - 1] == shape[stop - 1]:
        stop -= 1
    start = stop
    while start and target[start - 1] == 1:
        start -= 1
    remaining = shape[:start] + (1,) * (stop - start) + shape[stop:]
    return (prod(shape[:start]), prod(shape[start:stop]), prod(shape[stop:])), remaining, remaining == target
