"""AdamW (Loshchilov and Hutter, 1711.05101, algorithm 2, with PyTorch's scaling) over one flat buffer; `begin_update.py` defines g' and t.

    m        = BETA1·m + (1 - BETA1)·g',      v = BETA2·v + (1 - BETA2)·g'²
    p        = (1 - scale·LR·WEIGHT_DECAY)·p - scale·LR·(m / (1 - BETA1ᵗ)) / (sqrt(v / (1 - BETA2ᵗ)) + EPS)

Letters: P parameters.
"""

from __future__ import annotations

import numpy as np

from .begin_update import (
    BETA1,
    BETA2,
    BLOCK,
    EPS,
    LR,
    PARTS,
    SCALARS,
    STEP,
    WEIGHT_DECAY,
    average_reference,
    clip_factor,
    clipped,
    copy_unless_in_place,
    decay_of,
    make_positive,
    make_scalars,
    or_nothing,
    take_average,
    update_cuda,
)
from .core.op import Cost, Implementation, Op
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.strided import bands_for
from .cuda.kernel import Source


# ------------------------------------------------------------------------------------------------------------- reference
def forward_reference(new_parameters, new_m, new_v, new_average, parameters, gradients, m, v, average, squares, scalars, decayed, scale):
    g = clipped(gradients, squares, scalars)
    new_m[...] = scalars[BETA1] * m + (1 - scalars[BETA1]) * g
    new_v[...] = scalars[BETA2] * v + (1 - scalars[BETA2]) * g * g
    first = new_m / (1 - scalars[BETA1] ** scalars[STEP])
    second = new_v / (1 - scalars[BETA2] ** scalars[STEP])
    rate = scale * scalars[LR]
    shrinkage = 1 - rate * decay_of(parameters, scalars, decayed)
    new_parameters[...] = shrinkage * parameters - rate * first / (np.sqrt(second) + scalars[EPS])
    average_reference(new_average, average, new_parameters, scalars)


# ------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _adamw(band, bands, parameters, m, v, average, gradients, squares, scalars, decayed, scale):
    number, P, lr = parameters.dtype.type, len(parameters), scale * scalars[LR]
    first, second = 1 - scalars[BETA1] ** scalars[STEP], 1 - scalars[BETA2] ** scalars[STEP]
    clip, rate, root, eps = (
        number(clip_factor(squares, scalars)),
        number(lr / first),
        number(1 / np.sqrt(second)),
        number(scalars[EPS]),
    )
    beta1, beta2, rest1, rest2 = number(scalars[BETA1]), number(scalars[BETA2]), number(1 - scalars[BETA1]), number(1 - scalars[BETA2])
    last = (band + 1) * P // bands
    for start in range(band * P // bands, last, BLOCK):
        stop = min(start + BLOCK, last)
        for decays in range(2):  # the parameters of the block without weight decay, and those with it
            shrinkage = number(1 - lr * scalars[WEIGHT_DECAY] * decays)
            low, high = (start, min(stop, decayed)) if decays else (max(start, decayed), stop)
            for k in range(low, high):
                i = np.uint64(k)
                g = gradients[i] * clip
                a = beta1 * m[i] + rest1 * g
                b = beta2 * v[i] + rest2 * g * g
                m[i] = a
                v[i] = b
                parameters[i] = shrinkage * parameters[i] - rate * a / (np.sqrt(b) * root + eps)
        if len(average):
            take_average(average, parameters, scalars, start, stop)


def forward_cpu(new_parameters, new_m, new_v, new_average, parameters, gradients, m, v, average, squares, scalars, decayed, scale):
    copy_unless_in_place((new_parameters, parameters), (new_m, m), (new_v, v), (new_average, average))
    launch(
        _adamw,
        bands_for(len(parameters)),
        new_parameters,
        new_m,
        new_v,
        or_nothing(new_average, parameters),
        gradients,
        squares,
        scalars,
        decayed,
        float(scale),
    )


# ------------------------------------------------------------------------------------------------------------------ CUDA
_source = Source("adamw")


def forward_cuda(new_parameters, new_m, new_v, new_average, parameters, gradients, m, v, average, squares, scalars, decayed, scale):
    arrays = new_parameters, new_m, new_v, new_average, parameters, gradients, m, v, average
    update_cuda(_source, "adamw", arrays, squares, scalars, decayed, float(scale))


# ------------------------------------------------------------------------------------------------------------------ spec
adamw = Op(
    "adamw",
    shapes={"parameters": "P", "gradients": "P", "m": "P", "v": "P", "average": "P", "squares": f"{PARTS}", "scalars": f"{SCALARS}"},
    constants={"decayed": 0, "scale": 1.0},
    outputs=lambda parameters, gradients, m, v, average, *_: {"new_parameters": parameters, "new_m": m, "new_v": v, "new_average": average},
    results=("new_parameters", "new_m", "new_v", "new_average"),
    parameters=("parameters", "gradients", "m", "v", "average", "squares", "scalars"),
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    cases=[
        dict(P=5, decayed=3),
        dict(P=1, average=None),
        dict(P=40_001, decayed=30_011, scale=0.3),
        dict(P=2**20, decayed=2**20, average=None),
    ],
    cost=lambda parameters, gradients, m, v, average, *_: Cost(forward=(14 if average is None else 17) * parameters[0]),
    values={"v": make_positive, "squares": make_positive, "scalars": make_scalars},
)
