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
from minivit.kernels.core import devices
from minivit.kernels.core.cases import Sample, make_inputs, shrunk
from minivit.kernels.core.dtypes import BFLOAT16
from minivit.kernels.cuda import nvrtc
from minivit.kernels.cuda.compiled import compile_all
from minivit.kernels.cuda.product import ranked
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
def model_of(setting: Setting) -> Any:
    return create_model("vit_nano_patch2_8", seed=0, **TINY) if setting.tiny else create_model("vit", seed=0, **MODEL)


def profile_small(setting: Setting) -> Iterator[dict[str, Any]]:
    yield from _profile(setting, 128)


def profile_large(setting: Setting) -> Iterator[dict[str, Any]]:
    yield from _profile(setting, 1024)


def _profile(setting: Setting, batch: int) -> Iterator[dict[str, Any]]:
    rates = product_rate(BFLOAT16, setting.tiny, "cuda"), memory_rate(setting.tiny, "cuda")
    found = profile(model_of(setting), 4 if setting.tiny else batch, "bfloat16", device="cuda", rates=rates)
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
