"""The stages of `first_contact` that are about products: whether they are right, and which algorithms of cuBLASLt are fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minivit import Trainer
from minivit.errors import DeviceError
from minivit.kernels.core import arrays, devices, epilogue
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.core.recording import View
from minivit.kernels.cuda.gemm import column_sums, gemm
from minivit.kernels.cuda.product import WORKSPACE, Product, can_sum
from minivit.runtime.plan import Plan

from . import gpu
from .contact_stages import Setting, model_of

RANKS = 8  # algorithms of cuBLASLt that are tried
COMPARED = 16 << 20  # bytes of a product that is computed twice, at most, to see whether its bits are the same


# --------------------------------------------------------------------------------------------------------------------- correctness
class Case(NamedTuple):
    """A product c = a·b and what is done to it; M, N, K as in `Product`."""

    name: str
    size: tuple[int, int, int]
    types: tuple[Any, Any] = (BFLOAT16, BFLOAT16)  # of a and b, of c
    batch: tuple[int, int] = (0, 0)  # of a and of b; 0: a matrix
    transposed: tuple[bool, bool] = (False, False)
    bias: bool = False
    added: str = ""  # "in place": to what c holds, "out of place": to another array


F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
CASES = (
    Case("bfloat16", (520, 384, 192)),
    Case("bfloat16 to float32", (384, 192, 520), (BFLOAT16, F32), transposed=(True, False)),
    Case("float32", (520, 384, 192), (F32, F32)),
    Case("float32 to bfloat16, added in place", (65, 48, 40), (F32, BFLOAT16), added="in place"),
    Case("float64", (65, 48, 40), (F64, F64)),
    Case("bias", (520, 384, 192), bias=True, transposed=(False, True)),
    Case("bias in float64", (65, 48, 40), (F64, F64), bias=True),
    Case("bias, added in place", (520, 384, 192), bias=True, added="in place"),
    Case("bias, added out of place", (520, 384, 192), bias=True, added="out of place"),
    Case("added in place to float32", (384, 192, 520), (BFLOAT16, F32), transposed=(True, False), added="in place"),
    Case("batch", (65, 64, 65), batch=(12, 12)),
    Case("a is the same in the batch", (65, 64, 65), batch=(0, 12)),
    Case("b is the same in the batch", (65, 64, 65), batch=(12, 0), transposed=(False, True)),
    Case("odd", (65, 63, 97)),
    Case("odd, transposed", (65, 63, 97), transposed=(True, True)),
    Case("K = 1", (64, 48, 1)),
    Case("N = 1", (64, 1, 48)),
    Case("M = 1", (1, 64, 48)),
)
TOLERANCE = {F32: 1e-5, F64: 1e-13, BFLOAT16: 6e-3}  # of |c - reference| / |reference|, by the type of c


def products(setting: Setting) -> Iterator[dict[str, Any]]:
    """cuBLASLt against NumPy in float64."""
    wrong = 0
    for case in CASES:
        error = _product_error(case)
        right = error < TOLERANCE[case.types[1]]
        wrong += not right
        yield {"product": case.name, "error": error, "right": right}
    checked = len(CASES)
    for types in ((BFLOAT16, F32), (BFLOAT16, BFLOAT16), (F32, F32)):
        for added in (False, True):
            name = f"{types[0]} to {types[1]}, with sums{', added in place' * added}"
            try:
                errors = _sums_errors(types, added)
            except DeviceError as absent:  # then they are computed apart
                yield {"product": name, "absent": str(absent)}
                continue
            right = max(errors) < TOLERANCE[types[1]]
            checked, wrong = checked + 1, wrong + (not right)
            yield {"product": name, "error": errors[0], "error of the sums": errors[1], "right": right}
    yield {"result": f"{checked - wrong} of {checked} products are right"}


def _product_error(case: Case) -> float:
    (M, N, K), (dtype, c_dtype), (a_batch, b_batch), rng = case.size, case.types, case.batch, np.random.default_rng(0)

    def drawn(shape: tuple[int, ...], kind: Any) -> np.ndarray:
        return rng.standard_normal(shape).astype(kind)

    a = drawn((*[a_batch] * bool(a_batch), *((K, M) if case.transposed[0] else (M, K))), dtype)
    b = drawn((*[b_batch] * bool(b_batch), *((N, K) if case.transposed[1] else (K, N))), dtype)
    batch = max(a_batch, b_batch)
    c_shape = (*[batch] * bool(batch), M, N)
    bias = drawn((N,), F64 if c_dtype == F64 else F32) if case.bias else None
    extra = drawn(c_shape, c_dtype) if case.added else None
    left, right = (m.astype(F64).swapaxes(-1, -2) if flip else m.astype(F64) for m, flip in zip((a, b), case.transposed))
    expected = left @ right + (0 if bias is None else bias.astype(c_dtype).astype(F64)) + (0 if extra is None else extra.astype(F64))
    there = [None if m is None else arrays.array_on("cuda", m) for m in (a, b, bias, extra)]
    c = there[3] if case.added == "in place" else arrays.array_on("cuda", np.full(c_shape, np.nan, c_dtype))
    options: dict[str, Any] = {"transpose_a": case.transposed[0], "transpose_b": case.transposed[1]}
    if case.bias:
        options |= {"bias": there[2], "flags": epilogue.RESIDUAL if case.added else 0, "extra": there[3] if case.added else None}
    elif case.added:
        options["running"] = there[3]
    gemm(c, there[0], there[1], **options)
    return float(np.linalg.norm(arrays.to_numpy(c).astype(F64) - expected) / np.linalg.norm(expected))


def _sums_errors(types: tuple[Any, Any], added: bool) -> tuple[float, float]:
    """Of a weight's gradient and of its bias's, from one product."""
    (M, N, K), rng = (384, 192, 520), np.random.default_rng(0)
    dy, x, before = (
        rng.standard_normal(shape).astype(kind) for shape, kind in (((K, M), types[0]), ((K, N), types[0]), ((M, N), types[1]))
    )
    there = [arrays.array_on("cuda", m) for m in (before if added else np.full_like(before, np.nan), dy, x, np.full(M, np.nan, types[1]))]
    product = Product(1, M, N, K, 0, 0, True, False, sums=True)
    product.run(None, (*there, there[0] if added else None, arrays.empty((WORKSPACE,), np.uint8, "cuda")))
    expected = dy.astype(F64).T @ x.astype(F64) + (before.astype(F64) if added else 0), dy.astype(F64).sum(0)
    found = (arrays.to_numpy(m).astype(F64) for m in (there[0], there[3]))
    error, sums_error = (float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected))
    return error, sums_error


# ------------------------------------------------------------------------------------------------------------------------ speed
def choices(setting: Setting) -> Iterator[dict[str, Any]]:
    """Each product of the step of batch 1024: the algorithms that cuBLASLt ranks first, the chosen one, and what adding to c costs."""
    trainer = Trainer(model_of(setting), precision="bfloat16", device="cuda")
    config, batch = trainer.model.config, 4 if setting.tiny else 1024
    trainer.step(np.random.default_rng(0).standard_normal((batch, *config.image_shape), np.float32), np.zeros(batch, np.int64))
    seen = _products_of(trainer.plans[-1])
    first = best = taken = added = 0.0
    for (product, described, in_place, name), times in seen.items():
        operands = [None if d is None else _random_array(*d) for d in described[:4]]
        workspace, other = arrays.empty((WORKSPACE,), np.uint8, "cuda"), _random_array(*described[0])
        extras = {"beta 0": None, "beta 1 in place": operands[0], "beta 1 out of place": other}
        as_it_is = "beta 0" if described[4] is None else "beta 1 in place" if in_place else "beta 1 out of place"
        given = [*operands, extras[as_it_is], workspace]
        ranks = [_product_seconds(product._replace(rank=rank), given, setting) for rank in range(2 if setting.tiny else RANKS)]
        by_beta = {beta: _product_seconds(product, [*operands, extra, workspace], setting) for beta, extra in extras.items()}
        usable, chosen = [seconds for seconds in ranks if seconds is not None], by_beta[as_it_is]
        if not usable or chosen is None or by_beta["beta 0"] is None:
            yield {"product": product.label, "of": name, "right": False, "seconds by rank": ranks} | by_beta
            continue
        first, best, taken = first + times * usable[0], best + times * min(usable), taken + times * chosen
        added += times * (chosen - by_beta["beta 0"])
        yield (
            {"product": product.label, "of": name, "times": times, "bias": operands[3] is not None, "as": as_it_is}
            | by_beta
            | {
                "seconds by rank": ranks,
                "best rank": ranks.index(min(usable)),
                "chosen": chosen,
                "right": operands[0].nbytes > COMPARED or _same_bits(product, [*operands, None, workspace]),
                "TFLOP/s": product.operations / chosen / 1e12,
            }
        )
    yield {"chosen ms": 1e3 * taken, "adding ms": 1e3 * added}
    told = f"products {1e3 * first:.3f} ms, with the best algorithms {1e3 * best:.3f} ms, with the chosen ones {1e3 * taken:.3f} ms"
    yield {"first ms": 1e3 * first, "best ms": 1e3 * best}
    together = apart = 0.0
    for (product, described, _, _), times in seen.items():
        if product.transpose_a and can_sum(product, described[1][1], described[0][1]):  # a weight's gradient
            entry = _sums_seconds(product, described, setting)
            if entry["with sums"] is not None and entry["apart"] is not None:
                together, apart = together + times * entry["with sums"], apart + times * entry["apart"]
            yield entry | {"times": times}
    told += f"; gradients of weights and biases in one product {1e3 * together:.3f} ms, apart {1e3 * apart:.3f} ms"
    yield {"together ms": 1e3 * together, "apart ms": 1e3 * apart, "result": told}


def _products_of(plan: Plan) -> Counter[tuple]:
    """How often a plan has each product: (the product, the shapes and dtypes of its arrays, whether it adds in place, the op)."""
    seen = Counter[tuple]()
    for (call, _), (kernel, _, arguments) in zip(plan.labels, plan.recorded):
        if isinstance(kernel, Product):
            described = tuple(None if a is None else (tuple(a.shape), np.dtype(a.dtype)) for a in arguments[:5])
            in_place = arguments[4] is not None and isinstance(arguments[0], View) and arguments[4] == arguments[0]
            seen[kernel, described, in_place, f"{call.op.name}, {call.phase}" if call else ""] += 1
    return seen


def _sums_seconds(product: Product, described: tuple, setting: Setting) -> dict[str, Any]:
    """A weight's gradient with the sums that are its bias's, in one product, and both computed apart."""
    c, a, b = (_random_array(*d) for d in described[:3])
    sums, workspace = arrays.empty((product.rows,), c.dtype, "cuda"), arrays.empty((WORKSPACE,), np.uint8, "cuda")
    plain = _product_seconds(product._replace(sums=False), [c, a, b, None, None, workspace], setting)
    columns = gpu.seconds_of(Plan(lambda: column_sums(sums, a) or sums, device="cuda").replay, setting.budget / 2)
    whole = _product_seconds(product._replace(sums=True), [c, a, b, sums, None, workspace], setting)
    apart = None if plain is None else plain + columns
    entry = {"gradients": product._replace(sums=False).label, "with sums": whole, "apart": apart, "sums alone": columns}
    return entry | {"chosen": "with sums" if devices.runtime().sums(product._replace(sums=True), a.dtype, c.dtype) else "apart"}


def _random_array(shape: tuple[int, ...], dtype: np.dtype) -> Any:
    return arrays.array_on("cuda", gpu.Repeated().standard_normal(shape).astype(dtype))


def _product_seconds(product: Product, operands: list[Any], setting: Setting, calls: int = 20) -> float | None:
    """Seconds of a product; None if it does not run with its algorithm."""
    try:
        graph = devices.runtime().prepare([(product, None, operands)] * calls)
    except DeviceError:
        return None
    return gpu.seconds_of(graph.run, setting.budget / 4) / calls


def _same_bits(product: Product, operands: list[Any]) -> bool:
    results = []
    for _ in range(2):
        product.run(None, operands)
        results.append(arrays.to_numpy(operands[0]).tobytes())
    return results[0] == results[1]
