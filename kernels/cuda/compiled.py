"""The cache of compiled kernels, in the user's cache folder: each is compiled once per GPU architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from ...files import atomic_file
from ..core.cache import cache_folder, is_used, make_private, say_not_kept
from .kernel import Kernel
from .nvrtc import OPTIONS, compile_kernel, headers, source_of, version

Code = tuple[str, bytes]  # the name of the function, and the cubin that contains it


@cache
def _folder(source: str, architecture: str) -> Path:
    """The cache folder for kernels compiled from exactly this source and these headers, by this version of the compiler."""
    digest = hashlib.sha256(" ".join((*OPTIONS, *map(str, version()))).encode())
    for text in (source, *headers().values()):
        digest.update(b"\0" + text.encode())
    return cache_folder() / "cuda" / f"{architecture}-{digest.hexdigest()[:16]}"


def compiled(kernel: Kernel, architecture: str) -> Code:
    """A kernel's machine code, from the cache or the compiler. Raises DeviceError if it does not compile."""
    folder = _folder(source_of(kernel), architecture)
    path = folder / f"{hashlib.sha256(kernel.expression.encode()).hexdigest()[:24]}.cubin"
    used = is_used(folder)
    code = read_kept(path) if used else None
    if code is None:
        binary = compile_kernel(kernel, architecture)
        code = binary.name, binary.code
        if used:
            keep(path, code)
    return code


def read_kept(path: Path) -> Code | None:
    """What `keep` wrote; None if the file is absent or damaged."""
    try:
        name, digest, code = path.read_bytes().split(b"\n", 2)
        return (name.decode(), code) if digest.decode() == hashlib.sha256(code).hexdigest() else None
    except (OSError, ValueError):
        return None


def keep(path: Path, code: Code, what: str = "compiled kernels", instead: str = "they are compiled for this process alone") -> None:
    """Write a name of one line and bytes to a file of the cache; where that fails, say once that they are not kept."""
    try:
        make_private(path.parent)
        with atomic_file(path) as file:
            file.write(b"\n".join((code[0].encode(), hashlib.sha256(code[1]).hexdigest().encode(), code[1])))
    except OSError as error:
        say_not_kept(path.parent, error, what, instead)


def compile_all(kernels: Iterable[Kernel], architecture: str) -> None:
    """Compile in parallel all kernels that are not in the cache."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: compiled(kernel, architecture), set(kernels)))
