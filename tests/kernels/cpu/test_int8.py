"""Products in 8 bits: exactly those of the rounded numbers, on every kind of CPU, and only where they are wanted."""

import re
from dataclasses import replace
from itertools import product

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from test_product import COLUMN, FLAGS, GELU, GRADIENT, MODULES, RESIDUAL, ROW, SHAPES, TANH, Guarded, gelu

from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.cpu import int8, run, tiles
from minivit.kernels.cpu.gemm import SHORTEST, gemm, products_in
from minivit.kernels.cpu.llvm import I64, X86, Code
from minivit.kernels.cpu.multiply import UNROLLED, _generate_registers
from minivit.kernels.cpu.tiles import EXACT, Tile, host_tile, supported, tile_for
from minivit.runtime.plan import Plan

WAYS = [way for way in ("avx512vnni", "avxvnni", "avx512", "avx2", "") if way in ("avx2", "") or supported()[way]]
FORMS = {way or "sse": tile_for("int8", way) for way in WAYS}
FORMS["bytes"] = replace(tile_for("int8", "avx512" if supported()["avx512"] else "avx2"), multiply="bytes")
DEEP = [shape for shape in SHAPES if shape[2] >= SHORTEST]


@pytest.fixture
def guarded(monkeypatch):
    guards = Guarded()
    for module in (*MODULES, int8):
        monkeypatch.setattr(module, "empty", guards.empty)
    yield guards
    guards.check()


