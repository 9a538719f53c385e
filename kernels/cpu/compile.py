"""Compiling functions, and the cache of compiled functions.

The cache is a folder inside the user's cache folder, or inside NUMBA_CACHE_DIR, named by a hash of all kernel sources: Numba detects an
edited function, but not an edited callee in another file. An interrupt waits until a function is compiled: Numba is called back from C,
where a KeyboardInterrupt would be lost.
"""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numba
from numba import njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache, UserProvidedCacheLocator
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic

from ...errors import UserError
from ...interrupts import deferred
from ..core.cache import cache_folder, is_used, make_private, say_not_kept

log = logging.getLogger(__name__)
if numba.config.DISABLE_JIT:
    raise UserError("NUMBA_DISABLE_JIT is set, and minivit's kernels run compiled only: unset it")

# Reassociation allows sums to vectorise. Without nnan and ninf, so that NaN propagates.
OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "error_model": "numpy"}


@cache
def kernel_cache() -> Path:
    """The folder of the kernels compiled from exactly these sources."""
    folder = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    base = Path(numba.config.CACHE_DIR) / "minivit" if numba.config.CACHE_DIR else cache_folder() / "kernels"
    return base / digest.hexdigest()[:16]


def has_compiled_kernels() -> bool:
    """Whether the cache contains any kernels; the loops of `run.py` and `team.py`, which every start compiles, do not count."""
    return any(not file.name.startswith(("run.", "team.")) for file in _files(kernel_cache(), "*/*.nbi"))


def _files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that fit a pattern; none if this user may not look into it."""
    try:
        return [*folder.glob(pattern)]
    except OSError:
        return []


class _Locator(UserProvidedCacheLocator):
    """The place of a function's compiled code: a folder per source file inside `kernel_cache()`."""

    def __init__(self, function: Callable, source: str) -> None:
        self._py_file, self._lineno = source, function.__code__.co_firstlineno
        self.folder = kernel_cache() / Path(source).parent.name

    def get_cache_path(self) -> str:
        return str(self.folder)

    def ensure_cache_path(self) -> None:
        make_private(self.folder)

    @classmethod
    def from_function(cls, function: Callable, source: str) -> _Locator:
        return cls(function, source)  # a folder that is not writable can still be read


class _Results(CompileResultCacheImpl):
    _locator_classes: ClassVar = [_Locator]


class _Cache(FunctionCache):
    """Numba's cache in minivit's folder. Without `numba.config`, which other users of Numba and other threads share.

    Damaged files are made again. Where files cannot be written, or others may have written them, kernels are compiled for this process.
    """

    _impl_class = _Results

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        if not self._is_used():
            return None
        try:
            found = super().load_overload(sig, target_context)
            if found is not None and found.signature.args != normalize_signature(sig)[0]:
                raise ValueError("two processes saved code at the same time under one name")  # which Numba does not notice
            return found
        except Exception as error:  # whatever unpickling cut or foreign bytes, or linking their code, raises
            log.debug("compiled code of %s in %s cannot be read: %r", self._py_func.__qualname__, self.cache_path, error)
            self._discard()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        if not self._is_used():
            return
        try:
            super().save_overload(sig, data)
        except OSError as error:
            say_not_kept(kernel_cache(), error)

    def _is_used(self) -> bool:
        return is_used(kernel_cache(), Path(self.cache_path))

    def _discard(self) -> None:
        for file in _files(Path(self.cache_path), f"{glob.escape(self._impl.filename_base)}.*"):
            with suppress(OSError):
                file.unlink()


def _cache_of(function: Callable) -> Any:
    return _Cache(function) if Path(function.__code__.co_filename).is_file() else NullCache()  # a notebook's cell is no file


def compiled_loop(signature: str, function: Callable, **options: Any) -> Any:
    """A function with this signature, compiled by `numba.njit` with these options, or read from the cache."""
    loop = njit(**options)(function)
    loop._cache = _cache_of(function)
    with deferred():
        loop.compile(signature)
    loop.disable_compile()
    return loop


def compiled_entry(signature: Any, function: Callable) -> Any:
    """A C function with this signature, compiled like every kernel, or read from the cache."""
    entry = _entry(signature, function)
    entry._cache = _cache_of(function)
    with deferred():
        entry.compile()
    return entry


class _NotCached(Exception):
    pass


def _entry(signature: Any, function: Callable) -> Any:
    """A C function that is not compiled yet."""
    return CFunc(function, normalize_signature(signature), locals={}, options=OPTIONS)


def cached_entry(signature: Any, function: Callable) -> Any | None:
    """What `compiled_entry` returns, if the cache has it."""

    def compile_nothing() -> None:
        raise _NotCached

    entry = _entry(signature, function)
    entry._cache, entry._compile_uncached = _cache_of(function), compile_nothing
    try:
        with deferred():
            entry.compile()
    except _NotCached:
        return None
    return entry


def assembly(signature: Any, function: Callable) -> str:
    """The assembly language of what `compiled_entry` compiles; not from the cache, which has only machine code."""
    entry = _entry(signature, function)
    with deferred():
        entry.compile()
    return entry._library.get_asm_str()


@intrinsic
def compiled_once(typing_context):
    """In a large routine: LLVM compiles it once, and not once more for some constants."""

    def generate(context, builder, signature, values):
        builder.function.attributes.add("noduplicate")
        return context.get_dummy_value()

    return types.void(), generate


def routine(function: Callable) -> Callable:
    """Decorator for a function that kernels call: compiled once, and inlined by LLVM where this pays off."""
    return njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)
