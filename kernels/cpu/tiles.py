"""Register tiles: the tile of C that stays in registers during a product, for each precision and kind of CPU.

C[0:rows, 0:width] (+)= A[0:rows, 0:depth] · panel, where a `cell` is the unit that one lane multiplies: a number, or 32 bits with two or
four numbers that are adjacent along the inner dimension. The loop is the same for all: load a row of the panel, and for each row of A
broadcast a cell and multiply-add. Only the multiplication of two cells differs:

    float32, float64     one fma
    bfloat16  dpbf16ps   the AVX512-BF16 instruction, which adds both products of a pair to a float32
              widened    both halves are converted to float32 by a shift and a mask, then two fma: any CPU
              amx        sixteen cells at once, in Intel's tile registers: 2 × 2 of them hold 32 × 32 elements of C
    int8      integers   both halves are 16-bit integers of at most 127: their products are added to a 32-bit integer, exactly
              vpdpbusd   the VNNI instruction, which adds all products of four bytes to a 32-bit integer, exactly
              bytes      the same by multiplications of 16-bit integers: any CPU
    bf16x3               a float32 is split into two bfloat16, high + low; three of the four products are computed, without low·low

VNNI multiplies unsigned bytes by signed ones, so A's numbers q are stored as q + 128: Σ q·r = -128·Σ r + Σ (q + 128)·r. A panel of B begins
with a row of -128·Σ r, from which the sums start.

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
EXACT = 512  # products of two integers of at most 127, whose sum is below 2^24 and so exact in float32
BY_LANES = ("fma", "dpbf16ps", "widened", "integers", "vpdpbusd", "bytes")  # multiplications in vector registers


@dataclass(frozen=True)
class Tile:
    """A tile of C with `rows` rows of `vectors` vectors of `lane_bytes` bytes, for products in `precision`; `multiply` as above."""

    precision: str  # "float32", "float64", "bfloat16", "bf16x3" or "int8"
    rows: int
    lane_bytes: int
    vectors: int
    multiply: str = "fma"  # one of BY_LANES, or the name of tile instructions

    @property
    def split(self) -> bool:  # whether operands are float32 in memory and are split when packed
        return self.precision == "bf16x3"

    @property
    def per_cell(self) -> int:  # numbers in a cell
        return 1 if self.precision.startswith("float") else 4 if self.multiply in ("vpdpbusd", "bytes") else 2

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
        if self.precision == "int8":
            return EXACT // self.per_cell
        return 384 if self.row_bytes <= 64 else 256

    @property
    def slice_step(self) -> int:  # the cells of a slice are a multiple of this; int8: the same numbers in a slice, and sums, on every CPU
        return 4 // self.per_cell if self.precision == "int8" else self.step

    @property
    def step(self) -> int:  # the depth in cells must be a multiple of this
        return 1 if self.multiply in BY_LANES else AMX_CELLS

    @property
    def raised(self) -> int:  # what is added to A's numbers, so that they are unsigned
        return 128 if self.per_cell == 4 else 0

    @property
    def lead(self) -> int:  # rows of a panel before its cells: what the sums start from, if A is raised
        return 1 if self.raised else 0

    @property
    def packed(self) -> np.dtype:  # dtype of the numbers in panels, with bfloat16 and integers as their bits
        return np.dtype({1: self.precision, 2: "uint16", 4: "uint8"}[self.per_cell])

    @property
    def storage(self) -> np.dtype:  # dtype of A and B in memory
        return np.dtype(np.float32) if self.split else self.packed

    @property
    def accumulator(self) -> np.dtype:
        return np.dtype(np.float64 if self.precision == "float64" else np.float32)


# ------------------------------------------------------------------------------------------------------------------- this CPU's
FOR_BFLOAT16, FOR_INT8 = ("amx", "avx512bf16"), ("avx512vnni", "avxvnni")  # instruction sets of one precision, the fastest first


def supported() -> dict[str, bool]:
    """Instruction sets, and whether this CPU has them; without them, all tiles but dpbf16ps, vpdpbusd and amx still work, more slowly."""
    features = llvm.get_host_cpu_features()
    return {
        "amx": bool(features.get("amx-bf16")) and _amx_permitted(),
        "avx512bf16": bool(features.get("avx512bf16")),
        "avx512vnni": bool(features.get("avx512vnni")),
        "avxvnni": bool(features.get("avxvnni")),
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
    """The tile of a precision for an instruction set of `supported`, or for "" (128-bit vectors)."""
    rows, lane_bytes = {"avxvnni": (6, 32), "avx2": (6, 32), "": (6, 16)}.get(way, (12, 64))
    if precision in ("float32", "float64", "int8"):
        rows, vectors = (8, 3) if way in ("avx512", "avx512vnni") else (rows, 2)  # 12 x 2 are more instructions than Intel's take in time
        return Tile(precision, rows, lane_bytes, vectors, "fma" if precision != "int8" else "vpdpbusd" if way in FOR_INT8 else "integers")
    if way == "amx":
        return Tile(precision, 32, 64, 2, "amx")
    return Tile(precision, rows, lane_bytes, 2, "dpbf16ps" if way == "avx512bf16" else "widened")


@cache
def host_tile(precision: str) -> Tile:
    """The fastest tile of a precision that this CPU supports."""
    available, own = supported(), FOR_INT8 if precision == "int8" else FOR_BFLOAT16
    return tile_for(precision, next((way for way in (*own, "avx512", "avx2") if available[way]), ""))


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
tile_per_cell = _of_tile(lambda tile: tile.per_cell)
tile_step = _of_tile(lambda tile: tile.step)
slice_step = _of_tile(lambda tile: tile.slice_step)
raised = _of_tile(lambda tile: tile.raised)
lead_rows = _of_tile(lambda tile: tile.lead)
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
packed_zero = _zero_of_tile(lambda tile: tile.packed.name)
sum_zero = _zero_of_tile(lambda tile: tile.accumulator.name)
