"""Operands of products in 8 bits: each row of A and each column of B is rounded to 255 steps of a scale of its own.

    a[i, k] ≈ q[i, k]·s[i],  q[i, k] = round(a[i, k]·127 / max |a[i]|),  s[i] = max |a[i]| / 127        (B alike, by columns)
    a · b ≈ s[i]·(Σ q[i, k]·r[k, j])·t[j]

The sums are integers and exact, whether q and r are stored in 8 bits or in 16 (`cpu/tiles.py`), so a product has the same bits on any CPU.
The epilogue multiplies them by both scales. No data for calibration is needed, since the scales of activations are those of the row at hand
(as in LLM.int8, 2208.07339, section 2.1, without its outliers).
"""

from __future__ import annotations

import numpy as np

from ..core.arrays import empty
from ..core.recording import launch
from .compile import routine
from .kernel import kernel, preparation
from .packing import cells_of, panel_bytes, panel_offset, slice_cells
from .run import threads
from .tiles import Tile, lead_rows, packed_zero, raised, row_bytes, tile_per_cell, tile_width
from .views import view

LEVELS = 127.0
LEAST = 1e-30  # a row or column whose largest number is smaller counts as zero
NOT_FINITE = 0x7F800000  # bits of float32 from here on, without the sign, are those of infinity and NaN


@routine
def _scale(largest, place):
    """The scale of a row, by the bits of its largest number, which go to `place` as they are; what its numbers are multiplied by."""
    view(np.int32(0), place)[0] = largest
    number = view(np.float32(0), place)
    if largest >= NOT_FINITE:
        number[0] = np.float32(np.nan)
        return np.float32(0)
    if number[0] < np.float32(LEAST):
        number[0] = np.float32(0)
        return np.float32(0)
    factor = np.float32(LEVELS) / number[0]
    number[0] /= np.float32(LEVELS)
    return factor


@kernel
def _round_rows(band, bands, tile, rounded, scales, a):
    """rounded (R, padded), scales (R,), of a (R, depth) float32."""
    R, depth = a.shape
    for i in range(R * band // bands, R * (band + 1) // bands):
        row, bits = a[i], view(np.int32(0), a.ctypes.data + 4 * i * depth)
        largest = np.int32(0)
        for k in range(depth):
            largest = max(largest, bits[k] & np.int32(0x7FFFFFFF))
        factor = _scale(largest, scales.ctypes.data + 4 * i)
        out = rounded[i]
        for k in range(depth):
            out[k] = np.int32(np.rint(row[k] * factor) + np.float32(raised(tile)))
        for k in range(depth, rounded.shape[1]):
            out[k] = 0


def round_rows(tile: Tile, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(whole numbers (R, depth rounded up to whole cells) of the tile's storage, scales (R,)) of a (R, depth) float32."""
    rounded = empty((len(a), -(-a.shape[1] // tile.per_cell) * tile.per_cell), tile.storage)
    scales = empty((len(a),), np.float32)
    launch(_round_rows, threads(), tile, rounded, scales, a)
    return rounded, scales


@preparation
def _pack_rounded(band, bands, tile, panels, scales_start, source, row, column, depth, columns):
    """panels, and from `scales_start` on a scale for each column, of B (depth, columns) float32; row and column are strides of `source`."""
    width, per_cell, lead = tile_width(tile), tile_per_cell(tile), lead_rows(tile)
    panel_count, cells = (columns + width - 1) // width, cells_of(tile, depth)
    slice_depth = slice_cells(tile, cells)
    start, numbers = panels.ctypes.data, view(np.float32(0), source.ctypes.data)
    bits = view(np.int32(0), source.ctypes.data)
    for p in range(panel_count * band // bands, panel_count * (band + 1) // bands):
        for j in range(width):
            at, known = (p * width + j) * column, p * width + j < columns
            largest = np.int32(0)
            for k in range(depth if known else 0):
                largest = max(largest, bits[k * row + at] & np.int32(0x7FFFFFFF))
            factor = _scale(largest, start + scales_start + 4 * (p * width + j))
            for first in range(0, cells, slice_depth):
                place = start + panel_offset(tile, cells, slice_depth, panel_count, 0, first, p)
                panel, total = view(packed_zero(tile), place + lead * row_bytes(tile)), np.int32(0)
                for k in range(per_cell * min(slice_depth, cells - first)):
                    inside = known and per_cell * first + k < depth
                    number = numbers[(per_cell * first + k) * row + at] if inside else np.float32(0)
                    whole = np.int32(np.rint(number * factor))
                    panel[(k // per_cell * width + j) * per_cell + k % per_cell] = whole
                    total += whole
                if lead:
                    view(np.int32(0), place)[j] = -raised(tile) * total


def pack_rounded(tile: Tile, b: np.ndarray, row: int, column: int, depth: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(panels, scales (columns rounded up to whole panels,)) of B, whose strides in b are row and column."""
    size, panel_count = panel_bytes(tile, columns, depth), -(-columns // tile.width)
    packed = empty((size + 4 * panel_count * tile.width,), np.uint8)
    launch(_pack_rounded, min(threads(), panel_count), tile, packed, size, b.reshape(-1), row, column, depth, columns)
    return packed, packed[size:].view(np.float32)
