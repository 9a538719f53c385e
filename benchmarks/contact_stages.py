"""The stages of `first_contact`: generators of entries. `right` in an entry says whether something was, `result` is for the table."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

import minivit
from minivit import Predictor, Trainer, create_model
from minivit.errors import DeviceError
from minivit.kernels import OPS
from minivit.kernels.core import arrays, devices, epilogue
from minivit.kernels.core.cases import Sample, make_inputs, shrunk
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.core.recording import View
from minivit.kernels.cuda import nvrtc
from minivit.kernels.cuda.compiled import compile_all
from minivit.kernels.cuda.gemm import column_sums, gemm
from minivit.kernels.cuda.product import WORKSPACE, Product, can_sum, ranked
from minivit.runtime.plan import Plan
from minivit.testing.numerics import check_accuracy
from minivit.testing.result import CheckResult
from minivit.training.profiling import memory_rate, product_rate, profile

from . import gpu

ROOT = Path(__file__).resolve().parent.parent
MODEL: dict[str, Any] = {"image_size": 32, "patch_size": 4, "dim": 384, "depth": 7, "heads": 6, "mlp_ratio": 1.0}  # ViT, 6.3 M, 65 tokens
TINY: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2}
NANO = ("vit_nano_patch2_8", "mixer_nano_patch2_8", "deepvit_nano_patch2_8", "dvt_nano_8")
PACKAGES = ("cupy-cuda13x", "numpy", "numba", "ml_dtypes", "torch", "cuda-pathfinder", "nvidia-cuda-nvrtc", "nvidia-cublas", "safetensors")
PRECISIONS = ("float32", "bfloat16")
RANKS = 8  # algorithms of cuBLASLt that are tried
COMPARED = 16 << 20  # bytes of a product that is computed twice, at most, to see whether its bits are the same


class Setting(NamedTuple):
    """What a stage is told: tiny sizes, a folder of images or None, the seconds that it may take."""

    tiny: bool
    data: Path | None
    seconds: float

    @property
    def budget(self) -> float:
        """Seconds for one measurement."""
        return 0.02 if self.tiny else 0.2


def _emulation(module: str) -> Any:
    """A module of the tests' emulation."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    return import_module(f"cuda_emulation.{module}")


@contextmanager
def device(tiny: bool) -> Iterator[Any]:
    """Context manager: inside there is a GPU, or with `tiny` at least its emulation."""
    try:
        yield devices.runtime()
    except DeviceError:
        if not tiny:
            raise
        with devices.using(_emulation("emulator").Emulator(choose=True)) as emulated:
            yield emulated


