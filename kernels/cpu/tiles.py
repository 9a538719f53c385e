"""Which tile of C stays in registers while a product is summed, for each precision and kind of CPU.

C[0:rows, 0:width] (+)= A[0:rows, 0:depth] · panel, where a `cell` is what a lane multiplies at once: a number, or two bfloat16 that are
neighbours along the inner dimension and lie together in 32 bits. So one loop serves all: load a row of the panel, and for each row of A
broadcast a cell and multiply-add. How two cells are multiplied is the only difference:

    float32, float64     an fma
    bfloat16  dpbf16ps   AVX512-BF16's instruction, which adds both products of a pair to a float32
              widened    both halves become float32 by a shift and a mask, then two fma: any CPU
              amx        sixteen cells at once, in Intel's tile registers: 2 × 2 of them hold 32 × 32 elements of C
    bf16x3               a float32 is the sum of two bfloat16, high + low; of the product of two sums three terms are kept

A `Tile` is handed to kernels like a number; its type tells the compiler all of it.
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

AMX_CELLS = 16  # of the inner dimension, in one tile instruction
MBLOCK = 128  # rows of a block of C, at most


@dataclass(frozen=True)
class Tile:
    """rows, and vectors of lane_bytes in a row, of a tile of C, for products in `precision`; `multiply` as above."""

    precision: str  # "float32", "float64", "bfloat16" or "bf16x3"
    rows: int
    lane_bytes: int
    vectors: int
    multiply: str = "fma"  # "fma", "dpbf16ps", "widened", or the name of tile instructions

    @property
    def split(self) -> bool:  # whether operands lie in memory as float32 and are split when they are packed
        return self.precision == "bf16x3"

    @property
    def pairs(self) -> int:  # numbers in a cell
        return 1 if self.precision.startswith("float") else 2

    @property
    def cell_bytes(self) -> int:
        return 8 if self.precision == "float64" else 4

    @property
    def row_bytes(self) -> int:  # of a row of a panel
        return self.vectors * self.lane_bytes

    @property
    def width(self) -> int:  # columns of a panel
        return self.row_bytes // self.cell_bytes

    @property
    def step(self) -> int:  # cells that the depth must be a multiple of
        return 1 if self.multiply in ("fma", "dpbf16ps", "widened") else AMX_CELLS

    @property
    def storage(self) -> np.dtype:  # of A and B in memory, bfloat16 as its bits
        return np.dtype({"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16, "bf16x3": np.float32}[self.precision])

    @property
    def accumulator(self) -> np.dtype:
        return np.dtype(np.float64 if self.precision == "float64" else np.float32)


# ------------------------------------------------------------------------------------------------------------------- this CPU's
def supported() -> dict[str, bool]:
    """Ways to compute, and whether this CPU has the instructions; the others are there too, slower, but for dpbf16ps and amx."""
    features = llvm.get_host_cpu_features()
    return {
        "amx": bool(features.get("amx-bf16")) and _amx_permitted(),
        "avx512bf16": bool(features.get("avx512bf16")),
        "avx512": bool(features.get("avx512f")),
        "avx2": bool(features.get("avx2")) and bool(features.get("fma")),
    }


@cache
def _amx_permitted() -> bool:
    """Ask Linux for the tile registers, which a process may use only after it has asked."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def tile_for(precision: str, way: str) -> Tile:
    """The tile of a precision in one way: "amx", "avx512bf16", "avx512", "avx2" or "" (128-bit vectors)."""
    rows, lane_bytes = {"avx2": (6, 32), "": (6, 16)}.get(way, (12, 64))
    if precision in ("float32", "float64"):
        return Tile(precision, rows, lane_bytes, 2)
    if way == "amx":
        return Tile(precision, 32, 64, 2, "amx")
    return Tile(precision, rows, lane_bytes, 2, "dpbf16ps" if way == "avx512bf16" else "widened")


@cache
def host_tile(precision: str) -> Tile:
    """The fastest tile of a precision that this CPU has."""
    return tile_for(precision, next((way for way, there in supported().items() if there), ""))


# --------------------------------------------------------------------------------------------------------- tiles inside kernels
class TileType(types.Type):
    """The Numba type of one tile, which has no other value."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        super().__init__(name=repr(tile))


@register_model(TileType)
class _TileModel(models.OpaqueModel):
    pass


def _of_tile(find: Any) -> Any:
    """An intrinsic that gives an int64 constant found from the tile."""

    @intrinsic
    def value(typing_context, tile):
        return types.int64(tile), lambda context, b, signature, values: ir.Constant(I64, find(signature.args[0].tile))

    return value


tile_rows = _of_tile(lambda tile: tile.rows)
tile_width = _of_tile(lambda tile: tile.width)
tile_pairs = _of_tile(lambda tile: tile.pairs)
tile_step = _of_tile(lambda tile: tile.step)
block_rows = _of_tile(lambda tile: MBLOCK // tile.rows * tile.rows)
tile_lanes = _of_tile(lambda tile: tile.lane_bytes // 4)
vector_columns = _of_tile(lambda tile: tile.width // tile.vectors if tile.step == 1 else 0)  # columns of `multiply_one_vector`
half_rows = _of_tile(lambda tile: tile.rows // 2 if tile.step == 1 else 0)  # rows of `multiply_half_rows`
is_raw = _of_tile(lambda tile: int(not tile.split))  # whether operands lie in memory as panels hold them
row_bytes = _of_tile(lambda tile: tile.row_bytes)
cell_bytes = _of_tile(lambda tile: tile.cell_bytes)


def _zero_of_tile(find: Any) -> Any:
    """An intrinsic that gives a zero of the type that `find` says."""

    @intrinsic
    def zero(typing_context, tile):
        type_ = getattr(types, find(tile.tile))
        return type_(tile), lambda context, b, signature, values: context.get_constant(signature.return_type, 0)

    return zero


storage_zero = _zero_of_tile(lambda tile: tile.storage.name)
packed_zero = _zero_of_tile(lambda tile: tile.storage.name if tile.pairs == 1 else "uint16")
sum_zero = _zero_of_tile(lambda tile: tile.accumulator.name)
