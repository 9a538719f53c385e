"""The list of ops. They work on plain arrays and know no Tensor.

One op is one file here, or a few that share a derivation, with its CUDA kernels in a .cu beside it. An op is imported, and with it Numba,
when it is first asked for. Below them lie `core`, which every op stands on, and `cpu` and `cuda`, which run kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from .core.devices import Runtime, register_runtime
from .core.op import Op

NAMES = {  # of the ops, by the module that defines them
    "matmul": ("matmul",),
    "linear": ("linear",),
    "attention": ("attention",),
    "mixing": ("channel_mixing", "token_mixing"),
    "layernorm": ("layernorm", "add_layernorm"),
    "token_layernorm": ("token_layernorm",),
    "unfold": ("unfold",),
    "resample": ("resample",),
    "arithmetic": ("add", "subtract", "multiply", "divide"),
    "gelu": ("gelu",),
    "softmax": ("softmax",),
    "reduce_sum": ("reduce_sum",),
    "broadcast": ("broadcast",),
    "permute": ("permute",),
    "slice": ("slice",),
    "concatenate": ("concatenate", "concatenate_3", "split", "split_3"),
    "random": ("dropout", "drop_path"),
    "loss": ("cross_entropy", "soft_cross_entropy"),
    "begin_update": ("begin_update",),
    "adamw": ("adamw",),
    "sgd": ("sgd",),
    "augment": ("augment",),
}


class Ops(Mapping[str, Op]):
    """The ops by name; each is imported when it is first looked up."""

    def __init__(self) -> None:
        self._modules = {name: module for module, names in NAMES.items() for name in names}
        self._loaded: dict[str, Op] = {}

    def __getitem__(self, name: str) -> Op:
        if name not in self._loaded:
            module = import_module(f".{self._modules[name]}", __name__)
            self._loaded[name] = next(value for value in vars(module).values() if isinstance(value, Op) and value.name == name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


OPS = Ops()


def primitives(device: str) -> Any:
    """The copies, sums and products of a device, "cpu" or "cuda": its module `primitives`."""
    return import_module(f".{device}.primitives", __name__)


def _cupy_runtime() -> Runtime:
    from .cuda.cupy_runtime import CupyRuntime

    return CupyRuntime()


register_runtime(_cupy_runtime)
