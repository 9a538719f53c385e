"""Patches of images as rows, and the adjoint; with it a patch projection is a matrix product (2010.11929, section 3.1).

    y[b, u, v, (c, i, j)] = x[b, c, u·sh + i - ph, v·sw + j - pw],  0 outside the image

    dx[b, c, h, w] = Σ dy[b, u, v, (c, i, j)]  over u·sh + i = h + ph,  v·sw + j = w + pw

Backward loops over rows of the image, and a band owns whole rows, so that overlapping patches are summed by one thread.

Letters: B batch, C channels, (H, W) image, (U, V) grid, kernel (kh, kw), stride (sh, sw), padding (ph, pw).
"""

from __future__ import annotations

from math import prod

import numpy as np

from .core.op import Cost, Implementation, Op, Shape
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.strided import bands_for, in_float32
from .cuda.kernel import Source
from .cuda.strided import grid_for, vector_width

Pair = tuple[int, int]


def _shape(images: Shape, kernel: Pair, stride: Pair, padding: Pair) -> Shape:
    if min(*kernel, *stride) < 1 or min(padding) < 0:
        raise ValueError(f"unfold: kernel {kernel} and stride {stride} must be at least 1, padding {padding} at least 0")
    B, C, *size = images
    grid = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding)]
    if min(grid) < 1:
        raise ValueError(f"unfold: patches of {kernel} do not fit into images of {tuple(size)} with padding {padding}")
    return B, *grid, C * prod(kernel)


# -------------------------------------------------------------------------------------------------------------- reference
def _patches(padded: np.ndarray, kernel: Pair, stride: Pair) -> np.ndarray:
    """A view (B, U, V, C, kh, kw) of padded images (B, C, ...)."""
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, (2, 3), writeable=True)
    return windows[:, :, :: stride[0], :: stride[1]].transpose(0, 2, 3, 1, 4, 5)


def forward_reference(y, images, kernel, stride, padding):
    padded = np.pad(images, [(0, 0), (0, 0), *((p, p) for p in padding)])
    y[...] = _patches(padded, kernel, stride).reshape(y.shape)


def backward_reference(dimages, dy, kernel, stride, padding):
    B, C, H, W = dimages.shape
    ph, pw = padding
    padded = np.zeros((B, C, H + 2 * ph, W + 2 * pw), dy.dtype)
    patches = _patches(padded, kernel, stride)
    for i, j in np.ndindex(*kernel):
        patches[..., i, j] += dy.reshape(patches.shape)[..., i, j]
    dimages[...] = padded[:, :, ph : ph + H, pw : pw + W]


# -------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _unfold(band, bands, y, x, kh, kw, sh, sw, ph, pw):
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


def forward_cpu(y, images, kernel, stride, padding):
    launch(_unfold, bands_for(y.size), y, images, *kernel, *stride, *padding)


@in_float32(outputs=1)
def backward_cpu(dimages, dy, kernel, stride, padding):
    launch(_fold, bands_for(dy.size), dimages, dy, *kernel, *stride, *padding)


# ------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("unfold")


def forward_cuda(y, images, kernel, stride, padding):
    B, C, H, W = images.shape
    width = vector_width(kernel[1], y)
    _, U, V, _ = y.shape
    launch(_source("unfold", y.dtype, width), grid_for(y.size // width), y, images, B, C, H, W, U, V, *kernel, *stride, *padding)


def backward_cuda(dimages, dy, kernel, stride, padding):
    B, C, H, W = dimages.shape
    _, U, V, _ = dy.shape
    launch(_source("fold", dy.dtype), grid_for(dimages.size), dimages, dy, B, C, H, W, U, V, *kernel, *stride, *padding)


# ------------------------------------------------------------------------------------------------------------------- spec
unfold = Op(
    "unfold",
    shapes={"images": "B C H W"},
    constants={"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0)},
    outputs=lambda images, kernel, stride, padding: {"y": _shape(images, kernel, stride, padding)},
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    cases=[
        dict(images="B C U*kernel[0] V*kernel[1]", B=2, C=3, U=2, V=3, kernel=(4, 2), stride=(4, 2)),
        dict(images="B C H+6 W+3", B=2, C=2, H=5, W=4, kernel=(7, 4), stride=(4, 3), padding=(2, 1)),
        dict(images="B C H W", B=1, C=1, H=3, W=5, kernel=(3, 3), padding=(1, 1)),
        dict(images="B C H+1 W", B=3, C=2, H=6, W=9, kernel=(2, 1), stride=(3, 4)),
        dict(images="B C U*4 V*4", B=64, C=3, U=8, V=8, kernel=(4, 4), stride=(4, 4)),
    ],
    cost=lambda images, kernel, stride, padding: Cost(forward=0, backward=0),
)
