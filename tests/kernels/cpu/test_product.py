"""Every way to multiply, chosen explicitly: shapes, layouts, epilogues, and that nothing outside of an array is written or matters.

Intel's tile instructions run in software too (`tile_simulation`), so that all around them is tested on any CPU.
"""

import math
from dataclasses import replace
from importlib import import_module
from itertools import product

import numpy as np
import pytest
import tile_simulation  # noqa: F401

from minivit.kernels import OPS
from minivit.kernels.core import epilogue as epilogues
from minivit.kernels.core.cases import Sample, make_inputs
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.core.recording import launch
from minivit.kernels.cpu import run
from minivit.kernels.cpu.gemm import gemm, products_in
from minivit.kernels.cpu.kernel import kernel
from minivit.kernels.cpu.math import gelu_rounded
from minivit.kernels.cpu.symmetric import symmetric_product
from minivit.kernels.cpu.tiles import supported, tile_for
from minivit.kernels.gelu import gelu_reference
from minivit.testing.numerics import check_accuracy
from minivit.testing.result import CheckResult

EVERY_OP = list(OPS.values())  # imported now: a module that is first imported in a test with guards would keep `Guarded.empty`
# They allocate scratch.
MODULES = [import_module(f"minivit.kernels.{name}") for name in ("core.arrays", "cpu.gemm", "attention", "cpu.strided", "cpu.symmetric")]
SIMULATED = "amx simulated"
WAYS = ("amx", SIMULATED, "avx512bf16", "avx512", "avx2", "")
NEEDED = ("amx", "avx512bf16")  # instructions without which a CPU cannot run the way at all
# What full sums may err by, of the largest number; where they are written as bfloat16, one rounding more.
ERROR = {"float32": 2e-6, "float64": 1e-14, "bfloat16": 2e-6, "bf16x3": 2e-5}
ROUNDING = 2**-8
GUARD = 4096  # bytes on either side of an array
# Rows, columns, depth: one, odd, prime, around a tile's and a block's sizes, wider than a block, deeper than one slice and than several.
SHAPES = [
    (1, 1, 1),
    (1, 37, 5),
    (7, 1, 3),
    (13, 31, 17),
    (12, 32, 64),
    (18, 64, 20),
    (33, 65, 31),
    (121, 47, 255),
    (37, 801, 40),
    (3, 5, 1601),
    (130, 67, 513),
]


class Guarded:
    """`arrays.empty`; but around each array lie guards, full of NaN, which must stay as they are. Arrays begin as NaN too."""

    def __init__(self) -> None:
        self.rooms: list[tuple[np.ndarray, int, int]] = []

    def empty(self, shape, dtype, device="cpu") -> np.ndarray:
        assert device == "cpu"
        size = math.prod(shape) * np.dtype(dtype).itemsize
        room = np.full(size + 2 * GUARD + 64, 0xFF, np.uint8)
        start = GUARD + -room.ctypes.data % 64
        self.rooms.append((room, start, start + size))
        return room[start : start + size].view(dtype).reshape(shape)

    def copy(self, array) -> np.ndarray:
        own = self.empty(array.shape, array.dtype)
        own[...] = array
        return own

    def check(self) -> None:
        for room, start, stop in self.rooms:
            assert (room[:start] == 0xFF).all() and (room[stop:] == 0xFF).all(), "something was written outside of an array"
        self.rooms.clear()


@pytest.fixture
def guarded(monkeypatch):
    guards = Guarded()
    for module in MODULES:
        monkeypatch.setattr(module, "empty", guards.empty)
    yield guards
    guards.check()


