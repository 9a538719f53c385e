"""Multi-head attention of one query per sample over a set of tokens (Chen et al., 2103.14899, equation 5).

    l[n] = scale·q·k[n],   p = softmax(l) over n,   y = Σ p[n]·v[n]

With dp[n] = dy·v[n] and dl = p·(dp - Σ p·dp):

    dq = scale·Σ dl[n]·k[n],     dk[n] = scale·dl[n]·q,     dv[n] = p[n]·dy

Each of q, k, v is read once from memory: a head's query and its N probabilities stay in the cache.

Letters: B batch, N tokens, H heads, D head size.
"""

from __future__ import annotations

from math import prod

import numpy as np

from .core.arrays import empty, empty_like
from .core.op import Cost, Float32Output, Implementation, Op, Shape, require
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.math import exp, highest
from .cpu.run import threads
from .cpu.views import zero_of
from .cuda.kernel import Source
from .cuda.strided import grid_for


# -------------------------------------------------------------------------------------------------------------- reference
def forward_reference(y, p, q, k, v, scale):
    logits = scale * np.einsum("bhd,bnhd->bhn", q, k)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    p[...] = powers / powers.sum(-1, keepdims=True)
    y[...] = np.einsum("bhn,bnhd->bhd", p, v)


def backward_reference(dq, dk, dv, dy, q, k, v, p, scale):
    dp = np.einsum("bhd,bnhd->bhn", dy, v)
    dl = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
    if dq is not None:
        dq[...] = np.einsum("bhn,bnhd->bhd", dl, k)
    if dk is not None:
        dk[...] = np.einsum("bhn,bhd->bnhd", dl, q)
    if dv is not None:
        dv[...] = np.einsum("bhn,bhd->bnhd", p, dy)


# -------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _forward(band, bands, y, p, q, k, v, sums, scale):
    B, N, H, D = k.shape
    zero, total = zero_of(p), sums[band]  # (D,)
    factor = type(zero)(scale)
    for head in range(band * B * H // bands, (band + 1) * B * H // bands):
        b, h = head // H, head % H
        row = p[b, h]
        for n in range(N):
            logit = zero
            for d in range(D):
                logit += q[b, h, np.uint64(d)] * k[b, n, h, np.uint64(d)]
            row[n] = logit * factor
        top = highest(row, 0, N)
        powers = zero
        for n in range(N):
            row[n] = exp(row[n] - top)
            powers += row[n]
        total[:] = 0
        for n in range(N):
            row[n] *= type(zero)(1) / powers
            for d in range(D):
                total[np.uint64(d)] += row[n] * v[b, n, h, np.uint64(d)]
        for d in range(D):
            y[b, h, d] = total[d]


@kernel
def _backward(band, bands, dq, dk, dv, dy, q, k, v, p, logits, sums, scale):
    B, N, H, D = k.shape
    zero, dl, total = zero_of(p), logits[band], sums[band]  # (N,), (D,)
    factor = type(zero)(scale)
    for head in range(band * B * H // bands, (band + 1) * B * H // bands):
        b, h = head // H, head % H
        row = p[b, h]
        mean = zero
        for n in range(N):
            dp = zero
            for d in range(D):
                dp += dy[b, h, np.uint64(d)] * v[b, n, h, np.uint64(d)]
                dv[b, n, h, np.uint64(d)] = row[n] * dy[b, h, np.uint64(d)]
            dl[n] = dp
            mean += row[n] * dp
        total[:] = 0
        for n in range(N):
            g = row[n] * (dl[n] - mean) * factor
            for d in range(D):
                total[np.uint64(d)] += g * k[b, n, h, np.uint64(d)]
                dk[b, n, h, np.uint64(d)] = g * q[b, h, np.uint64(d)]
        for d in range(D):
            dq[b, h, d] = total[d]


def _bands(p: np.ndarray) -> int:
    return min(threads(), p.shape[0] * p.shape[1])


def forward_cpu(y, p, q, k, v, scale):
    bands = _bands(p)
    launch(_forward, bands, y, p, q, k, v, empty((bands, q.shape[2]), p.dtype), scale)


def backward_cpu(dq, dk, dv, dy, q, k, v, p, scale):
    dq, dk, dv = (empty_like(a) if d is None else d for d, a in ((dq, q), (dk, k), (dv, v)))
    bands = _bands(p)
    scratch = empty((bands, p.shape[2]), p.dtype), empty((bands, q.shape[2]), p.dtype)
    launch(_backward, bands, dq, dk, dv, dy, q, k, v, p, *scratch, scale)


# ------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("cross_attention")


def forward_cuda(y, p, q, k, v, scale):
    launch(_source("cross_attention_forward", q.dtype), grid_for(32 * p.size // p.shape[2]), y, p, q, k, v, *k.shape, float(scale))


def backward_cuda(dq, dk, dv, dy, q, k, v, p, scale):
    grid, dl = grid_for(32 * p.size // p.shape[2]), empty_like(p)
    launch(_source("cross_attention_backward", q.dtype), grid, dq, dk, dv, dl, dy, q, k, v, p, *k.shape, float(scale))


# ------------------------------------------------------------------------------------------------------------------- spec
def _outputs(q: Shape, k: Shape, v: Shape, scale: float) -> dict[str, Shape | Float32Output]:
    require("cross_attention", v=(v, k))
    return {"y": q, "p": Float32Output((*q[:2], k[1]))}


cross_attention = Op(
    "cross_attention",
    shapes={"q": "B H D", "k": "B N H D", "v": "B N H D"},
    constants={"scale": 1.0},
    outputs=_outputs,
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    saves=("q", "k", "v", "p"),
    cases=[
        dict(B=2, N=5, H=3, D=4, scale=0.5),
        dict(B=1, N=1, H=1, D=1),
        dict(B=3, N=37, H=2, D=40, scale=0.2),
        dict(B=64, N=197, H=3, D=64, scale=0.125),
    ],
    cost=lambda q, k, v, scale: Cost(forward=4 * prod(k), backward=8 * prod(k), macs=2 * prod(k)),
)
