"""The beginning of every optimizer step: the squared gradient norm in parts, and the step number; and functions that optimizers share.

    squares  = Σ g² over each of PARTS equal stretches of the flat buffer of gradients,      STEP = STEP + 1

    norm     = sqrt(Σ squares)
    g'       = g·min(1, CLIP_NORM / (norm + 1e-6))                        (g' = g if CLIP_NORM is 0)

and, if an average of the weights is maintained (Polyak and Juditsky, 1992; 1803.05407), with TensorFlow's warmup:

    average  = d·average + (1 - d)·p,         d = min(EMA_DECAY, (1 + t) / (10 + t)),        t = STEP

Only the first `decayed` parameters have weight decay, and the learning rate of all is LR times `scale`. The kernels update their outputs
in place; these are the same arrays as the corresponding inputs, or are first copied from them. The numbers that a schedule changes are in
an array, `scalars`, so that a recorded step reads their current values. Sums and coefficients are in float64.

Letters: P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .core.arrays import empty
from .core.op import Array, Cost, Implementation, Op, Shape
from .core.recording import launch
from .cpu.compile import routine
from .cpu.kernel import kernel
from .cpu.run import threads
from .cpu.strided import copy
from .cuda.kernel import Grid, Source
from .cuda.strided import grid_for, vector_width

# Indices into `scalars`, a float64 array of SCALARS elements.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP_NORM, STEP, MOMENTUM, EMA_DECAY = range(9)
SCALARS = 9
PARTS = 512  # partial sums of squares: a constant, so that no result depends on the number of threads
LINE = 16  # elements; a stretch consists of whole lines, so that vectors do not cross its ends
BLOCK = 2048  # elements that are updated and then averaged while they are in a cache


def _stretch(size: int) -> int:
    """The length of all stretches but the last ones."""
    return -(-size // (PARTS * LINE)) * LINE


# ------------------------------------------------------------------------------------------------------------- reference
def clipped(gradients: np.ndarray, squares: np.ndarray, scalars: np.ndarray) -> np.ndarray:
    """g': the gradients with their norm clipped."""
    norm = np.sqrt(squares.sum())
    return gradients * min(1.0, scalars[CLIP_NORM] / (norm + 1e-6)) if scalars[CLIP_NORM] > 0 else gradients


def decay_of(parameters: np.ndarray, scalars: np.ndarray, decayed: int) -> np.ndarray:
    """The weight decay of each parameter."""
    return np.where(np.arange(len(parameters)) < decayed, scalars[WEIGHT_DECAY], 0)


def average_reference(new_average, average, parameters, scalars):
    if new_average is not None:
        decay = min(scalars[EMA_DECAY], (1 + scalars[STEP]) / (10 + scalars[STEP]))
        new_average[...] = decay * average + (1 - decay) * parameters


def forward_reference(squares, new_scalars, gradients, scalars):
    padded = np.zeros(PARTS * _stretch(len(gradients)), np.promote_types(gradients.dtype, np.float64))
    padded[: len(gradients)] = gradients
    squares[...] = (padded**2).reshape(PARTS, -1).sum(1)
    new_scalars[...] = scalars
    new_scalars[STEP] += 1


# ------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _begin_update(band, bands, squares, scalars, gradients, stretch):
    P, parts = len(gradients), len(squares)
    for part in range(band * parts // bands, (band + 1) * parts // bands):
        total = 0.0
        for i in range(min(P, part * stretch), min(P, (part + 1) * stretch)):
            g = np.float64(gradients[np.uint64(i)])
            total += g * g
        squares[part] = total
    if band == 0:
        scalars[STEP] += 1


@routine
def clip_factor(squares, scalars):
    if scalars[CLIP_NORM] <= 0:
        return 1.0
    total = 0.0
    for part in range(len(squares)):
        total += squares[part]
    return min(1.0, scalars[CLIP_NORM] / (np.sqrt(total) + 1e-6))


@routine
def take_average(average, parameters, scalars, start, stop):
    decay = min(scalars[EMA_DECAY], (1 + scalars[STEP]) / (10 + scalars[STEP]))
    keep, rest = parameters.dtype.type(decay), parameters.dtype.type(1 - decay)
    for k in range(start, stop):
        i = np.uint64(k)
        average[i] = keep * average[i] + rest * parameters[i]


def copy_unless_in_place(*pairs: tuple[np.ndarray | None, np.ndarray | None]) -> None:
    """Copy each input to the corresponding output unless both are the same array."""
    for new, old in pairs:
        if new is not None and old is not None and new.ctypes.data != old.ctypes.data:
            copy(new, old, old.shape, (1,), (1,))


def or_nothing(average: np.ndarray | None, parameters: np.ndarray) -> np.ndarray:
    """The average, or an empty array if there is none."""
    return empty((0,), parameters.dtype) if average is None else average


def forward_cpu(squares, new_scalars, gradients, scalars):
    copy_unless_in_place((new_scalars, scalars))
    launch(_begin_update, threads(), squares, new_scalars, gradients, _stretch(len(gradients)))


# ------------------------------------------------------------------------------------------------------------------ CUDA
_source = Source("begin_update")


def forward_cuda(squares, new_scalars, gradients, scalars):
    width, stretch = vector_width(gradients.size, gradients), _stretch(gradients.size)
    grid = Grid(PARTS, min(512, 32 * -(-stretch // (32 * width))))
    launch(
        _source("begin_update", gradients.dtype, squares.dtype, scalars.dtype, width),
        grid,
        squares,
        new_scalars,
        gradients,
        scalars,
        stretch,
        gradients.size,
    )


def update_cuda(source: Source, name: str, arrays: tuple[Any, ...], squares: Any, scalars: Any, *constants: Any) -> None:
    """Launch the kernel of an optimizer. arrays: of P elements each, or None."""
    size = arrays[0].size
    width = vector_width(size, *(a for a in arrays if a is not None))
    launch(
        source(name, arrays[0].dtype, squares.dtype, scalars.dtype, width),
        grid_for(size // width),
        *arrays,
        squares,
        PARTS,
        scalars,
        *constants,
        size,
    )


# ------------------------------------------------------------------------------------------------------------------ spec
def make_scalars(rng: np.random.Generator, shape: Shape, sizes: Mapping[str, Any]) -> np.ndarray:
    scalars = np.zeros(SCALARS)
    scalars[[LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP_NORM]] = 0.01, 0.9, 0.99, 1e-8, 0.1, rng.choice([0.0, 1.0, 1e6])
    scalars[[STEP, MOMENTUM, EMA_DECAY]] = rng.integers(1, 10), 0.9, rng.choice([0.1, 0.99])
    return scalars


def make_positive(rng: np.random.Generator, shape: Shape, sizes: Mapping[str, Any]) -> np.ndarray:
    return rng.uniform(0.1, 2, shape)


begin_update = Op(
    "begin_update",
    shapes={"gradients": "P", "scalars": f"{SCALARS}"},
    outputs=lambda gradients, scalars: {"squares": Array((PARTS,), np.float64), "new_scalars": scalars},
    results=("squares", "new_scalars"),
    parameters=("gradients", "scalars"),
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    cases=[dict(P=5), dict(P=1), dict(P=100_003)],
    cost=lambda gradients, scalars: Cost(forward=2 * gradients[0]),
    values={"scalars": make_scalars},
)
