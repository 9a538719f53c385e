"""How a CUDA kernel is named, compiled and run.

    _source = Source("layernorm")                       # kernels/layernorm.cu: function templates over the type of what they store
    launch(_source("layernorm_forward", x.dtype), Grid(blocks, threads, shared), y, x, eps)         # as for CPU kernels

Template arguments are dtypes, whole numbers and truth values. A kernel's parameters are pointers for arrays (null for None), `long` or
`int` for whole numbers and truth values, `double` for other numbers. It sees C-contiguous arrays from their first element, and writes only
what it is given to write. No kernel adds to memory atomically: results are the same bit for bit in every run.

Kernels run by a `core.devices.Runtime`: CuPy's on a GPU (`cupy_runtime.py`); tests put another one in its place, which runs the same
sources on a CPU. A float64 array is `double`, float32 `float`, bfloat16 `bf16` (`common.cuh`); sums of bfloat16 are `float`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.devices import runtime

FOLDER = Path(__file__).resolve().parent.parent  # of the sources
TYPES = {"float32": "float", "float64": "double", "bfloat16": "bf16", "int64": "long", "uint64": "unsigned long", "uint8": "unsigned char"}


class Grid(NamedTuple):
    """How many blocks run, of how many threads each, with how many bytes of dynamic shared memory."""

    blocks: int
    threads: int
    shared: int = 0


class Kernel(NamedTuple):
    """An instance of a function template; see the head of this file."""

    source: str  # file name without .cu
    name: str
    arguments: tuple[str, ...]  # of the template, as they are written
    prepares: bool = False  # as `cpu.kernel.Kernel.prepares`

    @property
    def label(self) -> str:
        return self.name

    @property
    def expression(self) -> str:
        """As C++ writes it."""
        return f"{self.name}<{', '.join(self.arguments)}>" if self.arguments else self.name

    def run(self, grid: Grid, arguments: Sequence[Any]) -> None:
        """Run it now."""
        runtime().launch(self, grid, arguments)


class Source:
    """The kernels of one .cu file: source(name, *template arguments) gives one.

    prepares: whether the first array is a function of the others alone, and all that is written: a plan that knows these to stay as they
        are runs the kernel once.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, name: str, *arguments: Any, prepares: bool = False) -> Kernel:
        return Kernel(self.name, name, tuple(map(_written, arguments)), prepares)


@lru_cache(maxsize=None, typed=True)  # for 1 == True
def _written(argument: Any) -> str:
    if isinstance(argument, (bool, np.bool_)):
        return "true" if argument else "false"
    return str(argument) if isinstance(argument, int) else TYPES[np.dtype(argument).name]


def blocks_for(size: int, threads: int, most: int = 8) -> int:
    """Blocks of a kernel whose threads stride over `size` items: at least one, at most `most` a multiprocessor."""
    return max(1, min(-(-size // threads), most * runtime().multiprocessors))
