"""Patches of images as rows, and the adjoint; with it a patch projection is a matrix product (2010.11929, section 3.1).

    y[b, u, v, (c, i, j)] = x[b, c, u·sh + i - ph, v·sw + j - pw],  0 outside the image

    dx[b, c, h, w] = Σ dy[b, u, v, (c, i, j)]  over u·sh + i = h + ph,  v·sw + j = w + pw

Backward loops over rows of the image, and a band owns whole rows, so that overlapping patches are summed by one thread. With channels_last,
x is (B, H, W, C), as tokens are; the order within a patch is the same.

Letters: B batch, C channels, (H, W) image, (U, V) grid, kernel (kh, kw), stride (sh, sw), padding (ph, pw).
"""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np

from .core.op import Cost, Implementation, Op, Shape
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.strided import bands_for, in_float32
from .cuda.kernel import Source
from .cuda.strided import grid_for, vector_width

Pair = tuple[int, int]
LINE = 8  # elements of a line of a patch, from which on lines are copied, and not all elements gathered


def _axes(images: Shape, channels_last: bool) -> tuple[int, int, int, int]:
    """B, C, H, W of the shape of images."""
    B, *rest = images
    C, H, W = (rest[2], *rest[:2]) if channels_last else rest
    return B, C, H, W


def _steps(C: int, H: int, W: int, channels_last: bool) -> tuple[int, int]:
    """How many elements are from one channel to the next, and from one column to the next."""
    return (1, C) if channels_last else (H * W, 1)


def _shape(images: Shape, kernel: Pair, stride: Pair, padding: Pair, channels_last: bool) -> Shape:
    if min(*kernel, *stride) < 1 or min(padding) < 0:
        raise ValueError(f"unfold: kernel {kernel} and stride {stride} must be at least 1, padding {padding} at least 0")
    B, C, *size = _axes(images, channels_last)
    grid = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding)]
    if min(grid) < 1:
        raise ValueError(f"unfold: patches of {kernel} do not fit into images of {tuple(size)} with padding {padding}")
    return B, *grid, C * prod(kernel)


# -------------------------------------------------------------------------------------------------------------- reference
def _patches(padded: np.ndarray, kernel: Pair, stride: Pair) -> np.ndarray:
    """A view (B, U, V, C, kh, kw) of padded images (B, C, ...)."""
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, (2, 3), writeable=True)
    return windows[:, :, :: stride[0], :: stride[1]].transpose(0, 2, 3, 1, 4, 5)


def forward_reference(y, images, kernel, stride, padding, channels_last):
    images = images.transpose(0, 3, 1, 2) if channels_last else images
    padded = np.pad(images, [(0, 0), (0, 0), *((p, p) for p in padding)])
    y[...] = _patches(padded, kernel, stride).reshape(y.shape)


def backward_reference(dimages, dy, kernel, stride, padding, channels_last):
    dimages = dimages.transpose(0, 3, 1, 2) if channels_last else dimages
    B, C, H, W = dimages.shape
    ph, pw = padding
    padded = np.zeros((B, C, H + 2 * ph, W + 2 * pw), dy.dtype)
    patches = _patches(padded, kernel, stride)
    for i, j in np.ndindex(*kernel):
        patches[..., i, j] += dy.reshape(patches.shape)[..., i, j]
    dimages[...] = padded[:, :, ph : ph + H, pw : pw + W]


