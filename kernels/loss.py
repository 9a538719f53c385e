"""Softmax cross-entropy with label smoothing (Szegedy et al., 1512.00567, section 7) and weights of classes, against classes or
probabilities.

    t_k = w_k·((1 - s)·target_k + s / K),      lse = log Σ_k exp(x_k),      loss = 1/N · Σ over rows of Σ_k t_k·(lse - x_k)

target is 1 at the class and 0 elsewhere, or a vector of probabilities. w_k is 1 without weights. As in PyTorch, N is the sum of the weights
of the rows' classes, or for probabilities the number of rows. Where the rows are a part of a batch, N is that of the entire batch, whose
classes are `batch`, so that the losses and the gradients of the parts add up to those of the batch. If N is 0, so is the loss.
With T = Σ_k t_k,

    dx_k = dloss / N · (T·exp(x_k - lse) - t_k)

The maximum of each row is subtracted before exp. The sums over the batch are in float64 and sequential.

Letters: B rows, K classes, M rows of the entire batch. A class outside 0 ... K - 1 makes the loss NaN.
"""

from __future__ import annotations

from functools import lru_cache

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
def _weighted(logits, targets, weight, label_smoothing):
    """t (B, K)."""
    K = logits.shape[1]
    hard = targets.ndim == 1
    t = (targets[:, None] == np.arange(K)).astype(logits.dtype) if hard else targets
    t = (1 - label_smoothing) * t + label_smoothing / K
    t = t if weight is None else t * weight
    return np.where((targets >= 0) & (targets < K), t.T, np.nan).T if hard else t


def forward_reference(loss, lse, total, logits, targets, weight, batch, label_smoothing):
    largest = logits.max(1)
    lse[...] = largest + np.log(np.exp(logits - largest[:, None]).sum(1))
    t = _weighted(logits, targets, weight, label_smoothing)
    rows = targets if batch is None else batch
    total[...] = len(rows) if weight is None or rows.ndim == 2 else weight[rows].sum()
    loss[...] = (t * (lse[:, None] - logits)).sum() / total if total else 0


def backward_reference(dlogits, dloss, logits, targets, weight, lse, total, label_smoothing):
    t = _weighted(logits, targets, weight, label_smoothing)
    scale = dloss / total if total else 0
    dlogits[...] = scale * (t.sum(1, keepdims=True) * np.exp(logits - lse[:, None]) - t)


def soft_forward_reference(loss, lse, total, logits, targets, weight, label_smoothing):
    forward_reference(loss, lse, total, logits, targets, weight, None, label_smoothing)


