"""Resampling the tokens of a grid to another grid, as a sparse linear map along the token axis.

With R (new, old) the weights between the grid's rows, and Q those between its columns,

    y[a, (i, j), c] = Σ over k, l of R[i, k]·Q[j, l]·x[a, (k, l), c],       so y = S·x with S = R ⊗ Q,       dx = Sᵀ·dy

Grids are (rows, columns). R and Q have few nonzero weights in a row, so S is stored in CSR format, as (starts, indices, weights): row i has
the weights from starts[i] up to starts[i + 1], for the tokens `indices`. Sᵀ is stored likewise, and the same kernels run backward. A class
token before the patches is one more row and column: of zeros ("zero": that of x is not read, that of y is zero), or with a single 1
("keep").

If the axis is the last one (C = 1: the keys of an attention map, a channel-first position grid), a block of LANES rows is transposed, so
that each weight multiplies whole vectors there too.

Letters: A size before the axis, N old tokens, M new tokens, C size after the axis.
"""

from __future__ import annotations

from functools import cache
from math import floor, prod
from typing import Any, NamedTuple

import numpy as np

from .core.arrays import constant, empty
from .core.devices import runtime
from .core.dtypes import accumulator_dtype
from .core.op import Cost, Implementation, Op, Shape, require
from .core.recording import launch
from .cpu.kernel import kernel
from .cpu.strided import bands_for, in_float32
from .cuda.kernel import Source
from .cuda.strided import grid_for, vector_width

METHODS = ("bicubic_antialias", "bicubic", "bilinear", "upsample")
CLASS_TOKENS = {"none": 0, "zero": 1, "keep": 1}  # number of class tokens before the patches
Grid2 = tuple[int, int]  # (rows, columns)
LANES = 64  # rows in a block: 16 kB for 65 tokens in float32


