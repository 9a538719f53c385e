"""The list of ops, which work on plain arrays and do not depend on Tensor.

Each file defines one op, or a few that share a derivation; its CUDA kernels are in a .cu file of the same name. An op, and with it Numba,
is imported when it is first looked up. The ops are built on `core`, common to all devices, and on `cpu` and `cuda`, which run kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from .core.devices import Runtime, register_runtime
from .core.op import Op

NAMES = {  # the names of the ops defined by each module
    "matmul": ("matmul",),
    "linear": ("linear",),
    "attention": ("attention",),
    "cross_attention": ("cross_attention",),
    "head_mixing": ("head_moments", "head_mixing"),
    "performer": ("performer",),
    "mixing": ("channel_mixing", "token_mixing"),
    "layernorm": ("layernorm", "add_layernorm"),
    "token_layernorm": ("token_layernorm",),
    "batchnorm": ("batchnorm", "running_statistics", "fold_batchnorm"),
    "unfold": ("unfold",),
    "class_token": ("class_token",),
    "depthwise": ("depthwise",),
    "resample": ("resample",),
    "arithmetic": ("add", "subtract", "multiply", "divide", "power", "maximum", "minimum"),
    "gelu": ("gelu",),
    "elementwise": ("exp", "log", "sqrt", "absolute", "tanh", "sigmoid", "relu", "relu6", "hardsigmoid", "hardswish"),
    "softmax": ("softmax",),
    "reduce_sum": ("reduce_sum",),
    "broadcast": ("broadcast",),
    "permute": ("permute",),
    "slice": ("slice",),
    "take": ("take",),
    "concatenate": ("concatenate", "concatenate_3", "split", "split_3"),
    "random": ("dropout", "drop_path"),
    "loss": ("cross_entropy", "soft_cross_entropy"),
    "begin_update": ("begin_update",),
    "adamw": ("adamw",),
    "sgd": ("sgd",),
    "orthogonalise": ("orthogonalise",),
    "muon": ("muon_momentum", "muon"),
    "augment": ("augment",),
}


class Ops(Mapping[str, Op]):
    """The ops by name; each is imported on first access."""

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
    """The module `primitives` of a device, "cpu" or "cuda": copies, sums and matrix products."""
    return import_module(f".{device}.primitives", __name__)


def _cupy_runtime() -> Runtime:
    from .cuda.cupy_runtime import CupyRuntime

    return CupyRuntime()


register_runtime(_cupy_runtime)
