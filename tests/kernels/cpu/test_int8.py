"""Products in 8 bits: exactly those of the rounded numbers, on every kind of CPU, and only where they are wanted."""

import numpy as np
import pytest
from test_product import COLUMN, FLAGS, GELU, GRADIENT, MODULES, RESIDUAL, ROW, SHAPES, TANH, Guarded, gelu

from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.cpu import int8, run
from minivit.kernels.cpu.gemm import SHORTEST, gemm, products_in
from minivit.kernels.cpu.tiles import supported, tile_for
from minivit.runtime.plan import Plan

WAYS = [way for way in ("avx512", "avx2", "") if way != "avx512" or supported()[way]]
DEEP = [shape for shape in SHAPES if shape[2] >= SHORTEST]


@pytest.fixture
def guarded(monkeypatch):
    guards = Guarded()
    for module in (*MODULES, int8):
        monkeypatch.setattr(module, "empty", guards.empty)
    yield guards
    guards.check()


@pytest.fixture(params=WAYS, ids=lambda way: way or "sse")
def way(request, monkeypatch):
    """Products in 8 bits are computed in this way meanwhile."""
    monkeypatch.setattr(MODULES[1], "host_tile", lambda precision: tile_for(precision, request.param))
    with products_in("int8"):
        yield request.param


def rounded(matrix, axis):
    """(whole numbers, scales) along an axis, in float64 but with the roundings of float32."""
    largest = np.abs(matrix).max(axis, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(largest > 0, np.float32(127) / largest, 0).astype(np.float32)
    return np.rint(matrix * factor).astype(np.float64), (largest / np.float32(127)).astype(np.float64)


def expected(a, b):
    (left, rows), (right, columns) = rounded(a, -1), rounded(b, 0)
    return (left @ right) * rows * columns


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", DEEP, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_the_sums_are_exact(way, shape, turned, guarded):
    rows, columns, depth = shape
    a, b = numbers(rows, depth), numbers(depth, columns, seed=1)
    c = guarded.empty((rows, columns), np.float32)
    gemm(c, guarded.copy(a), guarded.copy(np.ascontiguousarray(b.T) if turned else b), transpose_b=turned)
    wanted = expected(a, b)
    np.testing.assert_allclose(c, wanted, rtol=0, atol=3e-7 * np.abs(wanted).max())
    guarded.check()


@pytest.mark.parametrize("flags", [flags for flags in FLAGS if not flags & GRADIENT])
def test_epilogues(way, flags, guarded):
    a, b = numbers(3, 41, 530), numbers(530, 779, seed=1) * np.float32(530**-0.5)
    bias = numbers(779 if flags & COLUMN else 41, seed=2)
    c, pre, extra = (guarded.empty((3, 41, 779), np.float32) for _ in range(3))
    wanted = expected(a, b) + (bias if flags & COLUMN else bias[:, None] if flags & ROW else 0)
    before = wanted
    if flags & GELU:
        wanted = gelu(wanted, bool(flags & TANH))[0]
    if flags & RESIDUAL:
        extra[...] = numbers(3, 41, 779, seed=3)
        wanted = wanted + extra
    gemm(c, guarded.copy(a), guarded.copy(b), flags=flags, bias=guarded.copy(bias), pre=pre if flags & GELU else None, extra=extra)
    np.testing.assert_allclose(c, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    if flags & GELU:
        np.testing.assert_allclose(pre, before, rtol=0, atol=2e-6 * np.abs(before).max())


def test_every_way_gives_the_same_bits(monkeypatch):
    a, b, results = numbers(130, 1601), numbers(801, 1601, seed=1), []
    for each in WAYS:
        monkeypatch.setattr(MODULES[1], "host_tile", lambda precision, way=each: tile_for(precision, way))
        for threads in (1, 2):
            with run.threads_set(threads), products_in("int8"):
                results.append(np.empty((130, 801), np.float32))
                gemm(results[-1], a, b, transpose_b=True)
    for each in results[1:]:
        np.testing.assert_array_equal(each, results[0])


def test_rows_without_a_usable_scale(way):
    a, b = numbers(6, 64), numbers(64, 7, seed=1)
    a[0], a[1, 3], a[2, 5], a[3], a[4] = 0, np.nan, np.inf, 1e-38, a[4] * np.float32(1e30)
    c = np.empty((6, 7), np.float32)
    gemm(c, a, b, flags=COLUMN, bias=np.ones(7, np.float32))
    assert (c[[0, 3]] == 1).all() and np.isnan(c[[1, 2]]).all()
    np.testing.assert_allclose(c[4:], expected(a[4:], b) + 1, rtol=1e-4)
    b[2] = 0
    b[:, 3] = 0
    gemm(c, a, b)
    assert (c[4:, 3] == 0).all() and (c[4:, :3] != 0).all()


def test_weights_that_change_are_rounded_again():
    a, b, c = numbers(5, 40), numbers(9, 40, seed=1), np.empty((5, 9), np.float32)

    def multiply():
        gemm(c, a, b, transpose_b=True)
        return c

    with products_in("int8"):
        plan = Plan(multiply, [b])
    first = c.copy()
    b *= 2
    plan.replay()
    np.testing.assert_array_equal(c, first)  # its weights are constants
    plan.prepare()
    plan.replay()
    np.testing.assert_array_equal(c, 2 * first)


@pytest.mark.parametrize(
    "options, shapes, kind",
    [
        ({"exact": True}, ((9, 64), (64, 7)), np.float32),
        ({"transpose_a": True}, ((64, 9), (64, 7)), np.float32),
        ({}, ((9, SHORTEST - 1), (SHORTEST - 1, 7)), np.float32),
        ({}, ((2, 9, 64), (2, 64, 7)), np.float32),
        ({"sum_batch": True}, ((2, 9, 64), (2, 64, 7)), np.float32),
        ({}, ((9, 64), (64, 7)), np.float64),
        ({}, ((9, 64), (64, 7)), BFLOAT16),
    ],
    ids=str,
)
def test_all_else_is_as_without(options, shapes, kind):
    a, b = (numbers(*shape, seed=seed).astype(kind) for seed, shape in enumerate(shapes))
    found = []
    for precision in ("float32", "int8"):
        c = np.empty((2, 9, 7) if a.ndim == 3 and not options else (9, 7), np.float32 if kind is BFLOAT16 else kind)
        with products_in(precision):
            gemm(c, a, b, **options)
        found.append(c)
    np.testing.assert_array_equal(*found)
