"""Muon's step but for the orthogonalisation: momentum before it, and the parameters after it (Jordan et al. 2024, "Muon: An optimizer for
hidden layers in neural networks"; with weight decay as in "Muon is scalable for LLM training", 2502.16982, equation 3).

    m        = MOMENTUM·m + (1 - MOMENTUM)·g',         u = m, or, with Nesterov's look-ahead, MOMENTUM·m + (1 - MOMENTUM)·g'
    p        = (1 - scale·LR·WEIGHT_DECAY)·p - scale·LR·ratio·o,   where o is u orthogonalised (`orthogonalise.py`)

`begin_update.py` defines g' and the average. Parameters and their gradients are in flat buffers, but u and o are matrices: `starts` are the
places at which the matrices begin in the buffers, and `scales` the factors of their learning rates. What is between them stays as it is.

Letters: P elements of the flat buffers, B matrices, N rows, M columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .begin_update import (
    BLOCK,
    LR,
    MOMENTUM,
    PARTS,
    SCALARS,
    WEIGHT_DECAY,
    average_reference,
    clip_factor,
    clipped,
    copy_unless_in_place,
    make_positive,
    make_scalars,
    or_nothing,
    take_average,
)
from .core.devices import address_of
from .core.op import Cost, Implementation, Op, Shape
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.strided import bands_for
from .cuda.kernel import Source
from .cuda.strided import convert, grid_for


# ------------------------------------------------------------------------------------------------------------- reference
def _places(starts: np.ndarray, shape: Shape) -> np.ndarray:
    """The index in the flat buffers of each element of the matrices (B, N, M)."""
    return (starts[:, None] + np.arange(shape[1] * shape[2])).reshape(shape)


def momentum_reference(new_m, u, gradients, m, starts, squares, scalars, rows, columns, nesterov):
    places, momentum = _places(starts, u.shape), scalars[MOMENTUM]
    g = clipped(gradients, squares, scalars)[places]
    new_m[...] = m
    new_m[places] = momentum * m[places] + (1 - momentum) * g
    u[...] = momentum * new_m[places] + (1 - momentum) * g if nesterov else new_m[places]


def step_reference(new_parameters, new_average, parameters, o, average, starts, scales, scalars, ratio):
    places = _places(starts, o.shape)
    new_parameters[...] = parameters
    rates = scalars[LR] * scales[:, None, None]
    new_parameters[places] = (1 - rates * scalars[WEIGHT_DECAY]) * parameters[places] - rates * ratio * o
    if new_average is not None:
        new_average[...] = average
        averaged = np.empty_like(o)
        average_reference(averaged, average[places], new_parameters[places], scalars)
        new_average[places] = averaged


# ------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _momentum(band, bands, m, u, gradients, starts, squares, scalars, nesterov):
    B, size = u.shape
    number = m.dtype.type
    clip, momentum, rest = number(clip_factor(squares, scalars)), number(scalars[MOMENTUM]), number(1 - scalars[MOMENTUM])
    ahead, fresh = (momentum, rest) if nesterov else (number(1), number(0))
    first, last = band * B * size // bands, (band + 1) * B * size // bands
    for matrix in range(first // size, (last + size - 1) // size):
        before, start = matrix * size, starts[matrix]
        for k in range(max(first - before, 0), min(last - before, size)):
            i = np.uint64(start + k)
            g = gradients[i] * clip
            a = momentum * m[i] + rest * g
            m[i] = a
            u[matrix, np.uint64(k)] = ahead * a + fresh * g


@kernel
def _step(band, bands, parameters, average, o, starts, scales, scalars, ratio):
    B, size = o.shape
    number = parameters.dtype.type
    first, last = band * B * size // bands, (band + 1) * B * size // bands
    for matrix in range(first // size, (last + size - 1) // size):
        before, start, lr = matrix * size, starts[matrix], scales[matrix] * scalars[LR]
        shrinkage, rate = number(1 - lr * scalars[WEIGHT_DECAY]), number(lr * ratio)
        high = min(last - before, size)
        for low in range(max(first - before, 0), high, BLOCK):
            stop = min(low + BLOCK, high)
            for k in range(low, stop):
                i = np.uint64(start + k)
                parameters[i] = shrinkage * parameters[i] - rate * number(o[matrix, np.uint64(k)])
            if len(average):
                take_average(average, parameters, scalars, start + low, start + stop)


def momentum_cpu(new_m, u, gradients, m, starts, squares, scalars, rows, columns, nesterov):
    copy_unless_in_place((new_m, m))
    launch(_momentum, bands_for(u.size), new_m, u.reshape(len(u), -1), gradients, starts, squares, scalars, bool(nesterov))


def step_cpu(new_parameters, new_average, parameters, o, average, starts, scales, scalars, ratio):
    copy_unless_in_place((new_parameters, parameters), (new_average, average))
    average = or_nothing(new_average, parameters)
    launch(_step, bands_for(o.size), new_parameters, average, o.reshape(len(o), -1), starts, scales, scalars, float(ratio))


# ------------------------------------------------------------------------------------------------------------------ CUDA
_source = Source("muon")


def _convert_unless_in_place(*pairs: tuple[Any, Any]) -> None:
    for new, old in pairs:
        if new is not None and address_of(new) != address_of(old):
            convert(new, old)


def momentum_cuda(new_m, u, gradients, m, starts, squares, scalars, rows, columns, nesterov):
    _convert_unless_in_place((new_m, m))
    kernel = _source("muon_momentum", m.dtype, u.dtype, squares.dtype, scalars.dtype)
    arrays = new_m, u, gradients, m, starts, squares
    launch(kernel, grid_for(u.size), *arrays, PARTS, scalars, u.size, rows * columns, bool(nesterov))


def step_cuda(new_parameters, new_average, parameters, o, average, starts, scales, scalars, ratio):
    _convert_unless_in_place((new_parameters, parameters), (new_average, average))
    kernel = _source("muon", parameters.dtype, o.dtype, scalars.dtype)
    arrays = new_parameters, new_average, parameters, o, average, starts, scales, scalars
    launch(kernel, grid_for(o.size), *arrays, o.size, o.size // len(o), float(ratio))


# ------------------------------------------------------------------------------------------------------------------ spec
def make_starts(rng: np.random.Generator, shape: Shape, sizes: Mapping[str, Any]) -> np.ndarray:
    return rng.integers(0, 8) + sizes["N"] * sizes["M"] * rng.permutation(sizes["B"]).astype(np.int64)


FLAT = "B*N*M+7"  # in cases; a flat buffer may have any length
LETTERS = dict(rows=lambda sizes: sizes["N"], columns=lambda sizes: sizes["M"])

muon_momentum = Op(
    "muon_momentum",
    shapes={"gradients": FLAT, "m": FLAT, "starts": "B", "squares": f"{PARTS}", "scalars": f"{SCALARS}"},
    accepts={"gradients": "P", "m": "P"},
    constants={"rows": 1, "columns": 1, "nesterov": True},
    outputs=lambda gradients, m, starts, squares, scalars, rows, columns, nesterov: {"new_m": m, "u": (*starts, rows, columns)},
    results=("new_m", "u"),
    parameters=("gradients", "m", "squares", "scalars"),
    dtypes={"starts": (np.dtype(np.int64),)},
    forward=Implementation(momentum_reference, momentum_cpu, momentum_cuda),
    cases=[dict(B=3, N=5, M=7, **LETTERS), dict(B=7, N=64, M=96, **LETTERS, nesterov=False)],
    cost=lambda gradients, m, starts, squares, scalars, rows, columns, nesterov: Cost(forward=7 * starts[0] * rows * columns),
    values={"starts": make_starts, "squares": make_positive, "scalars": make_scalars},
)

muon = Op(
    "muon",
    shapes={"parameters": FLAT, "o": "B N M", "average": FLAT, "starts": "B", "scales": "B", "scalars": f"{SCALARS}"},
    accepts={"parameters": "P", "average": "P"},
    constants={"ratio": 1.0},
    outputs=lambda parameters, o, average, *_: {"new_parameters": parameters, "new_average": average},
    results=("new_parameters", "new_average"),
    parameters=("parameters", "o", "average", "scales", "scalars"),
    dtypes={"starts": (np.dtype(np.int64),)},
    forward=Implementation(step_reference, step_cpu, step_cuda),
    cases=[dict(B=3, N=5, M=7), dict(B=7, N=64, M=96, ratio=2.5), dict(B=2, N=9, M=4, average=None)],
    cost=lambda parameters, o, average, *_: Cost(forward=(3 if average is None else 6) * o[0] * o[1] * o[2]),
    values={"starts": make_starts, "scales": make_positive, "scalars": make_scalars},
)