@pytest.fixture(
    params=[
        pytest.param((precision, way), id=f"{precision}-{way or 'sse'}")
        for precision in ERROR
        for way in WAYS
        if way in ("avx512", "avx2", "") or not precision.startswith("float")
    ]
)
def tile(request, monkeypatch):
    """A tile, which all products are computed with meanwhile, on one thread."""
    precision, way = request.param
    if way in NEEDED and not supported()[way]:
        pytest.skip(f"this CPU has no {way}")
    tile = replace(tile_for(precision, "amx"), multiply=way) if way == SIMULATED else tile_for(precision, way)
    monkeypatch.setattr(MODULES[1], "host_tile", lambda wanted: tile if wanted == tile.precision else pytest.fail(f"asks for {wanted}"))
    with run.threads_set(1), products_in("bf16x3" if tile.split else "float32"):
        yield tile


def numbers(tile, shape, seed) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype_of(tile))


def dtype_of(tile) -> np.dtype:
    return {"bfloat16": BFLOAT16, "bf16x3": np.dtype(np.float32)}.get(tile.precision) or np.dtype(tile.precision)


def outputs_of(tile) -> list[np.dtype]:
    return [tile.accumulator, BFLOAT16] if tile.precision == "bfloat16" else [tile.accumulator]


def close(tile, given, wanted, where) -> None:
    error = np.abs(given.astype(np.float64) - wanted).max() / np.abs(wanted).max()
    assert error <= ERROR[tile.precision] + ROUNDING * (given.dtype == BFLOAT16), f"{where}: {error:.1e}"


def stored(matrix, transpose, guarded) -> np.ndarray:
    return guarded.copy(np.ascontiguousarray(matrix.swapaxes(-1, -2)) if transpose else matrix)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_and_layout(tile, shape, guarded):
    rows, columns, depth = shape
    a, b = numbers(tile, (rows, depth), 0), numbers(tile, (depth, columns), 1)
    wanted = a.astype(np.float64) @ b.astype(np.float64)
    for transpose_a, transpose_b, dtype in product((False, True), (False, True), outputs_of(tile)):
        c = guarded.empty((rows, columns), dtype)
        gemm(c, stored(a, transpose_a, guarded), stored(b, transpose_b, guarded), transpose_a=transpose_a, transpose_b=transpose_b)
        close(tile, c, wanted, f"transposed {transpose_a, transpose_b}, {dtype}")
        guarded.check()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5, 9, 3), (67, 45, 300)], ids=str)
@pytest.mark.parametrize("batched", ["a", "b", "ab"])
def test_batches(tile, shape, batched, guarded):
    rows, columns, depth = shape
    a = numbers(tile, (3, rows, depth) if "a" in batched else (rows, depth), 0)
    b = numbers(tile, (3, depth, columns) if "b" in batched else (depth, columns), 1)
    every = a.astype(np.float64) @ b.astype(np.float64)
    for sum_batch, transpose_a, transpose_b, dtype in product((False, True), (False, True), (False, True), outputs_of(tile)):
        if sum_batch and (batched != "ab" or dtype != tile.accumulator):
            continue
        wanted = every.sum(0) if sum_batch else every
        c = guarded.empty(wanted.shape, dtype)
        gemm(
            c,
            stored(a, transpose_a, guarded),
            stored(b, transpose_b, guarded),
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            sum_batch=sum_batch,
        )
        close(tile, c, wanted, f"transposed {transpose_a, transpose_b}, {dtype}, sum_batch={sum_batch}")
        guarded.check()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 9), (2, 24, 24), (3, 67, 45), (1, 200, 700)], ids=str)
def test_symmetric_products(tile, shape, guarded):
    batch, side, _ = shape
    a = numbers(tile, shape, 0)
    square = a.astype(np.float64) @ a.astype(np.float64).swapaxes(1, 2)
    extra = numbers(tile, (batch, side, side), 1)
    extra = (extra + extra.swapaxes(1, 2)).astype(extra.dtype)
    for transpose, terms, dtype in product((False, True), (False, True), outputs_of(tile)):
        c, factor = guarded.empty(square.shape, dtype), stored(a, transpose, guarded)
        transposed, wanted = dict(transpose_a=transpose, transpose_b=not transpose), square
        if terms:
            added = guarded.copy(extra.astype(dtype))
            symmetric_product(c, factor, factor, **transposed, scale=-0.5, extra=added, extra_scale=2.0, diagonal=3.0)
            wanted = -0.5 * square + 2 * added.astype(np.float64) + 3 * np.eye(side)
        else:
            symmetric_product(c, factor, factor, **transposed)
        close(tile, c, wanted, f"transposed {transpose}, terms {terms}, {dtype}")
        np.testing.assert_array_equal(c, c.swapaxes(1, 2))
        guarded.check()


