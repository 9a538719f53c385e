"""What `minivit info` tells: the machine as the kernels see it, and the versions underneath; or what a model is and costs."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .errors import UserError, nearest

# The instruction sets that decide how fast a product is, as llvmlite names them.
INSTRUCTIONS = (
    "sse4.2",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avxvnni",
    "avx512f",
    "avx512bw",
    "avx512vnni",
    "avx512bf16",
    "avx512fp16",
    "amx-tile",
    "amx-bf16",
    "amx-int8",
    "neon",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
    "sme",
)
PACKAGES = ("numpy", "numba", "llvmlite", "safetensors", "pillow", "tqdm", "pooch", "matplotlib", "cupy-cuda13x", "ml_dtypes")


def collect() -> dict[str, Any]:
    """Everything by name, ready for JSON. Imports Numba, compiles nothing that training would not."""
    import numba

    from .kernels.core.cache import cache_folder
    from .kernels.cpu import run
    from .precision import fastest

    gpu, reason = _gpu()
    return {
        "minivit": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "instructions": _instructions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": run.threads(),
        "most_threads": run.most_threads(),
        "precision": fastest(),
        "threading_layer": numba.threading_layer(),  # known, for `cpu` has loaded a parallel loop
        "blas": _blas(),
        "gpu": gpu,
        "gpu_note": reason,
        "cache": str(cache_folder()),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def describe(found: dict[str, Any]) -> str:
    """`collect()` as aligned lines."""
    rows = {
        "minivit": found["minivit"],
        "Python": f"{found['python']}, {found['system']}",
        "CPU": f"{found['cpu']}, {found['cores']} cores",
        "instructions": " ".join(found["instructions"]) or "none of those that kernels use",
        "threads": f"{found['threads']}, or 1 ... {found['most_threads']} by --threads; threading layer {found['threading_layer']}",
        "precision": "auto is {}: {}".format(*found["precision"]),
        "BLAS of NumPy": found["blas"],
        "GPU": found["gpu"] or f"none: {found['gpu_note']}",
        "cache": found["cache"],
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    }
    return _aligned(rows)


def collect_model(name: str) -> dict[str, Any]:
    """A model by name, ready for JSON: its input, its parameters, and its multiply-adds for one image (`minivit.cost`).

    name: a preset or family of `create_model`, or a run as `load` takes it. Raises UserError where there is neither.
    """
    from .models import DVT, FAMILIES, PRESETS, create_model
    from .predict import load

    if name in PRESETS or name in FAMILIES:
        known = {field.name for field in fields((FAMILIES.get(name) or PRESETS[name]).Config)}
        options: dict[str, Any] = {"init": "zeros"} if "init" in known else {}  # so that the largest takes no time either
        model = create_model(name, **options)
    elif Path(name).expanduser().exists() or Path("runs", name).exists():
        model = load(name).model
    else:
        raise UserError(f"{name} is no model{nearest(name, [*PRESETS, *FAMILIES])} and no run: list_models() names the models")
    parameters = {id(p): p for p in model.parameters()}.values()  # a shared one once
    config, cost = model.config, model.cost()
    return {
        "model": model.name,
        "family": model.family,
        "input": [config.in_channels, config.image_size, config.image_size],
        "classes": config.num_classes,
        "dtype": config.dtype,
        "parameters": sum(p.size for p in parameters),
        "trainable": sum(p.size for p in parameters if p.requires_grad),
        "macs": cost.total,
        "exits": list(cost.exits),
        "layers": dict(cost.layers),
        "activations": cost.activations,
        "calibration": model.calibration.to_json() if isinstance(model, DVT) and model.calibration else None,
    }


def describe_model(found: dict[str, Any], layers: bool = False) -> str:
    """`collect_model()` as aligned lines; with `layers`, the table by layer below."""
    from .cost import ModelCost

    total, frozen = found["macs"], found["parameters"] - found["trainable"]
    rows = {
        "model": found["model"] + (f" ({found['family']})" if found["family"] != found["model"] else ""),
        "input": f"({', '.join(map(str, found['input']))}), {found['dtype']}",
        "classes": str(found["classes"]),
        "parameters": f"{found['parameters']:,}" + (f", {frozen:,} of them frozen" if frozen else ""),
        "multiply-adds": f"{total:,} an image",
        "activations": f"{found['activations']:,} numbers an image",
    }
    if len(found["exits"]) > 1:
        rows |= {f"up to exit {k}": f"{macs:,} ({100 * macs / total:.1f} %)" for k, macs in enumerate(found["exits"], 1)}
    if found["calibration"]:
        kept = found["calibration"]
        where = f" ({kept['measured']})" if kept["measured"] else ""
        rows["budgets"] = f"{', '.join(f'{budget:.6g}' for budget in kept['budgets'])}, unit {kept['unit']}{where}"
    table = f"\n\n{ModelCost(found['layers'], tuple(found['exits']), found['activations'])}" if layers else ""
    return _aligned(rows) + table


def _aligned(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """What the processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if asked.returncode == 0:
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def _instructions() -> list[str]:
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return [name for name in INSTRUCTIONS if features.get(name)]


def _blas() -> str:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas['name']} {blas['version']}"


def _gpu() -> tuple[str | None, str]:
    """The first GPU's name, or None and why there is none."""
    try:
        import cupy
    except ImportError:
        return None, "CuPy is not installed (pip install 'minivit[cuda]')"
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(0)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return None, str(error)
    memory = properties["totalGlobalMem"] / 2**30
    return f"{properties['name'].decode()}, {memory:.0f} GiB, sm_{properties['major']}{properties['minor']}", ""