# ------------------------------------------------------------------------------------------------------------------- what is there
def probe(setting: Setting) -> Iterator[dict[str, Any]]:
    runtime = devices.runtime()
    yield {"gpu": runtime.name, "architecture": runtime.architecture, "multiprocessors": runtime.multiprocessors, "result": runtime.name}
    yield {"versions": {name: found for name in PACKAGES if (found := _version(name))}, "python": sys.version.split()[0]}
    try:
        yield {"nvrtc": ".".join(map(str, nvrtc.version()))}
        import cupy

        free, total = cupy.cuda.runtime.memGetInfo()
        driver, toolkit = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
        yield {"driver": driver, "toolkit": toolkit, "free GB": free / 1e9, "total GB": total / 1e9}
    except (ImportError, DeviceError) as error:
        yield {"absent": str(error)}
    for name in ("torch", "pytest", "PIL", "tqdm", "safetensors"):
        start = perf_counter()
        try:
            import_module(name)
        except ImportError as error:
            yield {"absent": name, "error": str(error)}
        else:
            yield {"import": name, "seconds": perf_counter() - start}
    product, memory = product_rate(BFLOAT16, setting.tiny, "cuda"), memory_rate(setting.tiny, "cuda")
    yield {"product rate": product, "memory rate": memory, "result": f"{memory / 1e12:.2f} TB/s, {product / 1e12:.0f} TFLOP/s"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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


def ops(setting: Setting) -> Iterator[dict[str, Any]]:
    """Every op of the tests against its reference."""
    wrong = checked = 0
    for op in OPS.values():
        result, start = CheckResult(), perf_counter()
        for case in op.cases[:1] if setting.tiny else op.cases:
            for dtype in ("bfloat16",) if setting.tiny else ("float32", "bfloat16"):
                rng = np.random.default_rng(0)
                sample = Sample(op, *make_inputs(op, shrunk(op, case, *((2_000, 1_000_000) if setting.tiny else ())), dtype, rng))
                if sample.dtype == dtype:
                    check_accuracy(sample, "cuda", rng, result)
        checked, wrong = checked + 1, wrong + bool(result.failure)
        yield {"op": op.name, "right": not result.failure, "seconds": perf_counter() - start} | (
            {"failure": result.failure} if result.failure else {}
        )
    yield {"result": f"{checked - wrong} of {checked} ops are right"}


def plans(setting: Setting) -> Iterator[dict[str, Any]]:
    """Whether a recorded step equals an eager one, and whether training and prediction follow the CPU."""
    rng = np.random.default_rng(0)
    for name in NANO[:1] if setting.tiny else NANO:
        fields = TINY if setting.tiny else {}
        images, labels = rng.standard_normal((4, 1, 8, 8), np.float32), rng.integers(0, 10, 4)
        for precision in PRECISIONS[1:] if setting.tiny else PRECISIONS:
            trainers = [
                Trainer(create_model(name, seed=0, **fields), device="cuda", precision=precision, plan=p, ema=0.9) for p in (True, False)
            ]
            losses = [[trainer.step(images, labels) for _ in range(3)] for trainer in trainers]
            yield {"plan equals eager": name, "precision": precision, "right": losses[0] == losses[1], "last loss": losses[0][-1]}
        outputs = []
        for place in ("cpu", "cuda"):
            model = create_model(name, seed=0, **fields)
            model.load_state_dict(trainers[0].model.state_dict())
            outputs.append(Predictor(model, "float32", place)(images))
        distance = float(np.abs(np.subtract(*outputs)).max() / np.abs(outputs[0]).max())
        yield {"predictor": name, "distance": distance, "right": distance < 1e-3, "result": f"logits differ by {distance:.1e}"}
    if not setting.tiny:
        distance = gpu.curve_distance(100)
        yield {"loss curves of GPU and CPU": distance, "right": distance < 1e-2, "result": f"curves differ by {distance:.1e}"}


def memcheck(setting: Setting) -> Iterator[dict[str, Any]]:
    """One step of the nano models under compute-sanitizer's memcheck, where it is there."""
    tool = shutil.which("compute-sanitizer") or next(iter(Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)
    if tool is None:
        yield {"absent": "compute-sanitizer", "result": "compute-sanitizer is not there"}
        return
    command = [str(tool), "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.first_contact"]
    command += ["--stage", f"{__name__}:one_step", *["--tiny"] * setting.tiny]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    yield {"memcheck": "one step", "right": done.returncode == 0, "output": done.stdout[-3000:], "result": f"exit status {done.returncode}"}


def one_step(setting: Setting) -> Iterator[dict[str, Any]]:
    for name in NANO[:2]:
        model = create_model(name, seed=0)
        images = np.random.default_rng(0).standard_normal((3, *model.config.image_shape), np.float32)
        for precision in ("float32", "bfloat16"):
            with ranked(0):  # to time algorithms here would take minutes
                yield {"loss": Trainer(model, device="cuda", precision=precision, plan=False).step(images, np.arange(3))}


# ------------------------------------------------------------------------------------------------------------------------ speed
def _model(setting: Setting) -> Any:
    return create_model("vit_nano_patch2_8", seed=0, **TINY) if setting.tiny else create_model("vit", seed=0, **MODEL)


def profile_small(setting: Setting) -> Iterator[dict[str, Any]]:
    yield from _profile(setting, 128)


def profile_large(setting: Setting) -> Iterator[dict[str, Any]]:
    yield from _profile(setting, 1024)


def _profile(setting: Setting, batch: int) -> Iterator[dict[str, Any]]:
    rates = product_rate(BFLOAT16, setting.tiny, "cuda"), memory_rate(setting.tiny, "cuda")
    found = profile(_model(setting), 4 if setting.tiny else batch, "bfloat16", device="cuda", rates=rates)
    print(found, found.by_launch(), sep="\n")
    moved, floor = sum(launch.bytes for launch in found.launches), sum(launch.floor for launch in found.launches)
    yield {
        "batch": batch,
        "step ms": found.step,
        "launches": len(found.launches),
        "moved GB": moved / 1e9,
        "floor ms": floor,
        "by launch": [[*launch] for launch in (vars(launch).values() for launch in found.launches)],
        "result": f"{found.step:.3f} ms, {len(found.launches)} launches, {moved / 1e9:.1f} GB, the launches' floors {floor:.3f} ms",
    }


def steps_small(setting: Setting) -> Iterator[dict[str, Any]]:
    yield from _steps(setting, 128)


def steps_large(setting: Setting) -> Iterator[dict[str, Any]]:
    yield from _steps(setting, 1024)


def _steps(setting: Setting, batch: int) -> Iterator[dict[str, Any]]:
    family, fields = ("vit_nano_patch2_8", TINY) if setting.tiny else ("vit", MODEL)
    batch = 4 if setting.tiny else batch
    ours = gpu.our_step(family, fields, batch, 5 * setting.budget)
    yield {"batch": batch, "minivit": ours, "result": f"minivit {1e3 * ours['seconds']:.3f} ms"}
    best = float("inf")
    for mode in ("eager", "compiled", "compiled reduce-overhead", "compiled cuDNN attention"):
        entry = _rival(lambda torch, mode=mode: torch.step(create_model(family, seed=0, **fields), batch, mode, _timed(5 * setting.budget)))
        best = min(best, entry.get("seconds", best))
        against = f"minivit {1e3 * ours['seconds']:.3f} ms, PyTorch's best {1e3 * best:.3f} ms" if best < float("inf") else "no rival ran"
        yield {"batch": batch, "mode": mode, **entry, "result": against}


def _timed(budget: float) -> Callable[[Callable[[], Any], Callable[[], None]], float]:
    return lambda run, wait: gpu.seconds_of(run, budget, wait)


def _rival(measure: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What is measured of PyTorch, or why it is not: whatever a rival raises is no reason to learn nothing more."""
    try:
        from . import gpu_torch

        return measure(gpu_torch)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def alone(setting: Setting) -> Iterator[dict[str, Any]]:
    """Attention and layer normalisation beside PyTorch's, forward and backward."""
    sizes = ((2, 5),) if setting.tiny else ((128, 65), (1024, 65), (256, 197), (256, 257))
    for op, case in (("attention", {"H": 6, "D": 64, "bias": None, "scale": 0.125}), ("layernorm", {"C": 384})):
        for batch, tokens in sizes:
            entry: dict[str, Any] = {"op": op, "batch": batch, "tokens": tokens}
            given = {"B": batch, "N": tokens, **case}
            call = Sample(OPS[op], *make_inputs(OPS[op], given, "bfloat16", gpu.Repeated()))
            for direction, plan in gpu.planned(call):
                entry[direction] = gpu.seconds_of(plan.replay, setting.budget)
                entry[f"{direction} GB/s"] = sum(moved for moved, _ in plan.work) / entry[direction] / 1e9
            rival = _rival(lambda torch, op=op, batch=batch, tokens=tokens: torch.alone(op, batch, tokens, _timed(setting.budget)))
            yield entry | {"PyTorch": rival}


def choices(setting: Setting) -> Iterator[dict[str, Any]]:
    """Each product of the step of batch 1024: the algorithms that cuBLASLt ranks first, the chosen one, and what adding to c costs."""
    seen: dict[tuple, int] = {}
    trainer = Trainer(_model(setting), precision="bfloat16", device="cuda")
    config, batch = trainer.model.config, 4 if setting.tiny else 1024
    trainer.step(np.random.default_rng(0).standard_normal((batch, *config.image_shape), np.float32), np.zeros(batch, np.int64))
    plan = trainer.plans[-1]
    for (call, _), (kernel, _, arguments) in zip(plan.labels, plan.recorded):
        if isinstance(kernel, Product):
            described = tuple(None if a is None else (tuple(a.shape), np.dtype(a.dtype)) for a in arguments[:5])
            in_place = arguments[4] is not None and isinstance(arguments[0], View) and arguments[4] == arguments[0]
            key = kernel, described, in_place, f"{call.op.name}, {call.phase}" if call else ""
            seen[key] = seen.get(key, 0) + 1
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


def recipe(setting: Setting) -> Iterator[dict[str, Any]]:
    """A training on images as long as there is time, with the default recipe."""
    if setting.data is None:
        yield {"result": "no --data"}
        return
    minutes = max(0.05, (setting.seconds - 25) / 60)  # so that it ends by itself
    with TemporaryDirectory() as folder:
        start = perf_counter()
        run = minivit.train(data=setting.data, device="cuda", minutes=minutes, seed=0, out=Path(folder) / "run", progress=False)
        yield {"minutes": minutes, "seconds": perf_counter() - start, "accuracy": run.test_accuracy} | {
            "result": f"{run.test_accuracy:.2%} in {minutes:.1f} minutes"
        }


# ------------------------------------------------------------------------------------------------------------------- compilation
def compile_kernels(architecture: str, tiny: bool) -> int:
    """Compile what the stages launch into the user's cache folder; returns the number of kernels."""
    listing = _emulation("listing")
    used = set() if tiny else listing.kernels_of_ops()
    with devices.using(listing.Listing()) as runtime:
        runtime.multiprocessors = 132
        models = [create_model(NANO[0])] if tiny else [*(create_model(name) for name in NANO), create_model("vit", **MODEL)]
        for model in models:
            images = np.zeros((4, *model.config.image_shape), np.float32)
            for precision in PRECISIONS:
                Predictor(model, precision, "cuda").logits(images)
                Trainer(model, precision=precision, device="cuda", ema=0.9).step(images, np.zeros(4, np.int64))
                Trainer(model, precision=precision, device="cuda").step(images, np.zeros(4, np.int64))
    used |= runtime.used
    compile_all(used, architecture)
    return len(used)
