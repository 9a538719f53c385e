"""Register tiles: the tile of C that stays in registers during a product, for each precision and kind of CPU.

C[0:rows, 0:width] (+)= A[0:rows, 0:depth] · panel, where a `cell` is the unit that one lane multiplies: a number, or two bfloat16 that are
adjacent along the inner dimension, in 32 bits. The loop is the same for all: load a row of the panel, and for each row of A broadcast a
cell and multiply-add. Only the multiplication of two cells differs:

    float32, float64     one fma
    bfloat16  dpbf16ps   the AVX512-BF16 instruction, which adds both products of a pair to a float32
              widened    both halves are converted to float32 by a shift and a mask, then two fma: any CPU
              amx        sixteen cells at once, in Intel's tile registers: 2 × 2 of them hold 32 × 32 elements of C
    int8                 both halves are 16-bit integers of at most 127: their products are added to a 32-bit integer, exactly
    bf16x3               a float32 is split into two bfloat16, high + low; three of the four products are computed, without low·low

A `Tile` is passed to kernels like a number; its Numba type carries all its fields, as compile-time constants.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from .llvm import I64

AMX_CELLS = 16  # cells of the inner dimension in one tile instruction
MBLOCK = 128  # maximal number of rows in a block of C


@dataclass(frozen=True)
class Tile:
    """A tile of C with `rows` rows of `vectors` vectors of `lane_bytes` bytes, for products in `precision`; `multiply` as above."""

    precision: str  # "float32", "float64", "bfloat16", "bf16x3" or "int8"
    rows: int
    lane_bytes: int
    vectors: int
    multiply: str = "fma"  # "fma", "dpbf16ps", "widened", "integers", or the name of tile instructions

    @property
    def split(self) -> bool:  # whether operands are float32 in memory and are split when packed
        return self.precision == "bf16x3"

    @property
    def pairs(self) -> int:  # numbers per cell
        return 1 if self.precision.startswith("float") else 2

    @property
    def cell_bytes(self) -> int:
        return 8 if self.precision == "float64" else 4

    @property
    def row_bytes(self) -> int:  # bytes per row of a panel
        return self.vectors * self.lane_bytes

    @property
    def width(self) -> int:  # columns per panel
        return self.row_bytes // self.cell_bytes

    @property
    def slice_cells(self) -> int:  # most cells in a slice of the inner dimension, so that a panel of it stays in the first-level cache
        return 384 if self.row_bytes <= 64 and self.precision != "int8" else 256  # int8: the same sums on every CPU, below 2^24

    @property
    def step(self) -> int:  # the depth in cells must be a multiple of this
        return 1 if self.multiply in ("fma", "dpbf16ps", "widened", "integers") else AMX_CELLS

    @property
    def storage(self) -> np.dtype:  # dtype of A and B in memory, with bfloat16 and 16-bit integers as their bits
        return np.dtype({"float32": np.float32, "float64": np.float64, "bf16x3": np.float32}.get(self.precision, np.uint16))

    @property
    def accumulator(self) -> np.dtype:
        return np.dtype(np.float64 if self.precision == "float64" else np.float32)


# ------------------------------------------------------------------------------------------------------------------- this CPU's
def supported() -> dict[str, bool]:
    """Instruction sets, and whether this CPU has them; without them, all tiles but dpbf16ps and amx still work, more slowly."""
    features = llvm.get_host_cpu_features()
    return {
        "amx": bool(features.get("amx-bf16")) and _amx_permitted(),
        "avx512bf16": bool(features.get("avx512bf16")),
        "avx512": bool(features.get("avx512f")),
        "avx2": bool(features.get("avx2")) and bool(features.get("fma")),
    }


@cache
def _amx_permitted() -> bool:
    """Request the tile registers from Linux; a process may use them only after a request. Returns whether it was granted."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def tile_for(precision: str, way: str) -> Tile:
    """The tile of a precision for an instruction set: "amx", "avx512bf16", "avx512", "avx2" or "" (128-bit vectors)."""
    rows, lane_bytes = {"avx2": (6, 32), "": (6, 16)}.get(way, (12, 64))
    if precision in ("float32", "float64", "int8"):
        rows, vectors = (8, 3) if way == "avx512" else (rows, 2)  # Intel's: 12 x 2 are more instructions than it takes in time for its fma
        return Tile(precision, rows, lane_bytes, vectors, "integers" if precision == "int8" else "fma")
    if way == "amx":
        return Tile(precision, 32, 64, 2, "amx")
    return Tile(precision, rows, lane_bytes, 2, "dpbf16ps" if way == "avx512bf16" else "widened")


@cache
def host_tile(precision: str) -> Tile:
    """The fastest tile of a precision that this CPU supports."""
    return tile_for(precision, next((way for way, available in supported().items() if available), ""))


# --------------------------------------------------------------------------------------------------------- tiles inside kernels
class TileType(types.Type):
    """The Numba type of one tile, whose only value is this tile."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        super().__init__(name=repr(tile))


@register_model(TileType)
class _TileModel(models.OpaqueModel):
    pass


def _of_tile(constant_of: Any) -> Any:
    """An intrinsic that returns an int64 constant derived from the tile."""

    @intrinsic
    def value(typing_context, tile):
        return types.int64(tile), lambda context, b, signature, values: ir.Constant(I64, constant_of(signature.args[0].tile))

    return value


tile_rows = _of_tile(lambda tile: tile.rows)
tile_width = _of_tile(lambda tile: tile.width)
tile_pairs = _of_tile(lambda tile: tile.pairs)
tile_step = _of_tile(lambda tile: tile.step)
block_rows = _of_tile(lambda tile: MBLOCK // tile.rows * tile.rows)
tile_lanes = _of_tile(lambda tile: tile.lane_bytes // 4)
vector_columns = _of_tile(lambda tile: tile.width // tile.vectors if tile.step == 1 else 0)  # columns in `multiply_one_vector`
half_rows = _of_tile(lambda tile: tile.rows // 2 if tile.step == 1 else 0)  # rows in `multiply_half_rows`
is_raw = _of_tile(lambda tile: int(not tile.split))  # whether operands have the same form in memory and in panels
most_cells = _of_tile(lambda tile: tile.slice_cells)
row_bytes = _of_tile(lambda tile: tile.row_bytes)
cell_bytes = _of_tile(lambda tile: tile.cell_bytes)


def _zero_of_tile(name_of: Any) -> Any:
    """An intrinsic that returns a zero of the type whose name `name_of` returns."""

    @intrinsic
    def zero(typing_context, tile):
        type_ = getattr(types, name_of(tile.tile))
        return type_(tile), lambda context, b, signature, values: context.get_constant(signature.return_type, 0)

    return zero


storage_zero = _zero_of_tile(lambda tile: tile.storage.name)
packed_zero = _zero_of_tile(lambda tile: tile.storage.name if tile.pairs == 1 else "uint16")
sum_zero = _zero_of_tile(lambda tile: tile.accumulator.name)