def gelu(x, tanh: bool) -> tuple[np.ndarray, np.ndarray]:
    """GELU and its derivative."""
    if tanh:
        t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    normal = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x * normal, normal + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


COLUMN, ROW, GELU, GRADIENT, TANH, RESIDUAL = (
    getattr(epilogues, name) for name in ("BIAS_COLUMN", "BIAS_ROW", "GELU", "GELU_GRADIENT", "TANH", "RESIDUAL")
)


FLAGS = [COLUMN, ROW, RESIDUAL, GELU, COLUMN | GELU | TANH | RESIDUAL, ROW | GELU | RESIDUAL, GRADIENT, GRADIENT | TANH]


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("shape", [(5, 3, 7), (123, 779, 530)], ids=str)
def test_epilogues(tile, shape, flags, guarded):
    rows, columns, depth = shape
    a, b = numbers(tile, (rows, depth), 0), numbers(tile, (depth, columns), 1) * dtype_of(tile).type(depth**-0.5)
    bias = guarded.copy(np.random.default_rng(2).standard_normal(columns if flags & COLUMN else rows).astype(tile.accumulator))
    sums = a.astype(np.float64) @ b.astype(np.float64)
    sums += bias if flags & COLUMN else bias[:, None] if flags & ROW else 0
    for dtype in outputs_of(tile):
        c, pre, extra = (guarded.empty((rows, columns), dtype) for _ in range(3))
        given = np.random.default_rng(3).standard_normal((2, rows, columns)).astype(dtype).astype(np.float64)
        wanted, wanted_pre, wanted_extra = sums, None, None
        if flags & GELU:
            wanted, wanted_pre = gelu(sums, bool(flags & TANH))[0], sums
        if flags & GRADIENT:
            pre[...] = given[0]
            wanted_extra, slope = gelu(given[0], bool(flags & TANH))
            wanted = sums * slope
        if flags & RESIDUAL:
            extra[...] = given[1]
            wanted = wanted + given[1]
        gemm(c, guarded.copy(a), guarded.copy(b), flags=flags, bias=bias, pre=pre, extra=extra)
        close(tile, c, wanted, dtype)
        if wanted_pre is not None:
            close(tile, pre, wanted_pre, f"{dtype}, before GELU")
        if wanted_extra is not None:
            close(tile, extra, wanted_extra, f"{dtype}, GELU")
        guarded.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "matmul", "attention", "channel_mixing", "token_mixing"])
def test_ops_made_of_products(tile, name, guarded):
    for case in OPS[name].cases[:2]:
        rng, result = np.random.default_rng(0), CheckResult()
        call = Sample(OPS[name], *make_inputs(OPS[name], case, dtype_of(tile), rng))
        check_accuracy(call, "cpu", rng, result, split=tile.split)
        assert not result.failure, result.failure
        guarded.check()


# --------------------------------------------------------------------------------------------------------------- as this CPU does
@pytest.mark.parametrize("kinds", [(BFLOAT16, np.float32), (np.float32, BFLOAT16)], ids=str)
def test_float32_times_bfloat16_is_rounded(kinds):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(kind) for shape, kind in zip([(2, 9, 30), (2, 30, 7)], kinds))
    c, rounded = np.empty((2, 9, 7), np.float32), np.empty((2, 9, 7), np.float32)
    gemm(c, a, b)
    gemm(rounded, a.astype(BFLOAT16), b.astype(BFLOAT16))
    np.testing.assert_array_equal(c, rounded)
    assert np.abs(c - a.astype(np.float64) @ b.astype(np.float64)).max() > 1e-4


