"""Softmax cross-entropy with label smoothing (Szegedy et al., 1512.00567, section 7), against classes or probabilities.

    t_k = (1 - s)·target_k + s / K,      lse = log Σ_k exp(x_k),      loss = mean over rows of Σ_k t_k·(lse - x_k)

target is 1 at the class and 0 elsewhere, or a vector of probabilities. With T = Σ_k t_k, which need not be 1 for probabilities,

    dx_k = dloss / B · (T·exp(x_k - lse) - t_k)

The maximum of each row is subtracted before exp. The sum over the batch is in float64 and sequential.

Letters: B rows, K classes. A class outside 0 ... K - 1 makes the loss NaN.
"""

from __future__ import annotations

import numpy as np

from .core.arrays import empty
from .core.op import Cost, Float32Output, Implementation, Op, require
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.math import exp, highest
from .cpu.run import threads
from .cpu.strided import in_float32
from .cuda.kernel import Grid, Source, blocks_for

NONE = np.zeros(1, np.int64)  # placeholder for the classes if targets are probabilities


# -------------------------------------------------------------------------------------------------------------- reference
def _smoothed(logits: np.ndarray, targets: np.ndarray, label_smoothing: float) -> np.ndarray:
    K = logits.shape[1]
    hard = targets.ndim == 1
    t = (targets[:, None] == np.arange(K)).astype(logits.dtype) if hard else targets
    t = (1 - label_smoothing) * t + label_smoothing / K  # (B, K)
    return np.where((targets >= 0) & (targets < K), t.T, np.nan).T if hard else t


def forward_reference(loss, lse, logits, targets, label_smoothing):
    largest = logits.max(1)
    lse[...] = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
    t = _smoothed(logits, targets, label_smoothing)
    loss[...] = (t * (lse[:, None] - logits)).sum() / len(logits)


def backward_reference(dlogits, dloss, logits, targets, lse, label_smoothing):
    t = _smoothed(logits, targets, label_smoothing)
    dlogits[...] = dloss / len(logits) * (t.sum(1, keepdims=True) * np.exp(logits - lse[:, None]) - t)