# ------------------------------------------------------------------------------------------------------------------ weights
def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' convolution kernel (1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def axis_matrix(old: int, new: int, method: str) -> np.ndarray:
    """R (new, old): a row or a column of the grid is resampled by R @ row.

    "bicubic_antialias"   Keys' cubic, a = -1/2, widened when downsampling, truncated and normalised at the border: timm
    "bicubic"             Keys' cubic, a = -3/4, never widened, positions clamped to the border: DeiT, T2T
    "bilinear"            the triangle filter, likewise: timm's import of Google's checkpoints, and 2105.02723 in every forward
    "upsample"            each pixel repeated twice, then the mean of each new bin, from ⌊2·old·i / new⌋ up to ⌈2·old·(i + 1) / new⌉:
                          2105.15075

    The first three have the weights of PyTorch's `interpolate(align_corners=False)`, "upsample" those of `Upsample(scale_factor=2)` and
    `adaptive_avg_pool2d` in sequence. Raises ValueError for any other method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new  # in units of old pixels, whose centres are at 1/2, 3/2, ...
        if method == "bicubic_antialias":
            width = max(old / new, 1.0)
            first, last = max(int(centre - 2 * width + 0.5), 0), min(int(centre + 2 * width + 0.5), old)
            weights = _cubic((np.arange(first, last) + 0.5 - centre) / width, -0.5)
            matrix[i, first:last] = weights / weights.sum()
        elif method == "bicubic":
            taps = floor(centre - 0.5) + np.arange(-1, 3)
            np.add.at(matrix[i], taps.clip(0, old - 1), _cubic(taps + 0.5 - centre, -0.75))
        elif method == "bilinear":
            taps = floor(centre - 0.5) + np.arange(2)
            np.add.at(matrix[i], taps.clip(0, old - 1), 1 - np.abs(taps + 0.5 - centre))
        else:
            taps = np.arange(2 * old * i // new, -(-2 * old * (i + 1) // new))
            np.add.at(matrix[i], taps // 2, 1 / len(taps))
    return matrix


def matrices(old: Grid2, new: Grid2, method: str) -> tuple[np.ndarray, np.ndarray]:
    """R and Q: the weights between rows, and between columns."""
    return axis_matrix(old[0], new[0], method), axis_matrix(old[1], new[1], method)


def resample_grid(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """x (A, tokens, C) resampled along both axes of its grid by R and Q: (A, new tokens, C)."""
    grid = x.reshape(len(x), rows.shape[1], columns.shape[1], -1)
    return np.einsum("ik,jl,aklc->aijc", rows, columns, grid, optimize=True).reshape(len(x), len(rows) * len(columns), -1)


class Taps(NamedTuple):
    """A sparse matrix in CSR format."""

    starts: np.ndarray  # (rows + 1,), int64
    indices: np.ndarray  # (nonzero weights,), int64: their columns
    weights: np.ndarray


@cache
def taps(old: Grid2, new: Grid2, method: str, class_token: str, transposed: bool, dtype: str) -> Taps:
    """S or Sᵀ, including the class token; see the module docstring."""
    prefix = CLASS_TOKENS[class_token]
    of_rows, of_columns = matrices(old, new, method)
    (i, k), (j, m) = np.nonzero(of_rows), np.nonzero(of_columns)
    rows = np.add.outer(i * new[1], j).reshape(-1) + prefix
    columns = np.add.outer(k * old[1], m).reshape(-1) + prefix
    weights = np.multiply.outer(of_rows[i, k], of_columns[j, m]).reshape(-1)
    if class_token == "keep":
        rows, columns, weights = np.append(rows, 0), np.append(columns, 0), np.append(weights, 1.0)
    row_count = prefix + prod(new)
    if transposed:
        rows, columns, row_count = columns, rows, prefix + prod(old)
    order = np.lexsort((columns, rows))
    starts = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=row_count))))
    return Taps(starts, columns[order], weights[order].astype(dtype))


# ---------------------------------------------------------------------------------------------------------------- reference
def _map_reference(y, x, rows, columns, class_token):
    prefix = CLASS_TOKENS[class_token]
    y[:, :prefix] = x[:, :prefix] if class_token == "keep" else 0
    y[:, prefix:] = resample_grid(x[:, prefix:], rows.astype(x.dtype), columns.astype(x.dtype))


def forward_reference(y, x, old, new, method, class_token):
    _map_reference(y, x, *matrices(old, new, method), class_token)


def backward_reference(dx, dy, old, new, method, class_token):
    rows, columns = matrices(old, new, method)
    _map_reference(dx, dy, rows.T, columns.T, class_token)


# ---------------------------------------------------------------------------------------------------------------------- CPU
@kernel
def _map_columns(band, bands, y, x, starts, indices, weights):
    A, M, C = y.shape
    for item in range(band * A * M // bands, (band + 1) * A * M // bands):
        a, i = item // M, item % M
        for c in range(C):
            y[a, i, np.uint64(c)] = 0
        for tap in range(starts[i], starts[i + 1]):
            n, weight = indices[tap], weights[tap]
            for c in range(C):
                y[a, i, np.uint64(c)] += weight * x[a, n, np.uint64(c)]


@kernel
def _map_rows(band, bands, y, x, blocks, sums, starts, indices, weights):
    A, M = y.shape
    block, total = blocks[band], sums[band]  # (N, lanes), (lanes,); lanes beyond the last row are undefined
    N, lanes = block.shape
    parts = (A + lanes - 1) // lanes
    for part in range(band * parts // bands, (band + 1) * parts // bands):
        first = part * lanes
        rows = min(lanes, A - first)
        for a in range(rows):
            for n in range(N):
                block[n, a] = x[first + a, n]
        for i in range(M):
            for a in range(lanes):
                total[np.uint64(a)] = 0
            for tap in range(starts[i], starts[i + 1]):
                n, weight = indices[tap], weights[tap]
                for a in range(lanes):
                    total[np.uint64(a)] += weight * block[n, np.uint64(a)]
            for a in range(rows):
                y[first + a, i] = total[a]


def _map_cpu(y: np.ndarray, x: np.ndarray, matrix: Taps) -> None:
    bands = bands_for(y.size)
    if y.shape[2] > 1:
        launch(_map_columns, bands, y, x, *matrix)
    else:
        blocks, sums = empty((bands, x.shape[1], LANES), x.dtype), empty((bands, LANES), x.dtype)
        launch(_map_rows, bands, y.reshape(y.shape[:2]), x.reshape(x.shape[:2]), blocks, sums, *matrix)


@in_float32(outputs=1)
def forward_cpu(y, x, old, new, method, class_token):
    _map_cpu(y, x, taps(old, new, method, class_token, False, x.dtype.name))


@in_float32(outputs=1)
def backward_cpu(dx, dy, old, new, method, class_token):
    _map_cpu(dx, dy, taps(old, new, method, class_token, True, dy.dtype.name))


# --------------------------------------------------------------------------------------------------------------------- CUDA
_source = Source("resample")


@cache
def _device_taps(runtime: Any, *which: Any) -> tuple[Any, ...]:
    """`taps` on a GPU."""
    return tuple(constant(table, "cuda") for table in taps(*which))


def _map_cuda(y: Any, x: Any, *which: Any) -> None:
    _, M, C = y.shape
    width = vector_width(C, y, x)
    gpu: Any = runtime()
    device_taps = _device_taps(gpu, *which, accumulator_dtype(x.dtype).name)
    launch(_source("resample", x.dtype, width), grid_for(y.size // width), y, x, *device_taps, y.size // width, x.shape[1], M, C)


def forward_cuda(y, x, old, new, method, class_token):
    _map_cuda(y, x, old, new, method, class_token, False)


def backward_cuda(dx, dy, old, new, method, class_token):
    _map_cuda(dx, dy, old, new, method, class_token, True)


# --------------------------------------------------------------------------------------------------------------------- spec
def _outputs(x: Shape, old: Grid2, new: Grid2, method: str, class_token: str) -> dict[str, Shape]:
    if min(*old, *new) < 1:
        raise ValueError(f"resample: grids of {old} and {new} rows and columns")
    prefix = CLASS_TOKENS[class_token]
    require("resample", x=(x, (x[0], prefix + prod(old), x[-1])))
    return {"y": (x[0], prefix + prod(new), x[2])}


def _cost(x: Shape, old: Grid2, new: Grid2, method: str, class_token: str) -> Cost:
    operations = 2 * x[0] * len(taps(old, new, method, class_token, False, "float64").indices) * x[2]
    # As counted by 2105.15075: the output of the repetition and the input of the mean, which have the same size.
    return Cost(operations, operations, macs=8 * x[0] * prod(old) * x[2] if method == "upsample" else 0)


resample = Op(
    "resample",
    shapes={"x": "A old[0]*old[1] C"},
    accepts={"x": "A N C"},
    constants={"old": (2, 2), "new": (3, 3), "method": "upsample", "class_token": "none"},
    choices={"method": METHODS, "class_token": CLASS_TOKENS},
    outputs=_outputs,
    forward=Implementation(forward_reference, forward_cpu, forward_cuda),
    backward=Implementation(backward_reference, backward_cpu, backward_cuda),
    cases=[
        dict(A=2, C=5, old=(3, 3), new=(5, 5)),
        dict(A=2, C=5, old=(3, 4), new=(5, 2)),
        dict(x="A old[0]*old[1]+1 C", A=3, C=1, old=(7, 7), new=(10, 10), class_token="zero"),
        dict(x="A old[0]*old[1]+1 C", A=2, C=7, old=(7, 5), new=(10, 8), class_token="keep"),
        dict(x="A old[0]*old[1]+1 C", A=70, C=1, old=(3, 2), new=(4, 6), class_token="keep"),
        dict(A=2, C=3, old=(6, 6), new=(3, 3), method="bilinear"),
        dict(x="A old[0]*old[1]+1 C", A=1, C=1, old=(1, 1), new=(3, 3), method="bilinear", class_token="zero"),
        dict(A=131, C=1, old=(5, 3), new=(2, 4), method="bicubic"),
        dict(A=2, C=4, old=(5, 5), new=(3, 3), method="bicubic_antialias"),
        dict(x="A old[0]*old[1]+1 C", A=64, C=48, old=(7, 7), new=(10, 10), class_token="zero"),
        dict(x="A old[0]*old[1]+1 C", A=500, C=1, old=(7, 7), new=(10, 10), class_token="keep"),
    ],
    cost=_cost,
)
