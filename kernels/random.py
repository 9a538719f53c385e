"""Counter-based random numbers (Philox4x32-10; Salmon et al., SC 2011), and the two ops that use them.

A block of four 32-bit words depends only on a 64-bit key and a 128-bit counter, through ten rounds of

    (a, b, c, d) -> (high(M1·c) ^ b ^ k0,  low(M1·c),  high(M0·a) ^ d ^ k1,  low(M0·a)),     k0 += W0, k1 += W1

Here the key is the seed, and the counter (block, use, low half of step, high half of step): the numbers are the same on every device, with
any number of threads, after a resume, and in a recorded step. `use` numbers the call site. Word i % 4 of block i // 4 is for element i.

    dropout    y_i = m_i·x_i / (1 - rate),   m_i = 1 where word i < (1 - rate)·2³², else 0       (Srivastava et al., JMLR 2014)
    drop_path  the same with one m for each sample                                               (1603.09382; scaled as in timm)

Backward is the same function of dy. It computes m again, so the state must not change in between.

state: uint64 (seed, step), in an array, so that `advance` can change it in a recorded step.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numba.extending import register_jitable

from .core.devices import runtime
from .core.op import Cost, Implementation, Op
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.strided import bands_for
from .cuda.kernel import Grid, Source
from .cuda.strided import grid_for, vector_width

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
ZERO, ONE, TWO, THREE, FOUR, FIVE, SIX, SEVEN, EIGHT, NINE = np.arange(10, dtype=np.uint64)


# -------------------------------------------------------------------------------------------------------------- generator
@register_jitable(forceinline=True)
def _round(counter, seed, index):
    a, b, c, d = counter
    even, odd = M0 * a, M1 * c
    k0, k1 = (seed & LOW) + W0 * index & LOW, (seed >> HALF) + W1 * index & LOW
    return (odd >> HALF) ^ b ^ k0, odd & LOW, (even >> HALF) ^ d ^ k1, even & LOW


@register_jitable(forceinline=True)
def philox(block, use, step, seed):
    """The four words, each below 2³², of one block; all uint64, or arrays of them."""
    w = block, use, step & LOW, step >> HALF  # ten rounds, unrolled so that a loop over blocks vectorises
    w = _round(_round(_round(_round(_round(w, seed, ZERO), seed, ONE), seed, TWO), seed, THREE), seed, FOUR)
    return _round(_round(_round(_round(_round(w, seed, FIVE), seed, SIX), seed, SEVEN), seed, EIGHT), seed, NINE)


def words(number: int, use: int, state: np.ndarray) -> np.ndarray:
    """The first `number` words of a use: uint64 (number,), each below 2³²."""
    seed, step = np.asarray(state, np.uint64)
    blocks = np.arange((number + 3) // 4, dtype=np.uint64)
    return np.stack(philox(blocks, np.uint64(use), step, seed), axis=-1).reshape(-1)[:number]


def threshold(rate: float) -> int:
    """Elements whose word is below this threshold are kept."""
    return round((1 - rate) * 2**32)


def scale(rate: float) -> float:
    """The factor by which kept elements are multiplied."""
    return 1 / (1 - rate) if rate < 1 else 0.0


# -------------------------------------------------------------------------------------------------------------- reference
def dropout_reference(y, x, state, rate, use):
    kept = words(x.size, use, state).reshape(x.shape) < threshold(rate)
    y[...] = np.where(kept, x * x.dtype.type(scale(rate)), 0)


def dropout_backward_reference(dx, dy, state, rate, use):
    dropout_reference(dx, dy, state, rate, use)


def drop_path_reference(y, x, state, rate, use):
    kept = (words(len(x), use, state) < threshold(rate)).reshape(-1, *(1,) * (x.ndim - 1))  # (B, 1, ...)
    y[...] = np.where(kept, x * x.dtype.type(scale(rate)), 0)


def drop_path_backward_reference(dx, dy, state, rate, use):
    drop_path_reference(dx, dy, state, rate, use)


def advance_reference(state):
    state[1] += np.uint64(1)


# -------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _dropout(band, bands, y, x, state, use, threshold, scale):
    factor, zero, limit = x.dtype.type(scale), x.dtype.type(0), np.uint64(threshold)
    seed, step, call = state[0], state[1], np.uint64(use)
    size, blocks = len(x), (len(x) + 3) // 4
    for block in range(band * blocks // bands, min((band + 1) * blocks // bands, size // 4)):
        i = np.uint64(4 * block)
        a, b, c, d = philox(np.uint64(block), call, step, seed)
        p, q, r, s = x[i] * factor, x[i + ONE] * factor, x[i + TWO] * factor, x[i + THREE] * factor
        y[i] = p if a < limit else zero
        y[i + ONE] = q if b < limit else zero
        y[i + TWO] = r if c < limit else zero
        y[i + THREE] = s if d < limit else zero
    if band == bands - 1:
        drawn = philox(np.uint64(size // 4), call, step, seed)
        for rest in range(size - size % 4, size):
            y[rest] = x[rest] * factor if drawn[rest % 4] < limit else zero


@kernel
def _drop_path(band, bands, y, x, state, use, threshold, scale):
    B, size = x.shape
    number, limit = x.dtype.type, np.uint64(threshold)
    for i in range(band * B // bands, (band + 1) * B // bands):
        drawn = philox(np.uint64(i // 4), np.uint64(use), state[1], state[0])
        if drawn[i % 4] < limit:
            for j in range(size):
                y[i, j] = x[i, j] * number(scale)
        else:
            for j in range(size):
                y[i, j] = 0


@kernel
def _advance(band, bands, state):
    state[1] += np.uint64(1)


def dropout_cpu(y, x, state, rate, use):
    launch(_dropout, bands_for(4 * x.size), y.reshape(-1), x.reshape(-1), state, use, threshold(rate), scale(rate))


def dropout_backward_cpu(dx, dy, state, rate, use):
    dropout_cpu(dx, dy, state, rate, use)


def drop_path_cpu(y, x, state, rate, use):
    launch(_drop_path, bands_for(x.size), y.reshape(len(x), -1), x.reshape(len(x), -1), state, use, threshold(rate), scale(rate))


def drop_path_backward_cpu(dx, dy, state, rate, use):
    drop_path_cpu(dx, dy, state, rate, use)


def advance_cpu(state):
    launch(_advance, 1, state)


# ------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("random")


def dropout_cuda(y, x, state, rate, use):
    width = min(4, vector_width(x.size, y, x))
    launch(_source("dropout", x.dtype, width), grid_for(-(-x.size // 4)), y, x, state, x.size, use, threshold(rate), scale(rate))


def dropout_backward_cuda(dx, dy, state, rate, use):
    dropout_cuda(dx, dy, state, rate, use)


def drop_path_cuda(y, x, state, rate, use):
    B, size = len(x), x.size // len(x)
    width = vector_width(size, y, x)
    parts = max(1, min(8 * runtime().multiprocessors // B, -(-size // (256 * width))))
    launch(_source("drop_path", x.dtype, width), Grid(B * parts, 256), y, x, state, parts, size, use, threshold(rate), scale(rate))


def drop_path_backward_cuda(dx, dy, state, rate, use):
    drop_path_cuda(dx, dy, state, rate, use)


def advance_cuda(state):
    launch(_source("advance"), Grid(1, 1), state)


# ------------------------------------------------------------------------------------------------------------------- spec
advance = Implementation(advance_reference, advance_cpu, advance_cuda)  # increments the step: state uint64 (seed, step), in place


def _outputs(x, state, rate, use):
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout: rate must lie in 0 ... 1, not {rate}")
    return {"y": x}


VALUES = {"state": lambda rng, shape, sizes: rng.integers(0, 2**64, shape, np.uint64)}

dropout = Op(
    "dropout",
    shapes={"x": "B N C", "state": "2"},
    accepts={"x": "*"},
    dtypes={"state": (np.uint64,)},
    constants={"rate": 0.5, "use": 0},
    outputs=_outputs,
    forward=Implementation(dropout_reference, dropout_cpu, dropout_cuda),
    backward=Implementation(dropout_backward_reference, dropout_backward_cpu, dropout_backward_cuda),
    gradients=("x",),
    saves=("state",),
    cases=[
        dict(B=2, N=3, C=5),
        dict(B=3, N=1, C=1, rate=0.1, use=7),
        dict(B=2, N=3, C=4, rate=0.0),
        dict(B=64, N=65, C=192, rate=0.1, use=2**32 - 1),
    ],
    cost=lambda x, state, rate, use: Cost(forward=prod(x), backward=prod(x)),
    values=VALUES,
)

drop_path = Op(
    "drop_path",
    shapes={"x": "B N C", "state": "2"},
    accepts={"x": "B ..."},
    dtypes={"state": (np.uint64,)},
    constants={"rate": 0.5, "use": 0},
    outputs=_outputs,
    forward=Implementation(drop_path_reference, drop_path_cpu, drop_path_cuda),
    backward=Implementation(drop_path_backward_reference, drop_path_backward_cpu, drop_path_backward_cuda),
    gradients=("x",),
    saves=("state",),
    cases=[dict(B=7, N=3, C=5), dict(x="B", B=5, rate=0.3, use=7), dict(B=64, N=65, C=192, rate=0.1)],
    cost=lambda x, state, rate, use: Cost(forward=prod(x), backward=prod(x)),
    values=VALUES,
)
