"""Compiling functions, and the cache of compiled functions.

The cache is a folder inside the user's cache folder, or inside NUMBA_CACHE_DIR, named by a hash of all kernel sources: Numba detects an
edited function, but not an edited callee in another file. An interrupt waits until a function is compiled: Numba is called back from C,
where a KeyboardInterrupt would be lost.
"""

from __future__ import annotations

import gc
import glob
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numba
from numba import _dynfunc, njit, types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache, UserProvidedCacheLocator
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import AnalysisPass, PassManager, register_pass
from numba.core.runtime import rtsys
from numba.core.sigutils import normalize_signature
from numba.core.typed_passes import InlineOverloads, NoPythonBackend, NopythonRewrites, NoPythonSupportedFeatureValidation
from numba.core.types.functions import BaseFunction
from numba.core.untyped_passes import InlineClosureLikes
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
            rtsys.initialize(target_context)  # all that compiled code needs; Numba would import its implementations of Python first
            with self._guard_against_spurious_io_errors():
                found = self._load_overload(sig, target_context)
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


@contextmanager
def _compiling() -> Iterator[None]:
    """Around each compilation: an interrupt waits, and no other thread compiles.

    Numba searches all its implementations for the type of every call, as of int64 + int64, a fifth of the time; here it is found once.
    Python looks for garbage among Numba's many objects, a tenth of the time; here it does so afterwards.
    """
    with deferred(), global_compiler_lock, _without_collection():
        before = BaseFunction.get_call_type
        BaseFunction.get_call_type = _remembered  # type: ignore
        try:
            yield
        finally:
            BaseFunction.get_call_type = before  # type: ignore


@contextmanager
def _without_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_search, _types_of_calls = BaseFunction.get_call_type, dict[Any, Any]()


def _remembered(function: BaseFunction, context: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    key = function, arguments, tuple(sorted(keywords.items()))
    if key not in _types_of_calls:
        _types_of_calls[key] = _search(function, context, arguments, keywords)
    return _types_of_calls[key]


def _cache_of(function: Callable) -> Any:
    return _Cache(function) if Path(function.__code__.co_filename).is_file() else NullCache()  # a notebook's cell is no file


def compiled_loop(signature: str, function: Callable, **options: Any) -> Any:
    """A function with this signature, compiled by `numba.njit` with these options, or read from the cache."""
    loop = njit(**options)(function)
    loop._cache = _cache_of(function)
    with _compiling():
        loop.compile(signature)
    loop.disable_compile()
    return loop


def compiled_entry(signature: Any, function: Callable) -> Any:
    """A C function with this signature, compiled like every kernel, or read from the cache."""
    entry = _entry(signature, function)
    entry._cache = _cache_of(function)
    with _compiling():
        entry.compile()
    return entry


class _NotCached(Exception):
    pass


def _entry(signature: Any, function: Callable) -> Any:
    """A C function that is not compiled yet."""
    return CFunc(function, normalize_signature(signature), locals={}, options=OPTIONS, pipeline_class=_Compiler)


def cached_entry(signature: Any, function: Callable) -> Any | None:
    """What `compiled_entry` returns, if the cache has it."""

    def compile_nothing() -> None:
        raise _NotCached

    entry = _entry(signature, function)
    entry._cache, entry._compile_uncached = _cache_of(function), compile_nothing
    try:
        with _compiling():
            entry.compile()
    except _NotCached:
        return None
    return entry


def assembly(signature: Any, function: Callable) -> str:
    """The assembly language of what `compiled_entry` compiles; not from the cache, which has only machine code."""
    entry = _entry(signature, function)
    with _compiling():
        entry.compile()
    return entry._library.get_asm_str()


@intrinsic
def compiled_once(typing_context):
    """In a large routine: LLVM compiles it once, and not once more for some constants."""

    def generate(context, builder, signature, values):
        builder.function.attributes.add("noduplicate")
        return context.get_dummy_value()

    return types.void(), generate


class _Part(JITCodeLibrary):
    """The code of a routine, which is optimised and becomes machine code as a part of the kernels that call it, and not for itself."""

    def finalize(self) -> None:
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._final_module.verify()
        self._finalized = True


@register_pass(mutates_CFG=False, analysis_only=True)
class _BeginPart(AnalysisPass):
    _name = "begin_part"

    def __init__(self) -> None:
        """Numba wants one."""

    def run_pass(self, state: Any) -> bool:
        state.flags.no_compile = True
        state.library = _Part(state.targetctx.codegen(), state.func_id.func_qualname)
        return False


@register_pass(mutates_CFG=False, analysis_only=True)
class _EndPart(AnalysisPass):
    """Tells Numba how to call a routine that has no address."""

    _name = "end_part"

    def __init__(self) -> None:
        """Numba wants one."""

    def run_pass(self, state: Any) -> bool:
        lowered, library = state["cr"], state.library
        name = lowered.fndesc.qualname
        function = _dynfunc.make_function(lowered.fndesc.lookup_module(), name, name, 0, lowered.env, (library,))
        state.targetctx.insert_user_function(function, lowered.fndesc, [library])
        state["cr"] = lowered._replace(cfunc=function)
        return False


class _Compiler(CompilerBase):
    """Numba's, without looking for what no kernel has: closures, functions to be inlined by Numba, expressions of whole arrays."""

    def define_pipelines(self) -> list[PassManager]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.passes = [each for each in passes.passes if each[0] not in (InlineClosureLikes, InlineOverloads, NopythonRewrites)]
        passes.finalize()
        return [passes]


class _RoutineCompiler(_Compiler):
    def define_pipelines(self) -> list[PassManager]:
        (passes,) = super().define_pipelines()
        passes.add_pass_after(_BeginPart, NoPythonSupportedFeatureValidation)
        passes.passes.insert([each for each, _ in passes.passes].index(NoPythonBackend), (_EndPart, "end part"))
        passes.finalize()
        return [passes]


ROUTINE = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _RoutineCompiler}


def routine(function: Callable) -> Callable:
    """Decorator for a function that kernels call, which LLVM inlines into them where this pays off."""
    return njit(**ROUTINE)(function)
