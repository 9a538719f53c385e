"""CUDA kernels: naming and launching.

    _source = Source("layernorm")                       # kernels/layernorm.cu: function templates over the element type
    launch(_source("layernorm_forward", x.dtype), Grid(blocks, threads, shared), y, x, eps)         # core.recording.launch

Template arguments are dtypes, integers and booleans. A kernel's parameters are pointers to the first element of C-contiguous arrays (null
for None), `long` or `int` for integers and booleans, and `double` for other numbers. It writes only its outputs. No kernel uses atomic
additions: results are bit-identical in every run.

Kernels are run by a `core.devices.Runtime`: CuPy's on a GPU (`cupy_runtime.py`); tests replace it by one that runs the same sources on a
CPU. A float64 array is `double`, float32 `float`, bfloat16 `bf16` (`ptx.cuh`); sums of bfloat16 are `float`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.devices import runtime

FOLDER = Path(__file__).resolve().parent.parent  # folder of the sources
TYPES = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "bf16",
    "int32": "int",
    "int64": "long",
    "uint64": "unsigned long",
    "uint8": "unsigned char",
}


class Grid(NamedTuple):
    """The number of blocks, of threads per block, and of bytes of dynamic shared memory per block."""

    blocks: int
    threads: int
    shared: int = 0


class Kernel(NamedTuple):
    """An instance of a function template; see the module docstring."""

    source: str  # file name without .cu
    name: str
    arguments: tuple[str, ...]  # of the template, as C++ text
    prepares: bool = False  # see `cpu.kernel.Kernel.prepares`

    @property
    def label(self) -> str:
        return self.name

    @property
    def expression(self) -> str:
        """The instance as a C++ expression."""
        return f"{self.name}<{', '.join(self.arguments)}>" if self.arguments else self.name

    def run(self, grid: Grid, arguments: Sequence[Any]) -> None:
        """Run it immediately."""
        runtime().launch(self, grid, arguments)


class Source:
    """The kernels of one .cu file: source(name, *template arguments) returns one.

    prepares: whether the first array is the only output and depends on the other arrays alone: a plan in which these are constant runs the
        kernel only once.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, name: str, *arguments: Any, prepares: bool = False) -> Kernel:
        return Kernel(self.name, name, tuple(map(_cpp_text, arguments)), prepares)


@lru_cache(maxsize=None, typed=True)  # typed, as 1 == True
def _cpp_text(argument: Any) -> str:
    if isinstance(argument, (bool, np.bool_)):
        return "true" if argument else "false"
    return str(argument) if isinstance(argument, int) else TYPES[np.dtype(argument).name]


def blocks_for(size: int, threads: int, most: int = 8) -> int:
    """The number of blocks for a grid-stride loop over `size` items: at least one, at most `most` per multiprocessor."""
    return max(1, min(-(-size // threads), most * runtime().multiprocessors))