# -------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _unfold_lines(band, bands, y, x, kh, kw, sh, sw, ph, pw):
    B, C, H, W = x.shape
    U, V = y.shape[1], y.shape[2]
    for row in range(band * B * U // bands, (band + 1) * B * U // bands):
        b, u = row // U, row % U
        for line in range(C * kh):
            c, h = line // kh, u * sh + line % kh - ph
            inside = 0 <= h < H
            for v in range(V):
                first, y_start = v * sw - pw, line * kw
                if inside and first >= 0 and first + kw <= W:
                    for j in range(kw):
                        y[b, u, v, np.uint64(y_start + j)] = x[b, c, h, np.uint64(first + j)]
                else:
                    for j in range(kw):
                        w = first + j
                        y[b, u, v, y_start + j] = x[b, c, h, w] if inside and 0 <= w < W else 0


@kernel
def _unfold(band, bands, y, x, offsets, H, W, channel, step, kh, kw, sh, sw, ph, pw):
    B, U, V, size = y.shape  # x (B, C·H·W): `channel` and `step` elements from one channel, and one column, to the next
    for row in range(band * B * U // bands, (band + 1) * B * U // bands):
        b, u = row // U, row % U
        for v in range(V):
            h, w = u * sh - ph, v * sw - pw
            start = (h * W + w) * step
            inside = h >= 0 and w >= 0 and h + kh <= H and w + kw <= W
            if inside:
                for t in range(size):  # unsigned indices: no test for negative ones
                    y[b, u, v, np.uint64(t)] = x[b, np.uint64(start + offsets[t])]
            else:
                for part in range(kh * kw):
                    i, j = h + part // kw, w + part % kw
                    if 0 <= i < H and 0 <= j < W:
                        for c in range(size // (kh * kw)):
                            y[b, u, v, np.uint64(c * kh * kw + part)] = x[b, np.uint64((i * W + j) * step + c * channel)]
                    else:
                        for c in range(size // (kh * kw)):
                            y[b, u, v, np.uint64(c * kh * kw + part)] = 0


@kernel
def _fold(band, bands, dx, dy, kh, kw, sh, sw, ph, pw):
    B, C, H, W = dx.shape
    U, V = dy.shape[1], dy.shape[2]
    for row in range(band * B * H // bands, (band + 1) * B * H // bands):
        b, h = row // H, row % H
        for c in range(C):
            for w in range(W):
                dx[b, c, h, w] = 0
            for i in range((h + ph) % sh, kh, sh):  # the lines of a patch that can coincide with row h
                u = (h + ph - i) // sh
                if 0 <= u < U:
                    for v in range(V):
                        first, y_start = v * sw - pw, (c * kh + i) * kw
                        for j in range(max(0, -first), min(kw, W - first)):
                            dx[b, c, h, np.uint64(first + j)] += dy[b, u, v, np.uint64(y_start + j)]


@kernel
def _fold_tokens(band, bands, dx, dy, kh, kw, sh, sw, ph, pw):
    B, H, W, C = dx.shape
    U, V, size = dy.shape[1], dy.shape[2], kh * kw
    for row in range(band * B * H // bands, (band + 1) * B * H // bands):
        b, h = row // H, row % H
        for w in range(W):
            for c in range(C):
                dx[b, h, w, np.uint64(c)] = 0
            for i in range((h + ph) % sh, kh, sh):  # the lines and columns of a patch that can coincide with this token
                for j in range((w + pw) % sw, kw, sw):
                    u, v = (h + ph - i) // sh, (w + pw - j) // sw
                    if 0 <= u < U and 0 <= v < V:
                        for c in range(C):
                            dx[b, h, w, np.uint64(c)] += dy[b, u, v, np.uint64(c * size + i * kw + j)]


@cache
def _offsets(C: int, W: int, channel: int, step: int, kernel: Pair) -> np.ndarray:
    """Where the elements of a patch lie in a sample, in elements from the first; int32, of which a CPU gathers more at once."""
    c, i, j = np.ogrid[:C, : kernel[0], : kernel[1]]
    return (c * channel + (i * W + j) * step).astype(np.int32).reshape(-1)


def forward_cpu(y, images, kernel, stride, padding, channels_last):
    B, C, H, W = _axes(images.shape, channels_last)
    if not channels_last and kernel[1] >= LINE:
        launch(_unfold_lines, bands_for(y.size), y, images, *kernel, *stride, *padding)
        return
    channel, step = _steps(C, H, W, channels_last)
    offsets = _offsets(C, W, channel, step, kernel)
    launch(_unfold, bands_for(y.size), y, images.reshape(B, -1), offsets, H, W, channel, step, *kernel, *stride, *padding)


@in_float32(outputs=1)
def backward_cpu(dimages, dy, kernel, stride, padding, channels_last):
    launch(_fold_tokens if channels_last else _fold, bands_for(dy.size), dimages, dy, *kernel, *stride, *padding)


# ------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("unfold")


def _sizes(images, y, kernel, stride, padding, channels_last):
    """The numbers that both kernels take."""
    B, C, H, W = _axes(images.shape, channels_last)
    return B, C, H, W, *_steps(C, H, W, channels_last), *y.shape[1:3], *kernel, *stride, *padding


def forward_cuda(y, images, *constants):
    width = vector_width(constants[0][1], y)
    launch(_source("unfold", y.dtype, width), grid_for(y.size // width), y, images, *_sizes(images, y, *constants))


def backward_cuda(dimages, dy, *constants):
    launch(_source("fold", dy.dtype), grid_for(dimages.size), dimages, dy, *_sizes(dimages, dy, *constants))


# ------------------------------------------------------------------------------------------------------------------- spec
unfold = Op(
    "unfold",
    shapes={"images": "B C H W"},
    constants={"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "channels_last": False},
    outputs=lambda *arguments: {"y": _shape(*arguments)},
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    cases=[
        dict(images="B C U*kernel[0] V*kernel[1]", B=2, C=3, U=2, V=3, kernel=(4, 2), stride=(4, 2)),
        dict(images="B C H+6 W+3", B=2, C=2, H=5, W=4, kernel=(7, 4), stride=(4, 3), padding=(2, 1)),
        dict(images="B C H W", B=1, C=1, H=3, W=5, kernel=(3, 3), padding=(1, 1)),
        dict(images="B C H+1 W", B=3, C=2, H=6, W=9, kernel=(2, 1), stride=(3, 4)),
        dict(images="B C H W+8", B=2, C=2, H=4, W=5, kernel=(2, 9), stride=(2, 3), padding=(1, 1)),
        dict(images="B H W C", B=2, H=7, W=5, C=3, kernel=(3, 2), stride=(2, 1), padding=(1, 1), channels_last=True),
        dict(images="B H+6 W C", B=1, H=5, W=8, C=17, kernel=(2, 4), stride=(3, 3), padding=(0, 2), channels_last=True),
        dict(images="B H H C", B=64, H=16, C=64, kernel=(3, 3), stride=(2, 2), padding=(1, 1), channels_last=True),
        dict(images="B C U*4 V*4", B=64, C=3, U=8, V=8, kernel=(4, 4), stride=(4, 4)),
    ],
    cost=lambda *_: Cost(forward=0, backward=0),
)
