"""The optimizer's arithmetic, over all parameters in one flat buffer: AdamW, SGD, the norm of the gradient, and a running average.

    begin_update: squares = Σ g² over each of PARTS equal stretches of the buffer, STEP = STEP + 1

    norm     = sqrt(Σ squares)
    g'       = g·min(1, CLIP_NORM / (norm + 1e-6))                        (g' = g where CLIP_NORM is 0)

    adamw (Loshchilov and Hutter, 1711.05101, algorithm 2, as PyTorch scales it), t = STEP:
    m        = BETA1·m + (1 - BETA1)·g',      v = BETA2·v + (1 - BETA2)·g'²
    p        = (1 - LR·WEIGHT_DECAY)·p - LR·(m / (1 - BETA1ᵗ)) / (sqrt(v / (1 - BETA2ᵗ)) + EPS)

    sgd with momentum (Sutskever et al., ICML 2013, in PyTorch's form), velocity from 0:
    g"       = g' + WEIGHT_DECAY·p,           velocity = MOMENTUM·velocity + g"
    p        = p - LR·velocity,               or, with Nesterov's look-ahead, p - LR·(g" + MOMENTUM·velocity)

    both, where there is an average of the weights (Polyak and Juditsky, 1992; 1803.05407), with TensorFlow's warmup:
    average  = d·average + (1 - d)·p,         d = min(EMA_DECAY, (1 + t) / (10 + t))

Weights decay among the first `decayed` parameters only. The kernels work in place, on outputs that are the inputs of their kind or begin
as copies of them: give one array for both, and nothing is copied. The numbers that a schedule changes lie in memory, in `hyper`, so that a
recorded step sees them. Sums and coefficients are in float64.

Letters: P parameters.
"""

from __future__ import annotations

import numpy as np

from . import cuda
from .copying import bands_for, copy, grid_for, vector_width
from .cpu import kernel, routine, threads
from .cuda import Grid
from .device import empty
from .op import Array, Cost, Implementation, Op, launch

# Where a number lies in `hyper`, a float64 array of HYPER elements.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP_NORM, STEP, MOMENTUM, EMA_DECAY = range(9)
HYPER = 9
PARTS = 512  # sums of squares: fixed, so that no result depends on the threads
LINE = 16  # elements; a stretch holds whole lines, so that vectors do not cross its ends
BLOCK = 2048  # elements that are updated and then averaged, while they lie in a cache


