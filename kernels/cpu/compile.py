"""Compiling functions, and the cache of compiled functions.

The cache is a folder inside the user's cache folder, named by a hash of all kernel sources: Numba detects an edited function, but not an
edited callee in another file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import njit

from ..core.cache import cache_folder

# Reassociation allows sums to vectorise. Without nnan and ninf, so that NaN propagates.
OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy"}


@cache
def kernel_cache() -> Path:
    """The folder of the kernels compiled from exactly these sources."""
    folder = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return cache_folder() / "kernels" / digest.hexdigest()[:16]


def has_compiled_kernels() -> bool:
    """Whether the cache contains any kernels; the loops of `run.py`, which every start compiles, do not count."""
    return any(not file.name.startswith("run.") for file in kernel_cache().rglob("*.nbi"))


def cached(compile: Callable, function: Callable) -> Any:
    """`compile(function)` with Numba's cache in minivit's folder; other users of Numba are not affected."""
    previous = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(kernel_cache())  # Numba reads it while it decorates
    try:
        return compile(function)
    finally:
        numba.config.CACHE_DIR = previous


def routine(function: Callable) -> Callable:
    """Decorator for a function that kernels call: compiled once, and inlined by LLVM where this pays off."""
    return njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)
