"""Training images from stored images: geometry, colours, mixing, holes, normalisation and the change to channels first, in one pass.

Every crop, flip and affine warp is an affine map from an output pixel (j, i) to the position (u, v) in the stored image, in coordinates
whose integers are the pixel centres:

    (u, v) = M · (j, i, 1),     S(image, M)[i, j] = Σ over the four pixels (q, p) around (u, v) of (1 - |u - q|)·(1 - |v - p|)·image[p, q]

Pixels outside the image are 0 (black). For integers (u, v), one pixel has weight 1: such a map copies exactly. Stored bytes are scaled to
0..1. Brightness, contrast, saturation and hue are affine maps K (C, C+1) of a pixel's colour, T = K · (S, 1). Then two images are mixed:

    y[b] = (w·T(own) + (1 - w)·T(partner) - mean) / std,     w = 0 inside the sample's box, lam[b] elsewhere;     y[b] = 0 in its hole

so that mixup (Zhang et al., 1710.09412) is an empty box, CutMix (Yun et al., 1905.04899) is lam = 1, and no mixing is both. The partner of
b is another sample of the batch, with its own image, M and K; boxes and holes are (top, left, bottom, right), where bottom and right are
exclusive. There are no gradients.

Letters: n stored images, B batch, H, W height and width, C channels.
"""

from __future__ import annotations

from math import prod

import numpy as np

from .core.op import Cost, Implementation, Op
from .core.recording import launch
from .cpu.compile import routine
from .cpu.kernel import kernel
from .cpu.run import threads
from .cuda.kernel import Source
from .cuda.strided import grid_for


def unit(images: np.ndarray) -> float:
    """The factor that scales stored values to 0..1."""
    return 1 / 255 if images.dtype == np.uint8 else 1.0