@pytest.mark.parametrize("name", ["linear", "matmul", "attention", "channel_mixing", "token_mixing"])
def test_split_products_lie_between_bfloat16_and_float32(name):
    rng = np.random.default_rng(0)
    call = Sample(OPS[name], *make_inputs(OPS[name], OPS[name].cases[1], np.float32, rng))
    weights = call.weights(rng)
    high = call.astype(np.float64).run("reference", {n: None if w is None else w.astype(np.float64) for n, w in weights.items()})
    low = call.run("cpu", weights)
    with products_in("bf16x3"):
        split = call.run("cpu", weights)
    for output in high:
        if high[output] is None or np.array_equal(low[output], split[output]):
            continue
        size = np.abs(high[output]).max()
        assert np.abs(low[output] - high[output]).max() < np.abs(split[output] - high[output]).max() < 5e-5 * size, output
    assert not np.array_equal(low["y"], split["y"])


def test_splitting_ends_with_its_block():
    a = np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)
    results = np.empty((4, 20, 20), np.float32)
    gemm(results[0], a, a)
    with products_in("bf16x3"):
        gemm(results[1], a, a)
        with products_in("float32"):
            gemm(results[2], a, a)
    gemm(results[3], a, a)
    np.testing.assert_array_equal(results[2:], results[[0, 0]])
    assert not np.array_equal(results[1], results[0])


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_running_sums(tile, shape, batched, guarded):
    rows, columns, depth = shape
    a, b = numbers(tile, (2, rows, depth)[not batched :], 0), numbers(tile, (2, depth, columns)[not batched :], 1)
    running = np.random.default_rng(2).standard_normal((rows, columns)).astype(tile.accumulator)
    product = a.astype(np.float64) @ b.astype(np.float64)
    c, there = guarded.empty(running.shape, running.dtype), guarded.copy(running)
    for to, before in ((c, running), (there, there)):
        gemm(to, guarded.copy(a), guarded.copy(b), sum_batch=batched, running=before)
        close(tile, to, running + (product.sum(0) if batched else product), "in place" if to is before else "elsewhere")
    assert c.tobytes() == there.tobytes()


def test_sums_have_no_epilogue():
    a, c = np.ones((2, 3, 3), np.float32), np.empty((3, 3), np.float32)
    with pytest.raises(ValueError, match="epilogue"):
        gemm(c, a, a, sum_batch=True, flags=COLUMN)
    with pytest.raises(ValueError, match="epilogue"):
        gemm(c, a[0], a[0], running=c, flags=COLUMN)


def test_a_running_sum_in_bfloat16():
    a, c = (np.random.default_rng(i).standard_normal((9, 9)).astype(BFLOAT16) for i in range(2))
    wanted = c.astype(np.float64) + a.astype(np.float64) @ a.astype(np.float64)
    gemm(c, a, a, running=c)
    assert np.abs(c.astype(np.float64) - wanted).max() <= 2 * ROUNDING * np.abs(wanted).max()


@kernel
def _gelu_rounded(band, bands, y, x):
    for i in range(len(x)):
        y[i] = gelu_rounded(x[i])


def test_gelu_of_a_result_that_is_rounded():
    x = np.concatenate([np.linspace(-8, 8, 100_001), np.logspace(0, 30, 1000), -np.logspace(0, 30, 1000)]).astype(np.float32)
    y, wanted = np.empty_like(x), np.empty_like(x, np.float64)
    gelu_reference(wanted, x.astype(np.float64), "none")
    launch(_gelu_rounded, 1, y, x)
    errors = np.abs(y - wanted)
    assert (errors <= np.maximum(6e-5, 2e-5 * np.abs(wanted))).all()
    assert (errors <= 2.0**-9 * np.abs(wanted))[np.abs(wanted) > 0.02].all(), "more than half a unit of bfloat16's last place"
    assert (y[x < -5] == 0).all()
    launch(_gelu_rounded, 1, y[:1], np.full(1, np.nan, np.float32))
    assert np.isnan(y[0])
