"""The optimizer's arithmetic, over all parameters in one flat buffer: AdamW, SGD, the norm of the gradient, and a running average.

    norm     = sqrt(Σ g²)
    g'       = g·min(1, CLIP_NORM / (norm + 1e-6))                        (g' = g where CLIP_NORM is 0)

    AdamW (Loshchilov and Hutter, 1711.05101, algorithm 2, as PyTorch scales it), t = STEP:
    m        = BETA1·m + (1 - BETA1)·g',      v = BETA2·v + (1 - BETA2)·g'²
    p        = (1 - LR·WEIGHT_DECAY)·p - LR·(m / (1 - BETA1ᵗ)) / (sqrt(v / (1 - BETA2ᵗ)) + EPS)

    SGD with momentum (Sutskever et al., ICML 2013, in PyTorch's form), velocity from 0:
    g"       = g' + WEIGHT_DECAY·p,           velocity = MOMENTUM·velocity + g"
    p        = p - LR·velocity,               or, with Nesterov's look-ahead, p - LR·(g" + MOMENTUM·velocity)

    average  = EMA_DECAY·average + (1 - EMA_DECAY)·p

Weights decay among the first `decayed` parameters only. The kernels work in place, on outputs that are the inputs of their kind or begin
as copies of them: give one array for both, and nothing is copied. The numbers that a schedule changes lie in memory, in `hyper`, so that a
recorded step sees them; `advance` counts the step there, before the update that uses it. Sums and coefficients are in float64.

Letters: P parameters.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from . import cuda
from .copying import bands_for, copy, grid_for, vector_width
from .cpu import kernel, routine, threads
from .cuda import Grid
from .device import empty, place_of
from .op import Array, Cost, Implementation, Op, launch

# Where a number lies in `hyper`, a float64 array of HYPER elements.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP_NORM, STEP, MOMENTUM, EMA_DECAY = range(9)
HYPER = 9
PARTS = 64                                              # of the sum of squares: fixed, so that no result depends on the threads


# -------------------------------------------------------------------------------------------------------------- reference
def _clipped(gradients: np.ndarray, norm: np.ndarray, hyper: np.ndarray) -> np.ndarray:
    return gradients * min(1.0, float(hyper[CLIP_NORM]) / (float(norm) + 1e-6)) if hyper[CLIP_NORM] > 0 else gradients


def _decay(parameters: np.ndarray, hyper: np.ndarray, decayed: int) -> np.ndarray:
    """The weight decay of each parameter."""
    return np.where(np.arange(len(parameters)) < decayed, hyper[WEIGHT_DECAY], 0)


def adamw_reference(new_parameters, new_m, new_v, parameters, gradients, m, v, norm, hyper, decayed):
    g = _clipped(gradients, norm, hyper)
    new_m[...] = hyper[BETA1] * m + (1 - hyper[BETA1]) * g
    new_v[...] = hyper[BETA2] * v + (1 - hyper[BETA2]) * g * g
    first = new_m / (1 - hyper[BETA1] ** hyper[STEP])
    second = new_v / (1 - hyper[BETA2] ** hyper[STEP])
    kept = 1 - hyper[LR] * _decay(parameters, hyper, decayed)
    new_parameters[...] = kept * parameters - hyper[LR] * first / (np.sqrt(second) + hyper[EPS])


def sgd_reference(new_parameters, new_velocity, parameters, gradients, velocity, norm, hyper, decayed, nesterov):
    g = _clipped(gradients, norm, hyper) + _decay(parameters, hyper, decayed) * parameters
    new_velocity[...] = hyper[MOMENTUM] * velocity + g
    step = g + hyper[MOMENTUM] * new_velocity if nesterov else new_velocity
    new_parameters[...] = parameters - hyper[LR] * step


def global_norm_reference(norm, gradients):
    norm[...] = np.sqrt((gradients.astype(np.float64) ** 2).sum())


def ema_reference(new_average, average, parameters, hyper):
    new_average[...] = hyper[EMA_DECAY] * average + (1 - hyper[EMA_DECAY]) * parameters


# -------------------------------------------------------------------------------------------------------------------- CPU
@routine
def _clip(norm, hyper):
    return min(1.0, hyper[CLIP_NORM] / (norm[0] + 1e-6)) if hyper[CLIP_NORM] > 0 else 1.0


@kernel
def _adamw(band, bands, parameters, m, v, gradients, norm, hyper, decayed):
    number, P = parameters.dtype.type, len(parameters)
    start, stop = band * P // bands, (band + 1) * P // bands
    first, second = 1 - hyper[BETA1] ** hyper[STEP], 1 - hyper[BETA2] ** hyper[STEP]
    clip, rate, root, eps = number(_clip(norm, hyper)), number(hyper[LR] / first), number(1 / np.sqrt(second)), number(hyper[EPS])
    beta1, beta2, rest1, rest2 = number(hyper[BETA1]), number(hyper[BETA2]), number(1 - hyper[BETA1]), number(1 - hyper[BETA2])
    for decays in range(2):                             # this band's parameters that do not decay, and those that do
        kept = number(1 - hyper[LR] * hyper[WEIGHT_DECAY] * decays)
        low, high = (start, min(stop, decayed)) if decays else (max(start, decayed), stop)
        for k in range(low, high):
            i = np.uint64(k)
            g = gradients[i] * clip
            a = beta1 * m[i] + rest1 * g
            b = beta2 * v[i] + rest2 * g * g
            m[i] = a
            v[i] = b
            parameters[i] = kept * parameters[i] - rate * a / (np.sqrt(b) * root + eps)


@kernel
def _sgd(band, bands, parameters, velocity, gradients, norm, hyper, decayed, nesterov):
    number, P = parameters.dtype.type, len(parameters)
    start, stop = band * P // bands, (band + 1) * P // bands
    clip, rate, momentum = number(_clip(norm, hyper)), number(hyper[LR]), number(hyper[MOMENTUM])
    ahead, fresh = (momentum, number(1)) if nesterov else (number(1), number(0))
    for decays in range(2):
        decay = number(hyper[WEIGHT_DECAY] * decays)
        low, high = (start, min(stop, decayed)) if decays else (max(start, decayed), stop)
        for k in range(low, high):
            i = np.uint64(k)
            g = gradients[i] * clip + decay * parameters[i]
            a = momentum * velocity[i] + g
            velocity[i] = a
            parameters[i] -= rate * (ahead * a + fresh * g)


@kernel
def _squares(band, bands, partial, gradients):
    P, parts = len(gradients), len(partial)
    for part in range(band * parts // bands, (band + 1) * parts // bands):
        total = 0.0
        for i in range(part * P // parts, (part + 1) * P // parts):
            g = np.float64(gradients[np.uint64(i)])
            total += g * g
        partial[part] = total


@kernel
def _root(band, bands, norm, partial):
    total = 0.0
    for part in range(len(partial)):
        total += partial[part]
    norm[0] = np.sqrt(total)


@kernel
def _ema(band, bands, average, parameters, hyper):
    number, P = parameters.dtype.type, len(parameters)
    decay, rest = number(hyper[EMA_DECAY]), number(1 - hyper[EMA_DECAY])
    for k in range(band * P // bands, (band + 1) * P // bands):
        i = np.uint64(k)
        average[i] = decay * average[i] + rest * parameters[i]


@kernel
def _advance(band, bands, hyper):
    hyper[STEP] += 1


def _begin(*pairs: tuple[np.ndarray, np.ndarray]) -> None:
    """Copy the old values where an output is another array than the input of its kind."""
    for new, old in pairs:
        if new.ctypes.data != old.ctypes.data:
            copy(new, old, old.shape, (1,), (1,))


def adamw_cpu(new_parameters, new_m, new_v, parameters, gradients, m, v, norm, hyper, decayed):
    _begin((new_parameters, parameters), (new_m, m), (new_v, v))
    launch(_adamw, bands_for(len(parameters)), new_parameters, new_m, new_v, gradients, norm.reshape(1), hyper, decayed)


def sgd_cpu(new_parameters, new_velocity, parameters, gradients, velocity, norm, hyper, decayed, nesterov):
    _begin((new_parameters, parameters), (new_velocity, velocity))
    launch(_sgd, bands_for(len(parameters)), new_parameters, new_velocity, gradients, norm.reshape(1), hyper, decayed, bool(nesterov))


def global_norm_cpu(norm, gradients):
    partial = empty((PARTS,), np.float64)
    launch(_squares, threads(), partial, gradients)
    launch(_root, 1, norm.reshape(1), partial)


def ema_cpu(new_average, average, parameters, hyper):
    _begin((new_average, average))
    launch(_ema, bands_for(len(parameters)), new_average, parameters, hyper)


def advance(hyper: Any) -> None:
    """Count a step, on either device: to be called before the update that uses it."""
    if place_of(hyper) == "cuda":
        launch(_source("advance"), Grid(1, 1), hyper)
    else:
        launch(_advance, 1, hyper)


# ------------------------------------------------------------------------------------------------------------------- CUDA
_source = cuda.Source("adamw")


def adamw_cuda(new_parameters, new_m, new_v, parameters, gradients, m, v, norm, hyper, decayed):
    size = parameters.size
    width = vector_width(size, new_parameters, new_m, new_v, parameters, gradients, m, v)
    launch(_source("adamw", parameters.dtype, norm.dtype, hyper.dtype, width), grid_for(size // width), new_parameters, new_m, new_v,
           parameters, gradients, m, v, norm, hyper, decayed, size)


def sgd_cuda(new_parameters, new_velocity, parameters, gradients, velocity, norm, hyper, decayed, nesterov):
    size = parameters.size
    width = vector_width(size, new_parameters, new_velocity, parameters, gradients, velocity)
    launch(_source("sgd", parameters.dtype, norm.dtype, hyper.dtype, width), grid_for(size // width), new_parameters, new_velocity,
           parameters, gradients, velocity, norm, hyper, decayed, bool(nesterov), size)


def global_norm_cuda(norm, gradients):
    width = vector_width(gradients.size, gradients)
    grid = Grid(cuda.blocks_for(gradients.size // width, 256, most=4), 256)
    partial = empty((grid.blocks,), np.float64, "cuda")
    launch(_source("squares", gradients.dtype, width), grid, partial, gradients, gradients.size)
    launch(_source("root"), Grid(1, 256), norm, partial, grid.blocks)


def ema_cuda(new_average, average, parameters, hyper):
    width = vector_width(average.size, new_average, average, parameters)
    launch(_source("ema", average.dtype, hyper.dtype, width), grid_for(average.size // width), new_average, average, parameters, hyper,
           average.size)


# ------------------------------------------------------------------------------------------------------------------- spec
def _hyper(rng, shape, sizes):
    hyper = np.zeros(HYPER)
    hyper[[LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP_NORM]] = 0.01, 0.9, 0.99, 1e-8, 0.1, rng.choice([0.0, 1.0, 1e6])
    hyper[[STEP, MOMENTUM, EMA_DECAY]] = rng.integers(1, 10), 0.9, 0.99
    return hyper


def _positive(rng, shape, sizes):
    return rng.uniform(0.1, 2, shape)


adamw = Op(
    "adamw",
    shapes={"parameters": "P", "gradients": "P", "m": "P", "v": "P", "norm": "", "hyper": "9"},
    constants={"decayed": 0},
    outputs=lambda parameters, gradients, m, v, *_: {"new_parameters": parameters, "new_m": m, "new_v": v},
    results=("new_parameters", "new_m", "new_v"),
    parameters=("parameters", "gradients", "m", "v", "norm", "hyper"),
    forward=Implementation(adamw_reference, adamw_cpu, adamw_cuda),
    cases=[dict(P=5, decayed=3), dict(P=1), dict(P=40_001, decayed=30_011), dict(P=2**20, decayed=2**20)],
    cost=lambda parameters, *_: Cost(forward=14 * parameters[0]),
    values={"v": _positive, "norm": _positive, "hyper": _hyper},
)

sgd = Op(
    "sgd",
    shapes={"parameters": "P", "gradients": "P", "velocity": "P", "norm": "", "hyper": "9"},
    constants={"decayed": 0, "nesterov": False},
    outputs=lambda parameters, gradients, velocity, *_: {"new_parameters": parameters, "new_velocity": velocity},
    results=("new_parameters", "new_velocity"),
    parameters=("parameters", "gradients", "velocity", "norm", "hyper"),
    forward=Implementation(sgd_reference, sgd_cpu, sgd_cuda),
    cases=[dict(P=5, decayed=3), dict(P=7, decayed=9, nesterov=True), dict(P=40_001, decayed=30_011)],
    cost=lambda parameters, *_: Cost(forward=8 * parameters[0]),
    values={"norm": _positive, "hyper": _hyper},
)

global_norm = Op(
    "global_norm",
    shapes={"gradients": "P"},
    outputs=lambda gradients: {"norm": Array((), np.float64)},
    results=("norm",),
    parameters=("gradients",),
    forward=Implementation(global_norm_reference, global_norm_cpu, global_norm_cuda),
    cases=[dict(P=5), dict(P=1), dict(P=100_003)],
    cost=lambda gradients: Cost(forward=2 * gradients[0]),
)

ema = Op(
    "ema",
    shapes={"average": "P", "parameters": "P", "hyper": "9"},
    outputs=lambda average, parameters, hyper: {"new_average": average},
    results=("new_average",),
    parameters=("average", "parameters", "hyper"),
    forward=Implementation(ema_reference, ema_cpu, ema_cuda),
    cases=[dict(P=5), dict(P=40_001)],
    cost=lambda average, parameters, hyper: Cost(forward=3 * average[0]),
    values={"hyper": _hyper},
)
