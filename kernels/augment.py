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

from .core.arrays import empty
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
ZERO, ONE = np.float32(0), np.float32(1)  # 1 - x would make x a double
PER_BAND = 1 << 14  # numbers of the result that one thread makes sooner than it can wake another


@routine
def _axis(position, size):
    """The two pixels around a position on an axis, and their weights: 0 outside the image."""
    zero = position * ZERO
    if not -ONE < position < np.float32(size):  # also NaN
        return 0, 0, zero, zero
    floor = np.floor(position)
    below, part = int(floor), position - floor
    return max(below, 0), min(below + 1, size - 1), (ONE - part if below >= 0 else zero), (part if below + 1 < size else zero)


@routine
def _between(image, top, bottom, left, right, channel, w_top, w_bottom, w_left, w_right):
    """A channel of the mean of four pixels, by the weights of their rows and columns."""
    above = w_left * image[top, left, channel] + w_right * image[top, right, channel]
    below = w_left * image[bottom, left, channel] + w_right * image[bottom, right, channel]
    return w_top * above + w_bottom * below


@routine
def _sample(planes, image, matrix, i, box, outside, inside, unit):
    """Row i of an image (H, W, C), warped by a matrix, as planes (C + 1, W): each channel times the share of the pixel and
    the unit, then that share, which is `inside` in a box and `outside` elsewhere.
    """
    H, W, C = image.shape
    number = matrix.dtype.type
    begin, end = (box[1], box[3]) if box[0] <= i < box[2] else (0, 0)
    u, v = matrix[0, 1] * number(i) + matrix[0, 2], matrix[1, 1] * number(i) + matrix[1, 2]
    for j in range(W):
        share = inside if begin <= j < end else outside
        planes[C, j] = share
        weight = share * number(unit)
        left, right, w_left, w_right = _axis(matrix[0, 0] * number(j) + u, W)
        top, bottom, w_top, w_bottom = _axis(matrix[1, 0] * number(j) + v, H)
        w_top, w_bottom = weight * w_top, weight * w_bottom
        if C == 3:  # so that this loop is unrolled
            for d in range(3):
                planes[d, j] = _between(image, top, bottom, left, right, d, w_top, w_bottom, w_left, w_right)
        else:
            for d in range(C):
                planes[d, j] = _between(image, top, bottom, left, right, d, w_top, w_bottom, w_left, w_right)


@routine
def _recolour(y, planes, colours, first):
    """y (W,), one channel of a row: what its row (C + 1,) of a map of colours makes of planes, added unless this is the first image."""
    if first:
        y[:] = 0
    for d in range(len(colours)):
        factor, plane = colours[d], planes[d]
        for j in range(len(y)):
            y[j] += factor * plane[j]


@kernel
def _forward(band, bands, y, scratch, images, index, partner, matrices, colours, lam, boxes, holes, mean, std, unit):
    B, C, H, W = y.shape
    number = y.dtype.type
    planes = scratch[band]
    for row in range(band * B * H // bands, (band + 1) * B * H // bands):
        b, i = row // H, row % H
        box, hole = boxes[b], holes[b]
        mixed = lam[b] != 1 or box[0] <= i < box[2]
        for source in range(1 + mixed):
            s = partner[b] if source else b
            outside, inside = (number(1) - lam[b], number(1)) if source else (lam[b], number(0))
            _sample(planes, images[index[s]], matrices[s], i, box, outside, inside, unit)
            for c in range(C):
                _recolour(y[b, c, i], planes, colours[s, c], not source)
        for c in range(C):
            values, middle, scale = y[b, c, i], mean[c], std[c]
            for j in range(W):
                values[j] = (values[j] - middle) / scale
            if hole[0] <= i < hole[2]:
                values[hole[1] : hole[3]] = 0


def forward_cpu(y, images, index, partner, matrices, colours, lam, boxes, holes, mean, std):
    bands = min(threads(), -(-y.size // PER_BAND))
    scratch = empty((bands, 1 + y.shape[1], y.shape[3]), y.dtype)
    launch(_forward, bands, y, scratch, images, index, partner, matrices, colours, lam, boxes, holes, mean, std, unit(images))


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