# -------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _forward(band, bands, losses, lse, logits, classes, targets, weights, soft, smoothing):
    B, K = logits.shape
    number = logits.dtype.type
    rest, everywhere, all_weights = number(1 - smoothing), number(smoothing / K), number(0)
    for k in range(K):
        all_weights += weights[k]
    for i in range(band * B // bands, (band + 1) * B // bands):
        largest = highest(logits[i], 0, K)
        total, all_classes, weighted, weight = number(0), number(0), number(0), number(0)
        for k in range(K):
            x = logits[i, k] - largest
            total += exp(x)
            all_classes += weights[k] * x
        if soft:
            for k in range(K):
                target = weights[k] * targets[i, k]
                weight += target
                weighted += target * (logits[i, k] - largest)
        elif 0 <= classes[i] < K:
            weight = weights[classes[i]]
            weighted = weight * (logits[i, classes[i]] - largest)
        else:
            weighted = number(np.nan)
        log_total = np.log(total)
        lse[i] = largest + log_total
        losses[i] = (rest * weight + everywhere * all_weights) * log_total - rest * weighted - everywhere * all_classes


@kernel
def _mean(band, bands, loss, total, losses, classes, weights, soft):
    rows, K, loss_sum = 0.0, len(weights), 0.0
    for i in range(len(losses)):
        loss_sum += losses[i]
    if soft:
        rows = float(len(losses))
    else:
        for i in range(len(classes)):
            rows += weights[classes[i]] if 0 <= classes[i] < K else np.nan
    total[0] = rows
    loss[0] = loss_sum / rows if rows != 0 else 0.0


@kernel
def _backward(band, bands, dlogits, dloss, logits, classes, targets, weights, lse, total, soft, smoothing):
    B, K = logits.shape
    number = logits.dtype.type
    rest, everywhere, all_weights = number(1 - smoothing), number(smoothing / K), number(0)
    mean = dloss[0] / total[0] if total[0] != 0 else number(0)
    for k in range(K):
        all_weights += weights[k]
    for i in range(band * B // bands, (band + 1) * B // bands):
        weight = number(0)
        if soft:
            for k in range(K):
                weight += weights[k] * targets[i, k]
        elif 0 <= classes[i] < K:
            weight = weights[classes[i]]
        weight = (rest * weight + everywhere * all_weights) * mean
        for k in range(K):
            dlogits[i, k] = weight * exp(logits[i, k] - lse[i]) - mean * everywhere * weights[k]
        if soft:
            for k in range(K):
                dlogits[i, k] -= mean * rest * weights[k] * targets[i, k]
        elif 0 <= classes[i] < K:
            dlogits[i, classes[i]] -= mean * rest * weights[classes[i]]
        else:
            for k in range(K):
                dlogits[i, k] = np.nan


@lru_cache(maxsize=64)
def _ones(K, dtype):
    return np.ones(K, dtype)


def _run_forward(loss, lse, total, logits, classes, targets, weight, batch, soft, label_smoothing):
    losses = empty(lse.shape, lse.dtype)  # (B,)
    weights = _ones(logits.shape[1], lse.dtype) if weight is None else weight
    launch(_forward, threads(), losses, lse, logits, classes, targets, weights, soft, float(label_smoothing))
    launch(_mean, 1, loss.reshape(1), total.reshape(1), losses, classes if batch is None else batch, weights, soft)


def forward_cpu(loss, lse, total, logits, targets, weight, batch, label_smoothing):
    _run_forward(loss, lse, total, logits, targets, logits, weight, batch, False, label_smoothing)


def soft_forward_cpu(loss, lse, total, logits, targets, weight, label_smoothing):
    _run_forward(loss, lse, total, logits, NONE, targets, weight, None, True, label_smoothing)


def _run_backward(dlogits, dloss, logits, classes, targets, weight, lse, total, soft, label_smoothing):
    weights = _ones(logits.shape[1], lse.dtype) if weight is None else weight
    arrays = dlogits, dloss.reshape(1), logits, classes, targets, weights, lse, total.reshape(1)
    launch(_backward, threads(), *arrays, soft, float(label_smoothing))


@in_float32(outputs=1)
def backward_cpu(dlogits, dloss, logits, targets, weight, lse, total, label_smoothing):
    _run_backward(dlogits, dloss, logits, targets, logits, weight, lse, total, False, label_smoothing)


@in_float32(outputs=1)
def soft_backward_cpu(dlogits, dloss, logits, targets, weight, lse, total, label_smoothing):
    _run_backward(dlogits, dloss, logits, NONE, targets, weight, lse, total, True, label_smoothing)


# -------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("loss")
ROW_WARPS = 4  # warps per block, each with its own rows


def _grid(B):
    return Grid(blocks_for(B, ROW_WARPS, most=16), 32 * ROW_WARPS)


def _run_forward_cuda(loss, lse, total, logits, classes, targets, weight, batch, label_smoothing):
    B, K = logits.shape
    losses = empty(lse.shape, lse.dtype, "cuda")  # (B,)
    kernel = _source("cross_entropy", logits.dtype, targets is not None)
    launch(kernel, _grid(B), losses, lse, logits, classes, targets, weight, B, K, float(label_smoothing))
    rows = classes if batch is None else batch
    launch(_source("mean_loss", lse.dtype), Grid(1, 256), loss, total, losses, rows, weight, B, B if rows is None else len(rows), K)


def forward_cuda(loss, lse, total, logits, targets, weight, batch, label_smoothing):
    _run_forward_cuda(loss, lse, total, logits, targets, None, weight, batch, label_smoothing)


def soft_forward_cuda(loss, lse, total, logits, targets, weight, label_smoothing):
    _run_forward_cuda(loss, lse, total, logits, None, targets, weight, None, label_smoothing)


def _run_backward_cuda(dlogits, dloss, logits, classes, targets, weight, lse, total, label_smoothing):
    B, K = logits.shape
    kernel = _source("cross_entropy_backward", logits.dtype, targets is not None)
    launch(kernel, _grid(B), dlogits, dloss, logits, classes, targets, weight, lse, total, B, K, float(label_smoothing))


def backward_cuda(dlogits, dloss, logits, targets, weight, lse, total, label_smoothing):
    _run_backward_cuda(dlogits, dloss, logits, targets, None, weight, lse, total, label_smoothing)


def soft_backward_cuda(dlogits, dloss, logits, targets, weight, lse, total, label_smoothing):
    _run_backward_cuda(dlogits, dloss, logits, None, targets, weight, lse, total, label_smoothing)


# ------------------------------------------------------------------------------------------------------------------- spec
def _probabilities(rng, shape, sizes):
    return rng.dirichlet(np.ones(shape[1]), shape[0]) * rng.uniform(0.5, 1, (shape[0], 1))  # rows that do not sum to 1


def _outputs(logits, targets, expected):
    require("cross_entropy", targets=(targets, expected))
    return {"loss": Float32Output(()), "lse": Float32Output(logits[:1]), "total": Float32Output(())}


def _weights(rng, shape, sizes):
    return rng.uniform(0.2, 3, shape)


def _classes(rng, shape, sizes):
    return rng.integers(0, sizes["K"], shape)


UNWEIGHTED = dict(weight=None, batch=None)

cross_entropy = Op(
    "cross_entropy",
    shapes={"logits": "B K", "targets": "B", "weight": "K", "batch": "M"},
    dtypes={"targets": (np.int64,), "batch": (np.int64,)},
    parameters=("weight",),
    constants={"label_smoothing": 0.0},
    outputs=lambda logits, targets, weight, batch, label_smoothing: _outputs(logits, targets, logits[:1]),
    results=("loss",),
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    gradients=("logits",),
    saves=("logits", "targets", "weight", "lse", "total"),
    cases=[
        dict(B=5, K=7, **UNWEIGHTED),
        dict(B=5, K=10, label_smoothing=0.1, **UNWEIGHTED),
        dict(B=1, K=1, **UNWEIGHTED),
        dict(B=64, K=1000, label_smoothing=0.1, **UNWEIGHTED),
        dict(B=5, K=7, weight="K", batch=None, label_smoothing=0.1),
        dict(B=3, K=40, M=300, label_smoothing=0.1),
    ],
    cost=lambda logits, targets, weight, batch, label_smoothing: Cost(
        forward=15 * logits[0] * logits[1], backward=15 * logits[0] * logits[1]
    ),
    values={
        "logits": lambda rng, shape, sizes: rng.normal(0, 4, shape),
        "targets": _classes,
        "weight": _weights,
        "batch": _classes,
    },
)

soft_cross_entropy = Op(
    "soft_cross_entropy",
    shapes={"logits": "B K", "targets": "B K", "weight": "K"},
    parameters=("weight",),
    constants={"label_smoothing": 0.0},
    outputs=lambda logits, targets, weight, label_smoothing: _outputs(logits, targets, logits),
    results=("loss",),
    forward=Implementation(soft_forward_reference, soft_forward_cpu, soft_forward_cuda),
    backward=Implementation(backward_reference, soft_backward_cpu, soft_backward_cuda),
    gradients=("logits",),
    saves=("logits", "targets", "weight", "lse", "total"),
    cases=[
        dict(B=5, K=7, weight=None),
        dict(B=5, K=10, label_smoothing=0.1, weight=None),
        dict(B=1, K=2, weight=None),
        dict(B=64, K=1000, label_smoothing=0.1, weight=None),
        dict(B=5, K=40, label_smoothing=0.1),
    ],
    cost=lambda logits, targets, weight, label_smoothing: Cost(forward=17 * logits[0] * logits[1], backward=17 * logits[0] * logits[1]),
    values={"logits": lambda rng, shape, sizes: rng.normal(0, 4, shape), "targets": _probabilities, "weight": _weights},
)
