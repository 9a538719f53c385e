"""A description of the machine as the kernels see it, and the versions of the libraries."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding

from ..kernels.core.cache import cache_folder
from ..kernels.cpu import run
from ..version import __version__
from .precision import fastest

# The instruction sets that determine the speed of matrix products, by their names in llvmlite.
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


def describe_machine() -> dict[str, Any]:
    """The description as a dict of JSON values. Imports Numba, and compiles nothing that training would not compile."""
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
        "blas": _blas(),
        "gpu": gpu,
        "gpu_note": reason,
        "cache": str(cache_folder()),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as it reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        result = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if result.returncode == 0:
            return result.stdout.strip()
    return platform.processor() or platform.machine()


def _instructions() -> list[str]:
    features = binding.get_host_cpu_features()
    return [name for name in INSTRUCTIONS if features.get(name)]


def _blas() -> str:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas['name']} {blas['version']}"


def _gpu() -> tuple[str | None, str]:
    """(the first GPU's name, ""), or (None, the reason why there is none)."""
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