# ---------------------------------------------------------------------------------------------------------------- reference
def sample_reference(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """S(image, M) of one image (H, W, C)."""
    H, W, C = image.shape
    padded = np.zeros((H + 2, W + 2, C), matrix.dtype)  # a black border represents everything outside
    padded[1:-1, 1:-1] = image
    i, j = np.mgrid[:H, :W]
    u, v = np.einsum("rk,khw->rhw", matrix, np.stack([j, i, np.ones_like(i)]).astype(matrix.dtype))
    u, v = np.clip(u, -1, W), np.clip(v, -1, H)
    q, p = np.floor(u).astype(int), np.floor(v).astype(int)
    total = np.zeros_like(padded[1:-1, 1:-1])  # (H, W, C)
    for dp in (0, 1):
        for dq in (0, 1):
            weight = (1 - abs(u - q - dq)) * (1 - abs(v - p - dp))  # (H, W)
            total += weight[..., None] * padded[np.minimum(p + dp, H) + 1, np.minimum(q + dq, W) + 1]
    return total


def forward_reference(y, images, index, partner, matrices, colours, lam, boxes, holes, mean, std):
    B, _, H, W = y.shape
    samples = np.stack([sample_reference(images[k], m) for k, m in zip(index, matrices)]) * y.dtype.type(unit(images))  # (B, H, W, C)
    samples = np.einsum("bhwd,bcd->bhwc", samples, colours[..., :-1]) + colours[:, None, None, :, -1]
    weight = np.broadcast_to(lam[:, None, None], (B, H, W)).copy()
    for b, (top, left, bottom, right) in enumerate(boxes):
        weight[b, top:bottom, left:right] = 0
    mixed = weight[..., None] * samples + (1 - weight[..., None]) * samples[partner]
    for b, (top, left, bottom, right) in enumerate(holes):
        mixed[b, top:bottom, left:right] = mean
    y[...] = ((mixed - mean) / std).transpose(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------- CPU
@routine
def _axis(position, size):
    """The two pixels around a position on an axis, and their weights: 0 outside the image."""
    zero = position * 0
    if not -1 < position < size:  # also NaN
        return 0, 0, zero, zero
    below = int(np.floor(position))
    part = position - np.floor(position)
    return max(below, 0), min(below + 1, size - 1), (1 - part if below >= 0 else zero), (part if below + 1 < size else zero)


@routine
def _inside(box, i, j):
    """Whether a pixel lies in a box."""
    return box[0] <= i < box[2] and box[1] <= j < box[3]


@kernel
def _forward(band, bands, y, images, index, partner, matrices, colours, lam, boxes, holes, mean, std, unit):
    B, C, H, W = y.shape
    number = y.dtype.type
    for row in range(band * B * H // bands, (band + 1) * B * H // bands):
        b, i = row // H, row % H
        for j in range(W):
            for c in range(C):
                y[b, c, i, j] = 0
            if _inside(holes[b], i, j):
                continue
            inside = _inside(boxes[b], i, j)
            weight = number(0) if inside else lam[b]
            for source in range(2):
                s = partner[b] if source else b
                share = number(1) - weight if source else weight
                if share != 0:
                    m, k = matrices[s], index[s]
                    left, right, w_left, w_right = _axis(m[0, 0] * number(j) + m[0, 1] * number(i) + m[0, 2], W)
                    top, bottom, w_top, w_bottom = _axis(m[1, 0] * number(j) + m[1, 1] * number(i) + m[1, 2], H)
                    for d in range(C):
                        above = w_left * images[k, top, left, d] + w_right * images[k, top, right, d]
                        below = w_left * images[k, bottom, left, d] + w_right * images[k, bottom, right, d]
                        value = share * (w_top * above + w_bottom * below) * number(unit)
                        for c in range(C):
                            y[b, c, i, j] += colours[s, c, d] * value
                    for c in range(C):
                        y[b, c, i, j] += share * colours[s, c, C]
            for c in range(C):
                y[b, c, i, j] = (y[b, c, i, j] - mean[c]) / std[c]


def forward_cpu(y, images, index, partner, matrices, colours, lam, boxes, holes, mean, std):
    launch(_forward, threads(), y, images, index, partner, matrices, colours, lam, boxes, holes, mean, std, unit(images))


# --------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("augment")


def forward_cuda(y, images, index, partner, matrices, colours, lam, boxes, holes, mean, std):
    launch(
        _source("augment", y.dtype, images.dtype),
        grid_for(y.size // y.shape[1]),
        y,
        images,
        index,
        partner,
        matrices,
        colours,
        lam,
        boxes,
        holes,
        mean,
        std,
        *y.shape,
        unit(images),
    )


# --------------------------------------------------------------------------------------------------------------------- spec
def _matrices(rng, shape, sizes):
    return np.eye(2, 3) + rng.normal(0, (0.1, 0.1, 1), shape)


def _boxes(rng, shape, sizes):
    corners = np.sort(rng.integers(0, (sizes["H"] + 1, sizes["W"] + 1), (shape[0], 2, 2)), axis=1)  # (B, 2, 2)
    return corners.reshape(shape)


augment = Op(
    "augment",
    shapes={
        "images": "n H W C",
        "index": "B",
        "partner": "B",
        "matrices": "B 2 3",
        "colours": "B C C+1",
        "lam": "B",
        "boxes": "B 4",
        "holes": "B 4",
        "mean": "C",
        "std": "C",
    },
    dtypes={"images": (np.uint8, np.float32, np.float64)} | {name: (np.int64,) for name in ("index", "partner", "boxes", "holes")},
    outputs=lambda images, index, *_: {"y": (*index, images[3], images[1], images[2])},
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    results=(),
    gradients=(),
    parameters=("matrices", "colours", "lam", "mean", "std"),
    cases=[dict(n=5, B=3, H=8, W=8, C=1), dict(n=300, B=64, H=32, W=32, C=3)],
    values={
        "images": lambda rng, shape, sizes: rng.integers(0, 256, shape, np.uint8),
        "index": lambda rng, shape, sizes: rng.integers(0, sizes["n"], shape),
        "partner": lambda rng, shape, sizes: rng.integers(0, sizes["B"], shape),
        "matrices": _matrices,
        "colours": lambda rng, shape, sizes: np.eye(*shape[1:]) + rng.normal(0, 0.1, shape),
        "lam": lambda rng, shape, sizes: rng.uniform(0, 1, shape),
        "boxes": _boxes,
        "holes": _boxes,
        "mean": lambda rng, shape, sizes: rng.uniform(0.3, 0.7, shape),
        "std": lambda rng, shape, sizes: rng.uniform(0.1, 0.4, shape),
    },
    cost=lambda images, index, *_: Cost(forward=(20 + 2 * images[3]) * index[0] * prod(images[1:])),
)
