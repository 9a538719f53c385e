"""Stochastic gradient descent with momentum over one flat buffer; `begin_update.py` defines g'.

In PyTorch's form (Sutskever et al., ICML 2013), with velocity initially 0:

    g"       = g' + WEIGHT_DECAY·p,           velocity = MOMENTUM·velocity + g"
    p        = p - scale·LR·velocity,         or, with Nesterov's look-ahead, p - scale·LR·(g" + MOMENTUM·velocity)

Letters: P parameters.
"""

from __future__ import annotations

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
def forward_reference(
    new_parameters, new_velocity, new_average, parameters, gradients, velocity, average, squares, scalars, decayed, nesterov, scale
):
    g = clipped(gradients, squares, scalars) + decay_of(parameters, scalars, decayed) * parameters
    new_velocity[...] = scalars[MOMENTUM] * velocity + g
    step = g + scalars[MOMENTUM] * new_velocity if nesterov else new_velocity
    new_parameters[...] = parameters - scale * scalars[LR] * step
    average_reference(new_average, average, new_parameters, scalars)


# ------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _sgd(band, bands, parameters, velocity, average, gradients, squares, scalars, decayed, nesterov, scale):
    number, P = parameters.dtype.type, len(parameters)
    clip, rate, momentum = number(clip_factor(squares, scalars)), number(scale * scalars[LR]), number(scalars[MOMENTUM])
    ahead, fresh = (momentum, number(1)) if nesterov else (number(1), number(0))
    last = (band + 1) * P // bands
    for start in range(band * P // bands, last, BLOCK):
        stop = min(start + BLOCK, last)
        for decays in range(2):
            decay = number(scalars[WEIGHT_DECAY] * decays)
            low, high = (start, min(stop, decayed)) if decays else (max(start, decayed), stop)
            for k in range(low, high):
                i = np.uint64(k)
                g = gradients[i] * clip + decay * parameters[i]
                a = momentum * velocity[i] + g
                velocity[i] = a
                parameters[i] -= rate * (ahead * a + fresh * g)
        if len(average):
            take_average(average, parameters, scalars, start, stop)


def forward_cpu(
    new_parameters, new_velocity, new_average, parameters, gradients, velocity, average, squares, scalars, decayed, nesterov, scale
):
    copy_unless_in_place((new_parameters, parameters), (new_velocity, velocity), (new_average, average))
    launch(
        _sgd,
        bands_for(len(parameters)),
        new_parameters,
        new_velocity,
        or_nothing(new_average, parameters),
        gradients,
        squares,
        scalars,
        decayed,
        bool(nesterov),
        float(scale),
    )


# ------------------------------------------------------------------------------------------------------------------ CUDA
_source = Source("sgd")


def forward_cuda(
    new_parameters, new_velocity, new_average, parameters, gradients, velocity, average, squares, scalars, decayed, nesterov, scale
):
    update_cuda(
        _source,
        "sgd",
        (new_parameters, new_velocity, new_average, parameters, gradients, velocity, average),
        squares,
        scalars,
        decayed,
        bool(nesterov),
        float(scale),
    )


# ------------------------------------------------------------------------------------------------------------------ spec
sgd = Op(
    "sgd",
    shapes={"parameters": "P", "gradients": "P", "velocity": "P", "average": "P", "squares": f"{PARTS}", "scalars": f"{SCALARS}"},
    constants={"decayed": 0, "nesterov": False, "scale": 1.0},
    outputs=lambda parameters, gradients, velocity, average, *_: {
        "new_parameters": parameters,
        "new_velocity": velocity,
        "new_average": average,
    },
    results=("new_parameters", "new_velocity", "new_average"),
    parameters=("parameters", "gradients", "velocity", "average", "squares", "scalars"),
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    cases=[dict(P=5, decayed=3), dict(P=7, decayed=9, nesterov=True, average=None), dict(P=40_001, decayed=30_011, scale=0.3)],
    cost=lambda parameters, gradients, velocity, average, *_: Cost(forward=(8 if average is None else 11) * parameters[0]),
    values={"squares": make_positive, "scalars": make_scalars},
)