# -------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _forward(band, bands, losses, lse, logits, classes, targets, soft, smoothing):
    B, K = logits.shape
    number = logits.dtype.type
    rest, everywhere = number(1 - smoothing), number(smoothing / K)
    for i in range(band * B // bands, (band + 1) * B // bands):
        largest = highest(logits[i], 0, K)
        total, all_classes, weighted, weight = number(0), number(0), number(0), number(1)
        for k in range(K):
            x = logits[i, k] - largest
            total += exp(x)
            all_classes += x
        if soft:
            weight = number(0)
            for k in range(K):
                weight += targets[i, k]
                weighted += targets[i, k] * (logits[i, k] - largest)
        else:
            valid = 0 <= classes[i] < K
            weighted = logits[i, classes[i]] - largest if valid else number(np.nan)
        log_total = np.log(total)
        lse[i] = largest + log_total
        losses[i] = (rest * weight + everywhere * number(K)) * log_total - rest * weighted - everywhere * all_classes


@kernel
def _mean(band, bands, loss, losses):
    total = 0.0
    for i in range(len(losses)):
        total += losses[i]
    loss[0] = total / len(losses)


@kernel
def _backward(band, bands, dlogits, dloss, logits, classes, targets, lse, soft, smoothing):
    B, K = logits.shape
    number = logits.dtype.type
    rest, everywhere, mean = number(1 - smoothing), number(smoothing / K), dloss[0] / number(B)
    for i in range(band * B // bands, (band + 1) * B // bands):
        weight = number(1)
        if soft:
            weight = number(0)
            for k in range(K):
                weight += targets[i, k]
        weight = (rest * weight + everywhere * number(K)) * mean
        for k in range(K):
            dlogits[i, k] = weight * exp(logits[i, k] - lse[i]) - mean * everywhere
        if soft:
            for k in range(K):
                dlogits[i, k] -= mean * rest * targets[i, k]
        elif 0 <= classes[i] < K:
            dlogits[i, classes[i]] -= mean * rest
        else:
            for k in range(K):
                dlogits[i, k] = np.nan


def _run_forward(loss, lse, logits, classes, targets, soft, label_smoothing):
    losses = empty(lse.shape, lse.dtype)  # (B,)
    launch(_forward, threads(), losses, lse, logits, classes, targets, soft, float(label_smoothing))
    launch(_mean, 1, loss.reshape(1), losses)


def forward_cpu(loss, lse, logits, targets, label_smoothing):
    _run_forward(loss, lse, logits, targets, logits, False, label_smoothing)


def soft_forward_cpu(loss, lse, logits, targets, label_smoothing):
    _run_forward(loss, lse, logits, NONE, targets, True, label_smoothing)


@in_float32(outputs=1)
def backward_cpu(dlogits, dloss, logits, targets, lse, label_smoothing):
    launch(_backward, threads(), dlogits, dloss.reshape(1), logits, targets, logits, lse, False, float(label_smoothing))


@in_float32(outputs=1)
def soft_backward_cpu(dlogits, dloss, logits, targets, lse, label_smoothing):
    launch(_backward, threads(), dlogits, dloss.reshape(1), logits, NONE, targets, lse, True, float(label_smoothing))


# -------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("loss")
ROW_WARPS = 4  # warps per block, each with its own rows


def _grid(B):
    return Grid(blocks_for(B, ROW_WARPS, most=16), 32 * ROW_WARPS)


def _run_forward_cuda(loss, lse, logits, classes, targets, label_smoothing):
    B, K = logits.shape
    losses = empty(lse.shape, lse.dtype, "cuda")  # (B,)
    kernel = _source("cross_entropy", logits.dtype, targets is not None)
    launch(kernel, _grid(B), losses, lse, logits, classes, targets, B, K, float(label_smoothing))
    launch(_source("mean_loss", lse.dtype), Grid(1, 256), loss, losses, B)


def forward_cuda(loss, lse, logits, targets, label_smoothing):
    _run_forward_cuda(loss, lse, logits, targets, None, label_smoothing)


def soft_forward_cuda(loss, lse, logits, targets, label_smoothing):
    _run_forward_cuda(loss, lse, logits, None, targets, label_smoothing)


def _run_backward_cuda(dlogits, dloss, logits, classes, targets, lse, label_smoothing):
    B, K = logits.shape
    kernel = _source("cross_entropy_backward", logits.dtype, targets is not None)
    launch(kernel, _grid(B), dlogits, dloss, logits, classes, targets, lse, B, K, float(label_smoothing))


def backward_cuda(dlogits, dloss, logits, targets, lse, label_smoothing):
    _run_backward_cuda(dlogits, dloss, logits, targets, None, lse, label_smoothing)


def soft_backward_cuda(dlogits, dloss, logits, targets, lse, label_smoothing):
    _run_backward_cuda(dlogits, dloss, logits, None, targets, lse, label_smoothing)


# ------------------------------------------------------------------------------------------------------------------- spec
def _probabilities(rng, shape, sizes):
    return rng.dirichlet(np.ones(shape[1]), shape[0]) * rng.uniform(0.5, 1, (shape[0], 1))  # rows that do not sum to 1


def _outputs(logits, targets, expected):
    require("cross_entropy", targets=(targets, expected))
    return {"loss": Float32Output(()), "lse": Float32Output(logits[:1])}


cross_entropy = Op(
    "cross_entropy",
    shapes={"logits": "B K", "targets": "B"},
    dtypes={"targets": (np.int64,)},
    constants={"label_smoothing": 0.0},
    outputs=lambda logits, targets, label_smoothing: _outputs(logits, targets, logits[:1]),
    results=("loss",),
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    gradients=("logits",),
    saves=("logits", "targets", "lse"),
    cases=[dict(B=5, K=7), dict(B=5, K=10, label_smoothing=0.1), dict(B=1, K=1), dict(B=64, K=1000, label_smoothing=0.1)],
    cost=lambda logits, targets, label_smoothing: Cost(forward=15 * logits[0] * logits[1], backward=15 * logits[0] * logits[1]),
    values={
        "logits": lambda rng, shape, sizes: rng.normal(0, 4, shape),
        "targets": lambda rng, shape, sizes: rng.integers(0, sizes["K"], shape),
    },
)

soft_cross_entropy = Op(
    "soft_cross_entropy",
    shapes={"logits": "B K", "targets": "B K"},
    constants={"label_smoothing": 0.0},
    outputs=lambda logits, targets, label_smoothing: _outputs(logits, targets, logits),
    results=("loss",),
    forward=Implementation(forward_reference, soft_forward_cpu, soft_forward_cuda),
    backward=Implementation(backward_reference, soft_backward_cpu, soft_backward_cuda),
    gradients=("logits",),
    saves=("logits", "targets", "lse"),
    cases=[dict(B=5, K=7), dict(B=5, K=10, label_smoothing=0.1), dict(B=1, K=2), dict(B=64, K=1000, label_smoothing=0.1)],
    cost=lambda logits, targets, label_smoothing: Cost(forward=17 * logits[0] * logits[1], backward=17 * logits[0] * logits[1]),
    values={"logits": lambda rng, shape, sizes: rng.normal(0, 4, shape), "targets": _probabilities},
)
