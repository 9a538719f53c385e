"""Multi-head attention from packed q, k, v (Vaswani et al., 1706.03762, section 3.2); on a CPU, a thread computes one head at a time.

    l = scale·q·kᵀ + bias,   p = softmax(l) over keys,   y = p·v

Backward recomputes p = exp(l - lse) from the saved log-sum-exp of each row. With dp = dy·vᵀ (+ the gradient of the output p, if any):

    dv = pᵀ·dy,   dl = p·(dp - Σ p·dp) (+ the gradient of the output l),   dbias = dl,   dq = scale·dl·k,   dk = scale·dlᵀ·q

Letters: B batch, N tokens, H heads, D head size. qkv is (B, N, 3, H, D), as in timm; bias is (B, H, N, N), with 1 for B or H if shared.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .core.arrays import empty, empty_like
from .core.dtypes import BFLOAT16
from .core.epilogue import CONVERT, PADDED
from .core.op import Cost, Float32Output, Implementation, Op, Shape, require
from .core.recording import launch
from .cpu import strided as cpu
from .cpu.compile import routine
from .cpu.epilogue import finish_entry
from .cpu.gemm import tile_of
from .cpu.kernel import kernel
from .cpu.math import exp, highest
from .cpu.operands import Matrix, Method, Size
from .cpu.product import plain_product, product_entry, scratch_bytes
from .cpu.run import threads
from .cpu.views import item_bytes, view, zero_of
from .cuda import strided as cuda
from .cuda.kernel import Grid, Source


# -------------------------------------------------------------------------------------------------------------------- reference
def _heads(qkv):
    return qkv.transpose(2, 0, 3, 1, 4)  # (3, B, H, N, D)


def _logits(qkv, bias, scale):
    q, k, _ = _heads(qkv)
    logits = scale * (q @ k.swapaxes(-1, -2))  # (B, H, N, N)
    return logits if bias is None else logits + bias


def forward_reference(y, logits, probabilities, lse, qkv, bias, scale, keep_logits, keep_probabilities):
    values = _logits(qkv, bias, scale)
    highest = values.max(-1, keepdims=True)
    powers = np.exp(values - highest)
    sums = powers.sum(-1, keepdims=True)
    lse[...] = (highest + np.log(sums))[..., 0]
    y[...] = ((powers / sums) @ _heads(qkv)[2]).transpose(0, 2, 1, 3)
    if keep_logits:
        logits[...] = values
    if keep_probabilities:
        probabilities[...] = powers / sums


def backward_reference(dqkv, dbias, dy, dlogits, dprobabilities, qkv, bias, lse, scale, keep_logits, keep_probabilities):
    q, k, v = _heads(qkv)
    p = np.exp(_logits(qkv, bias, scale) - lse[..., None])  # (B, H, N, N)
    dy = np.zeros_like(q) if dy is None else dy.transpose(0, 2, 1, 3)  # (B, H, N, D)
    dp = dy @ v.swapaxes(-1, -2)
    if dprobabilities is not None:
        dp = dp + dprobabilities
    dl = p * (dp - (p * dp).sum(-1, keepdims=True))
    if dlogits is not None:
        dl = dl + dlogits
    if dbias is not None:
        axes = tuple(a for a in (0, 1) if bias.shape[a] == 1)
        dbias[...] = dl.sum(axes, keepdims=True)
    if dqkv is not None:
        d = _heads(dqkv)
        d[0] = scale * (dl @ k)
        d[1] = scale * (dl.swapaxes(-1, -2) @ q)
        d[2] = p.swapaxes(-1, -2) @ dy


# -------------------------------------------------------------------------------------------------------------------------- CPU
@routine
def _scale_and_bias(zero, square, size, scale, bias_zero, bias, biased):
    """square = scale·square + bias; square and bias are addresses of `size` numbers."""
    scores, added, factor = view(zero, square), view(bias_zero, bias), type(zero)(scale)
    if biased:
        for j in range(size):
            scores[j] = scores[j] * factor + added[j]
    else:
        for j in range(size):
            scores[j] *= factor


@routine
def _exp_all(zero, square, size):
    """exp of all elements in one loop: a loop per row would be too short, with too large a scalar remainder."""
    scores = view(zero, square)
    for j in range(size):
        scores[j] = exp(scores[j])


@routine
def _copy_all(target_zero, target, zero, square, size):
    out, scores = view(target_zero, target), view(zero, square)
    for j in range(size):
        out[j] = scores[j]


@routine
def _add_all(zero, square, from_zero, source, size):
    scores, added = view(zero, square), view(from_zero, source)
    for j in range(size):
        scores[j] += added[j]


# A square is the (N, N) matrix of one head in scratch memory, in the accumulator's type; if activations are narrower, also in their type,
# as an operand of products with rows of W >= N numbers, padded with zeros.
class Squares(NamedTuple):
    """A square as an operand of a product: the flags of the product, and W."""

    flags: int
    width: int


class Scores(NamedTuple):
    """The scale of the scores, the strides of the bias between samples and between heads (-1: no bias), and whether logits, probabilities
    and dl are written or, in backward, the gradients of logits and probabilities added."""

    scale: float
    bias_batch: int
    bias_head: int
    logits: int
    probabilities: int
    dl: int = 0


@kernel
def _forward(band, bands, method, squares, y, logits, probabilities, lse, qkv, bias, scratch, scores):
    B, N, _, H, D = qkv.shape
    zero, number = zero_of(lse), zero_of(qkv)
    item, size = item_bytes(number), item_bytes(zero)
    row, flags, W = 3 * H * D, squares.flags, squares.width
    scratch_address = scratch.ctypes.data + band * scratch.shape[1]
    address = scratch_address + scratch.shape[1] - N * N * size - (N * W * item if flags else 0)
    p_address = address + (N * N * size if flags else 0)
    for head in range(B * H * band // bands, B * H * (band + 1) // bands):
        b, h = head // H, head % H
        q = qkv.ctypes.data + (b * N * row + h * D) * item
        k, v = q + H * D * item, q + 2 * H * D * item
        plain_product(method, scratch_address, Size(N, N, D), Matrix(q, row, 1), Matrix(k, 1, row), Matrix(address, N, 1), 0)
        bias_address = bias.ctypes.data + (b * scores.bias_batch + h * scores.bias_head) * item
        _scale_and_bias(zero, address, N * N, scores.scale, number, bias_address, scores.bias_batch >= 0)
        square = head * N * N * item  # where this head's (N, N) begins
        if scores.logits:
            _copy_all(number, logits.ctypes.data + square, zero, address, N * N)
        for i in range(N):
            line = view(zero, address + i * N * size)
            top = highest(line, 0, N)
            for j in range(N):
                line[j] -= top
            lse[head * N + i] = top
        _exp_all(zero, address, N * N)
        for i in range(N):
            line, p = view(zero, address + i * N * size), view(number, p_address + i * W * item)
            total = zero
            for j in range(N):
                total += line[j]
            lse[head * N + i] += np.log(total)
            inverse = type(zero)(1) / total
            for j in range(N):
                p[j] = line[j] * inverse
            for j in range(N, W):
                p[j] = zero
            if scores.probabilities:
                out = view(number, probabilities.ctypes.data + square + i * N * item)
                for j in range(N):
                    out[j] = p[j]
        context = Matrix(y.ctypes.data + (b * N * H * D + h * D) * item, H * D, 1)
        plain_product(method, scratch_address, Size(N, D, N), Matrix(p_address, W, 1), Matrix(v, row, 1), context, flags)


@kernel
def _backward(band, bands, method, squares, dqkv, dl, dy, dlogits, dprobabilities, qkv, bias, lse, scratch, scores):
    B, N, _, H, D = qkv.shape
    zero, number = zero_of(lse), zero_of(qkv)
    item, size = item_bytes(number), item_bytes(zero)
    row, factor, flags, W = 3 * H * D, type(zero_of(lse))(scores.scale), squares.flags, squares.width
    scratch_address = scratch.ctypes.data + band * scratch.shape[1]
    p_address = scratch_address + scratch.shape[1] - 2 * N * N * size - (2 * N * W * item if flags else 0)
    g_address = p_address + N * N * size
    p_operand, g_operand = (g_address + N * N * size, g_address + N * N * size + N * W * item) if flags else (p_address, g_address)
    for head in range(B * H * band // bands, B * H * (band + 1) // bands):
        b, h = head // H, head % H
        shift = (b * N * row + h * D) * item
        q, dq = qkv.ctypes.data + shift, dqkv.ctypes.data + shift
        k, v = q + H * D * item, q + 2 * H * D * item
        dout = dy.ctypes.data + (b * N * H * D + h * D) * item
        square = head * N * N * item  # where this head's (N, N) begins
        plain_product(method, scratch_address, Size(N, N, D), Matrix(q, row, 1), Matrix(k, 1, row), Matrix(p_address, N, 1), 0)
        bias_address = bias.ctypes.data + (b * scores.bias_batch + h * scores.bias_head) * item
        _scale_and_bias(zero, p_address, N * N, scores.scale, number, bias_address, scores.bias_batch >= 0)
        for i in range(N):
            line, top = view(zero, p_address + i * N * size), lse[head * N + i]
            for j in range(N):
                line[j] -= top
        _exp_all(zero, p_address, N * N)
        if flags:
            for i in range(N):
                line, p = view(zero, p_address + i * N * size), view(number, p_operand + i * W * item)
                for j in range(N):
                    p[j] = line[j]
        dv = Matrix(dq + 2 * H * D * item, row, 1)
        plain_product(method, scratch_address, Size(N, D, N), Matrix(p_operand, 1, W), Matrix(dout, H * D, 1), dv, flags & ~PADDED)
        plain_product(method, scratch_address, Size(N, N, D), Matrix(dout, H * D, 1), Matrix(v, 1, row), Matrix(g_address, N, 1), 0)
        if scores.probabilities:
            _add_all(zero, g_address, number, dprobabilities.ctypes.data + square, N * N)
        for i in range(N):
            line, g = view(zero, p_address + i * N * size), view(zero, g_address + i * N * size)
            total = zero
            for j in range(N):
                total += line[j] * g[j]
            for j in range(N):
                g[j] = line[j] * (g[j] - total)
        if scores.logits:
            _add_all(zero, g_address, number, dlogits.ctypes.data + square, N * N)
        if scores.dl:
            _copy_all(number, dl.ctypes.data + square, zero, g_address, N * N)
        for i in range(N):
            g, operand = view(zero, g_address + i * N * size), view(number, g_operand + i * W * item)
            for j in range(N):
                operand[j] = g[j] * factor
            for j in range(N, W):
                operand[j] = zero
        plain_product(method, scratch_address, Size(N, D, N), Matrix(g_operand, W, 1), Matrix(k, row, 1), Matrix(dq, row, 1), flags)
        dk = Matrix(dq + H * D * item, row, 1)
        plain_product(method, scratch_address, Size(N, D, N), Matrix(g_operand, 1, W), Matrix(q, row, 1), dk, flags & ~PADDED)


def _products(qkv, squares):
    """The method and operand format of the products, and per band the scratch memory of a product and of `squares` squares."""
    B, N, _, H, D = qkv.shape
    tile, width, flags = tile_of(qkv.dtype), N, 0
    scratch_size = scratch_bytes(tile, N, max(N, D), max(N, D)) + squares * N * N * tile.accumulator.itemsize
    method = Method(product_entry(tile), finish_entry(tile.accumulator, qkv.dtype) if qkv.dtype != tile.accumulator else 0)
    if qkv.dtype != tile.accumulator:
        flags = CONVERT | PADDED
        width = -(-N // (tile.per_cell * tile.step)) * tile.per_cell * tile.step
        scratch_size += squares * N * width * qkv.itemsize
    scratch = empty((min(threads(), B * H), -(-scratch_size // 64) * 64), np.uint8)
    return method, Squares(flags, width), scratch


def _bias_steps(bias: np.ndarray | None, shape: Shape) -> tuple[int, int]:
    """Strides of the bias between samples and between heads, in elements; -1 for both if there is no bias."""
    if bias is None:
        return -1, -1
    N = shape[1]
    return (0 if bias.shape[0] == 1 else bias.shape[1] * N * N), (0 if bias.shape[1] == 1 else N * N)


def _flat(array, placeholder):
    return (placeholder if array is None else array).reshape(-1)


def forward_cpu(y, logits, probabilities, lse, qkv, bias, scale, keep_logits, keep_probabilities):
    method, squares, scratch = _products(qkv, 1)
    scores = Scores(float(scale), *_bias_steps(bias, qkv.shape), keep_logits, keep_probabilities)
    outputs = y.reshape(-1), _flat(logits, y), _flat(probabilities, y), lse.reshape(-1)
    launch(_forward, len(scratch), method, squares, *outputs, qkv, _flat(bias, y), scratch, scores)


def backward_cpu(dqkv, dbias, dy, dlogits, dprobabilities, qkv, bias, lse, scale, keep_logits, keep_probabilities):
    B, N, _, H, D = qkv.shape
    dqkv = empty_like(qkv) if dqkv is None else dqkv
    if dy is None:
        dy = empty((B, N, H, D), qkv.dtype)
        cpu.fill(dy, 0.0)
    unbroadcast = bias is not None and bias.shape == (B, H, N, N)
    dl = None if dbias is None else dbias if unbroadcast else empty((B, H, N, N), qkv.dtype)
    method, squares, scratch = _products(qkv, 2)
    scores = Scores(float(scale), *_bias_steps(bias, qkv.shape), dlogits is not None, dprobabilities is not None, dl is not None)
    gradients = dy.reshape(-1), _flat(dlogits, dy), _flat(dprobabilities, dy)
    inputs = qkv, _flat(bias, dy), lse.reshape(-1)
    launch(_backward, len(scratch), method, squares, dqkv.reshape(-1), _flat(dl, dqkv), *gradients, *inputs, scratch, scores)
    if dbias is not None and dl is not None and not unbroadcast:
        cpu.sum_into(dbias, dl)


# ------------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("attention")
HEAD_SIZES = (16, 32, 48, 64, 96, 128)  # of the kernels; other head sizes use the next larger one
BLOCK_BYTES = 99 * 1024  # shared memory per block, available on every GPU since compute capability 8.0
BLOCK_WARPS = 8  # at most, per block
FORWARD_TILE, BACKWARD_TILE = 64, 32  # rows at most, where there are several: see attention.cu


def _tile(dtype, padded):
    """The constant TILE of attention.cu."""
    if dtype.itemsize == 2:
        return 32 if padded > 64 else 80
    return 16 if padded > 64 or dtype.itemsize == 8 else 32


def _grid(qkv, owned, most):
    """(D of the kernels, Grid, whether a tile holds all tokens) for blocks that hold their rows of `owned` of a head's four matrices.

    Of two others they hold a pair of tiles or, where there are several, of at most `most` rows, two pairs: one is copied meanwhile.
    """
    B, N, _, H, D = qkv.shape
    if HEAD_SIZES[-1] < D:
        raise UserError(f"attention: on a GPU a head has at most {HEAD_SIZES[-1]} channels, not {D}: take more heads")
    padded = next(size for size in HEAD_SIZES if size >= D)
    line = padded * qkv.itemsize + 16
    tile = _tile(qkv.dtype, padded)
    one = tile >= N
    rows = 2 * tile if one else 4 * min(tile, most)
    max_warps = min(BLOCK_WARPS, (BLOCK_BYTES - rows * line) // (16 * owned * line))
    groups = -(-N // 16)  # groups of 16 rows, one per warp
    blocks = -(-groups // max_warps)  # per head
    warps = -(-groups // blocks)
    return padded, Grid(B * H * -(-N // (16 * warps)), 32 * warps, (16 * warps * owned + rows) * line), one


def forward_cuda(y, logits, probabilities, lse, qkv, bias, scale, keep_logits, keep_probabilities):
    _, N, _, H, D = qkv.shape
    padded, grid, one = _grid(qkv, 1, FORWARD_TILE)
    launch(
        _source("attention_forward", qkv.dtype, padded, one),
        grid,
        y,
        logits,
        probabilities,
        lse,
        qkv,
        bias,
        *_bias_steps(bias, qkv.shape),
        N,
        H,
        D,
        float(scale),
    )


def backward_cuda(dqkv, dbias, dy, dlogits, dprobabilities, qkv, bias, lse, scale, keep_logits, keep_probabilities):
    B, N, _, H, D = qkv.shape
    unbroadcast = bias is not None and bias.shape == (B, H, N, N)
    dl = None if dbias is None else dbias if unbroadcast else empty((B, H, N, N), qkv.dtype, "cuda")
    padded, grid, one = _grid(qkv, 2, BACKWARD_TILE)
    inputs = dy, dlogits, dprobabilities, qkv, bias, lse, *_bias_steps(bias, qkv.shape), N, H, D, float(scale)
    if qkv.dtype == BFLOAT16 and one:
        rows = -(-N // 16) * 16
        shared = 4 * rows * (2 * padded + 16) + 2 * rows * (2 * rows + 16)  # of q, k, v, dy; of p, dl
        launch(_source("attention_backward_head", qkv.dtype, padded), Grid(B * H, 2 * rows, shared), dqkv, dl, *inputs)
    else:
        delta = empty_like(lse)
        launch(_source("attention_backward_queries", qkv.dtype, padded), grid, dqkv, dl, delta, *inputs)
        if dqkv is not None:
            launch(_source("attention_backward_keys", qkv.dtype, padded), grid, dqkv, delta, *inputs)
    if dbias is not None and dl is not None and not unbroadcast:
        cuda.sum_into(dbias, dl)


# ------------------------------------------------------------------------------------------------------------------------- spec
def _outputs(qkv, bias, scale, keep_logits, keep_probabilities):
    B, N, _, H, D = qkv
    square = (B, H, N, N)
    if bias is not None:
        require("attention", bias=(bias, (1 if bias[0] == 1 else B, 1 if bias[1] == 1 else H, N, N)))
    return {
        "y": (B, N, H, D),
        "logits": square if keep_logits else None,
        "probabilities": square if keep_probabilities else None,
        "lse": Float32Output((B, H, N)),
    }


def _cost(qkv, *_):
    B, N, _, H, D = qkv
    return Cost(forward=B * H * N * N * (4 * D + 5), backward=B * H * N * N * (10 * D + 8), macs=2 * B * H * N * N * D)


attention = Op(
    "attention",
    shapes={"qkv": "B N 3 H D", "bias": "B H N N"},
    accepts={"bias": "1|B 1|H N N"},
    constants={"scale": 0.5, "keep_logits": False, "keep_probabilities": False},
    outputs=_outputs,
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    results=("y", "logits", "probabilities"),
    saves=("qkv", "bias", "lse"),
    cases=[
        dict(B=2, N=5, H=3, D=4),
        dict(B=2, N=7, H=2, D=5, bias="1 H N N", keep_logits=True, keep_probabilities=True),
        dict(B=3, N=6, H=2, D=3, bias="B 1 N N", keep_logits=True),
        dict(B=2, N=17, H=3, D=16, bias=None, keep_probabilities=True),
        dict(B=2, N=19, H=2, qkv="B N 3 H 72", bias="1 H N N"),
        dict(B=1, N=33, H=2, qkv="B N 3 H 120", bias=None, keep_logits=True),
        dict(B=1, N=101, H=2, D=24, bias="1 H N N", keep_probabilities=True),
        dict(B=64, N=65, H=3, D=64, bias=None, scale=0.125),
    ],
    cost=_cost,
)