def compute_with(monkeypatch, tile: Tile) -> None:
    """From here on, products in 8 bits are computed with this tile."""
    monkeypatch.setattr(MODULES[1], "host_tile", lambda precision: tile if precision == "int8" else host_tile(precision))


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Products in 8 bits are computed in this form meanwhile."""
    compute_with(monkeypatch, FORMS[request.param])
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
def test_the_sums_are_exact(form, shape, turned, guarded):
    rows, columns, depth = shape
    a, b = numbers(rows, depth), numbers(depth, columns, seed=1)
    c = guarded.empty((rows, columns), np.float32)
    gemm(c, guarded.copy(a), guarded.copy(np.ascontiguousarray(b.T) if turned else b), transpose_b=turned)
    wanted = expected(a, b)
    np.testing.assert_allclose(c, wanted, rtol=0, atol=3e-7 * np.abs(wanted).max())
    guarded.check()


@pytest.mark.parametrize("flags", [flags for flags in FLAGS if not flags & GRADIENT])
def test_epilogues(form, flags, guarded):
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


def test_the_bits_are_those_of_any_form_and_number_of_threads(monkeypatch):
    a, b, results = numbers(130, 1601), numbers(801, 1601, seed=1), []
    for tile in FORMS.values():
        compute_with(monkeypatch, tile)
        for threads in (1, 2):
            with run.threads_set(threads), products_in("int8"):
                results.append(np.empty((130, 801), np.float32))
                gemm(results[-1], a, b, transpose_b=True)
    for each in results[1:]:
        np.testing.assert_array_equal(each, results[0])


def any_numbers(a, b):
    return a, b


def large_numbers(a, b):
    """Sums above 2^24, which depend on where the inner dimension is cut into slices."""
    return 9 + a, 9 + b


def no_scales(a, b):
    a[0], a[-1, -1], b[:, 0], b[0, -1] = 0, np.nan, 0, np.inf
    return a, b


@pytest.mark.parametrize("depth", [1, 3, 4, 5, EXACT - 1, EXACT, EXACT + 1, 2 * EXACT + 1, 1601, 2301])
def test_the_bits_are_those_of_any_form_in_any_shape(monkeypatch, depth):
    monkeypatch.setattr(MODULES[1], "SHORTEST", 1)
    for rows, columns, change in product((1, 5, 65), (1, 17, 96), (any_numbers, large_numbers, no_scales)):
        a, b = change(numbers(rows, depth), numbers(depth, columns, seed=1))
        results = np.full((len(FORMS), rows, columns), 7, np.float32)
        for c, tile in zip(results, FORMS.values()):
            compute_with(monkeypatch, tile)
            with products_in("int8"):
                gemm(c, a, b)
        np.testing.assert_array_equal(results[1:].view(np.uint32), np.broadcast_to(results[0].view(np.uint32), results[1:].shape))


@pytest.mark.parametrize("depth", [1, 3, 4, 5, EXACT - 1, EXACT, EXACT + 1, 2 * EXACT + 1])
def test_whole_numbers_are_multiplied_exactly(form, depth, monkeypatch):
    monkeypatch.setattr(MODULES[1], "SHORTEST", 1)
    rng = np.random.default_rng(depth)
    for rows, columns in product((1, 5, 65), (1, 17, 96)):
        a, b = rng.integers(-127, 128, (rows, depth)), rng.integers(-127, 128, (depth, columns))
        a[:, 0] = b[-1] = 127  # so that all scales are 1
        for left, right in (a, b), (np.full_like(a, 127), np.full_like(b, -127)), (np.full_like(a, -127), np.full_like(b, -127)):
            c = np.empty((rows, columns), np.float32)
            gemm(c, left.astype(np.float32), right.astype(np.float32))
            np.testing.assert_array_equal(c, left @ right)


def test_rows_without_a_usable_scale(form):
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


# ------------------------------------------------------------------------------------------------------------------------- VNNI
@pytest.mark.parametrize(
    "available, way, multiply",
    [
        (("amx", "avx512bf16", "avx512vnni", "avxvnni", "avx512", "avx2"), "avx512vnni", "vpdpbusd"),
        (("avxvnni", "avx2"), "avxvnni", "vpdpbusd"),
        (("amx", "avx512bf16", "avx512", "avx2"), "avx512", "integers"),
        (("avx2",), "avx2", "integers"),
        ((), "", "integers"),
    ],
    ids=str,
)
def test_the_form_is_chosen_by_the_instructions_for_integers(available, way, multiply, monkeypatch):
    monkeypatch.setattr(tiles, "supported", lambda: {name: name in available for name in supported()})
    tile = host_tile.__wrapped__("int8")
    assert tile == tile_for("int8", way) and tile.multiply == multiply
    for_bfloat16 = next((name for name in ("amx", "avx512bf16") if name in available), "")
    assert host_tile.__wrapped__("bfloat16").multiply == {"amx": "amx", "avx512bf16": "dpbf16ps", "": "widened"}[for_bfloat16]


def innermost_loops(tile, cpu) -> list[list[list[str]]]:
    """The instructions of the loops of a product on another x86 CPU, each as its name and operands, the result as the last one."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 9), "multiply")
    code = Code(ir.IRBuilder(function.append_basic_block()))
    _generate_registers(code, tile, *function.args)
    code.b.ret_void()
    machine = llvm.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(cpu=cpu, opt=3)
    parsed = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    loops = re.findall(r"^(\.\w+):.*((?:\n\t.*)+?)\n\tj\w+\t\1$", machine.emit_assembly(parsed), re.MULTILINE)
    return [[re.split(r"\s+|, ", line.removeprefix("{vex}").strip()) for line in loop.strip().split("\n\t")] for _, loop in loops]


@pytest.mark.skipif(not X86, reason="no x86 CPU")
@pytest.mark.parametrize("way, cpu", [("avx512vnni", "cascadelake"), ("avxvnni", "alderlake")])
def test_the_loop_on_a_cpu_with_vnni(way, cpu):
    tile = tile_for("int8", way)
    cells = UNROLLED * tile.rows * tile.vectors
    whole = [loop for loop in innermost_loops(tile, cpu) if [name for name, *_ in loop].count("vpdpbusd") == cells]
    assert len(whole) == 2  # for rows of A as they lie, and for packed ones
    for loop in whole:
        a = [operands[-1] for name, *operands in loop if name == "vpbroadcastd"]
        b = [operands[-1] for name, *operands in loop if name.startswith("vmovdqu")]
        products = [operands for name, *operands in loop if name == "vpdpbusd"]
        assert (len(a), len(b)) == (UNROLLED * tile.rows, UNROLLED * tile.vectors)
        assert len({total for _, _, total in products}) == tile.rows * tile.vectors  # the sums stay in registers
        assert {signed for signed, _, _ in products} == {*b} and {unsigned for _, unsigned, _ in products} == {*a}