def _stretch(size: int) -> int:
    """The length of all stretches but the last ones."""
    return -(-size // (PARTS * LINE)) * LINE


# -------------------------------------------------------------------------------------------------------------- reference
def _clipped(gradients: np.ndarray, squares: np.ndarray, hyper: np.ndarray) -> np.ndarray:
    norm = np.sqrt(squares.sum())
    return gradients * min(1.0, hyper[CLIP_NORM] / (norm + 1e-6)) if hyper[CLIP_NORM] > 0 else gradients


def _decay(parameters: np.ndarray, hyper: np.ndarray, decayed: int) -> np.ndarray:
    """The weight decay of each parameter."""
    return np.where(np.arange(len(parameters)) < decayed, hyper[WEIGHT_DECAY], 0)


def _average_reference(new_average, average, parameters, hyper):
    if new_average is not None:
        decay = min(hyper[EMA_DECAY], (1 + hyper[STEP]) / (10 + hyper[STEP]))
        new_average[...] = decay * average + (1 - decay) * parameters


def begin_update_reference(squares, new_hyper, gradients, hyper):
    wide = np.zeros(PARTS * _stretch(len(gradients)), np.promote_types(gradients.dtype, np.float64))
    wide[: len(gradients)] = gradients
    squares[...] = (wide**2).reshape(PARTS, -1).sum(1)
    new_hyper[...] = hyper
    new_hyper[STEP] += 1


def adamw_reference(new_parameters, new_m, new_v, new_average, parameters, gradients, m, v, average, squares, hyper, decayed):
    g = _clipped(gradients, squares, hyper)
    new_m[...] = hyper[BETA1] * m + (1 - hyper[BETA1]) * g
    new_v[...] = hyper[BETA2] * v + (1 - hyper[BETA2]) * g * g
    first = new_m / (1 - hyper[BETA1] ** hyper[STEP])
    second = new_v / (1 - hyper[BETA2] ** hyper[STEP])
    kept = 1 - hyper[LR] * _decay(parameters, hyper, decayed)
    new_parameters[...] = kept * parameters - hyper[LR] * first / (np.sqrt(second) + hyper[EPS])
    _average_reference(new_average, average, new_parameters, hyper)


def sgd_reference(new_parameters, new_velocity, new_average, parameters, gradients, velocity, average, squares, hyper, decayed, nesterov):
    g = _clipped(gradients, squares, hyper) + _decay(parameters, hyper, decayed) * parameters
    new_velocity[...] = hyper[MOMENTUM] * velocity + g
    step = g + hyper[MOMENTUM] * new_velocity if nesterov else new_velocity
    new_parameters[...] = parameters - hyper[LR] * step
    _average_reference(new_average, average, new_parameters, hyper)


# -------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _begin_update(band, bands, squares, hyper, gradients, stretch):
    P, parts = len(gradients), len(squares)
    for part in range(band * parts // bands, (band + 1) * parts // bands):
        total = 0.0
        for i in range(min(P, part * stretch), min(P, (part + 1) * stretch)):
            g = np.float64(gradients[np.uint64(i)])
            total += g * g
        squares[part] = total
    if band == 0:
        hyper[STEP] += 1


@routine
def _clip(squares, hyper):
    if hyper[CLIP_NORM] <= 0:
        return 1.0
    total = 0.0
    for part in range(len(squares)):
        total += squares[part]
    return min(1.0, hyper[CLIP_NORM] / (np.sqrt(total) + 1e-6))


@routine
def _take_average(average, parameters, hyper, start, stop):
    decay = min(hyper[EMA_DECAY], (1 + hyper[STEP]) / (10 + hyper[STEP]))
    kept, rest = parameters.dtype.type(decay), parameters.dtype.type(1 - decay)
    for k in range(start, stop):
        i = np.uint64(k)
        average[i] = kept * average[i] + rest * parameters[i]


@kernel
def _adamw(band, bands, parameters, m, v, average, gradients, squares, hyper, decayed):
    number, P = parameters.dtype.type, len(parameters)
    first, second = 1 - hyper[BETA1] ** hyper[STEP], 1 - hyper[BETA2] ** hyper[STEP]
    clip, rate, root, eps = number(_clip(squares, hyper)), number(hyper[LR] / first), number(1 / np.sqrt(second)), number(hyper[EPS])
    beta1, beta2, rest1, rest2 = number(hyper[BETA1]), number(hyper[BETA2]), number(1 - hyper[BETA1]), number(1 - hyper[BETA2])
    last = (band + 1) * P // bands
    for start in range(band * P // bands, last, BLOCK):
        stop = min(start + BLOCK, last)
        for decays in range(2):  # the block's parameters that do not decay, and those that do
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
        if len(average):
            _take_average(average, parameters, hyper, start, stop)


@kernel
def _sgd(band, bands, parameters, velocity, average, gradients, squares, hyper, decayed, nesterov):
    number, P = parameters.dtype.type, len(parameters)
    clip, rate, momentum = number(_clip(squares, hyper)), number(hyper[LR]), number(hyper[MOMENTUM])
    ahead, fresh = (momentum, number(1)) if nesterov else (number(1), number(0))
    last = (band + 1) * P // bands
    for start in range(band * P // bands, last, BLOCK):
        stop = min(start + BLOCK, last)
        for decays in range(2):
            decay = number(hyper[WEIGHT_DECAY] * decays)
            low, high = (start, min(stop, decayed)) if decays else (max(start, decayed), stop)
            for k in range(low, high):
                i = np.uint64(k)
                g = gradients[i] * clip + decay * parameters[i]
                a = momentum * velocity[i] + g
                velocity[i] = a
                parameters[i] -= rate * (ahead * a + fresh * g)
        if len(average):
            _take_average(average, parameters, hyper, start, stop)


def _begin(*pairs: tuple[np.ndarray | None, np.ndarray | None]) -> None:
    """Copy the old values where an output is another array than the input of its kind."""
    for new, old in pairs:
        if new is not None and old is not None and new.ctypes.data != old.ctypes.data:
            copy(new, old, old.shape, (1,), (1,))


def _or_nothing(average: np.ndarray | None, parameters: np.ndarray) -> np.ndarray:
    return empty((0,), parameters.dtype) if average is None else average


def begin_update_cpu(squares, new_hyper, gradients, hyper):
    _begin((new_hyper, hyper))
    launch(_begin_update, threads(), squares, new_hyper, gradients, _stretch(len(gradients)))


def adamw_cpu(new_parameters, new_m, new_v, new_average, parameters, gradients, m, v, average, squares, hyper, decayed):
    _begin((new_parameters, parameters), (new_m, m), (new_v, v), (new_average, average))
    launch(
        _adamw,
        bands_for(len(parameters)),
        new_parameters,
        new_m,
        new_v,
        _or_nothing(new_average, parameters),
        gradients,
        squares,
        hyper,
        decayed,
    )


def sgd_cpu(new_parameters, new_velocity, new_average, parameters, gradients, velocity, average, squares, hyper, decayed, nesterov):
    _begin((new_parameters, parameters), (new_velocity, velocity), (new_average, average))
    launch(
        _sgd,
        bands_for(len(parameters)),
        new_parameters,
        new_velocity,
        _or_nothing(new_average, parameters),
        gradients,
        squares,
        hyper,
        decayed,
        bool(nesterov),
    )


# ------------------------------------------------------------------------------------------------------------------- CUDA
_source = cuda.Source("adamw")


def begin_update_cuda(squares, new_hyper, gradients, hyper):
    width, stretch = vector_width(gradients.size, gradients), _stretch(gradients.size)
    grid = Grid(PARTS, min(512, 32 * -(-stretch // (32 * width))))
    launch(
        _source("begin_update", gradients.dtype, squares.dtype, hyper.dtype, width),
        grid,
        squares,
        new_hyper,
        gradients,
        hyper,
        stretch,
        gradients.size,
    )


def adamw_cuda(new_parameters, new_m, new_v, new_average, parameters, gradients, m, v, average, squares, hyper, decayed):
    _update_cuda("adamw", (new_parameters, new_m, new_v, new_average, parameters, gradients, m, v, average), squares, hyper, decayed)


def sgd_cuda(new_parameters, new_velocity, new_average, parameters, gradients, velocity, average, squares, hyper, decayed, nesterov):
    _update_cuda(
        "sgd",
        (new_parameters, new_velocity, new_average, parameters, gradients, velocity, average),
        squares,
        hyper,
        decayed,
        bool(nesterov),
    )


def _update_cuda(name, arrays, squares, hyper, *constants):
    """arrays: all of P elements, or None."""
    size = arrays[0].size
    width = vector_width(size, *(a for a in arrays if a is not None))
    launch(
        _source(name, arrays[0].dtype, squares.dtype, hyper.dtype, width),
        grid_for(size // width),
        *arrays,
        squares,
        PARTS,
        hyper,
        *constants,
        size,
    )


# ------------------------------------------------------------------------------------------------------------------- spec
def _hyper(rng, shape, sizes):
    hyper = np.zeros(HYPER)
    hyper[[LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP_NORM]] = 0.01, 0.9, 0.99, 1e-8, 0.1, rng.choice([0.0, 1.0, 1e6])
    hyper[[STEP, MOMENTUM, EMA_DECAY]] = rng.integers(1, 10), 0.9, rng.choice([0.1, 0.99])
    return hyper


def _positive(rng, shape, sizes):
    return rng.uniform(0.1, 2, shape)


begin_update = Op(
    "begin_update",
    shapes={"gradients": "P", "hyper": f"{HYPER}"},
    outputs=lambda gradients, hyper: {"squares": Array((PARTS,), np.float64), "new_hyper": hyper},
    results=("squares", "new_hyper"),
    parameters=("gradients", "hyper"),
    forward=Implementation(begin_update_reference, begin_update_cpu, begin_update_cuda),
    cases=[dict(P=5), dict(P=1), dict(P=100_003)],
    cost=lambda gradients, hyper: Cost(forward=2 * gradients[0]),
    values={"hyper": _hyper},
)

adamw = Op(
    "adamw",
    shapes={"parameters": "P", "gradients": "P", "m": "P", "v": "P", "average": "P", "squares": f"{PARTS}", "hyper": f"{HYPER}"},
    constants={"decayed": 0},
    outputs=lambda parameters, gradients, m, v, average, *_: {"new_parameters": parameters, "new_m": m, "new_v": v, "new_average": average},
    results=("new_parameters", "new_m", "new_v", "new_average"),
    parameters=("parameters", "gradients", "m", "v", "average", "squares", "hyper"),
    forward=Implementation(adamw_reference, adamw_cpu, adamw_cuda),
    cases=[dict(P=5, decayed=3), dict(P=1, average=None), dict(P=40_001, decayed=30_011), dict(P=2**20, decayed=2**20, average=None)],
    cost=lambda parameters, gradients, m, v, average, *_: Cost(forward=(14 if average is None else 17) * parameters[0]),
    values={"v": _positive, "squares": _positive, "hyper": _hyper},
)

sgd = Op(
    "sgd",
    shapes={"parameters": "P", "gradients": "P", "velocity": "P", "average": "P", "squares": f"{PARTS}", "hyper": f"{HYPER}"},
    constants={"decayed": 0, "nesterov": False},
    outputs=lambda parameters, gradients, velocity, average, *_: {
        "new_parameters": parameters,
        "new_velocity": velocity,
        "new_average": average,
    },
    results=("new_parameters", "new_velocity", "new_average"),
    parameters=("parameters", "gradients", "velocity", "average", "squares", "hyper"),
    forward=Implementation(sgd_reference, sgd_cpu, sgd_cuda),
    cases=[dict(P=5, decayed=3), dict(P=7, decayed=9, nesterov=True, average=None), dict(P=40_001, decayed=30_011)],
    cost=lambda parameters, gradients, velocity, average, *_: Cost(forward=(8 if average is None else 11) * parameters[0]),
    values={"squares": _positive, "hyper": _hyper},
)
