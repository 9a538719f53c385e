"""Module and Parameter: a tree of named arrays."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError
from ..grad_mode import current_tracer
from ..kernels.core.arrays import copy_from_numpy, to_device
from ..tensor import Tensor


class Parameter(Tensor):
    """A leaf that a module owns. Frozen where `requires_grad` is False: saved and loaded, never trained."""

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        super().__init__(data, requires_grad)


@contextmanager
def evaluating(module: Module) -> Iterator[None]:
    """Inside, the whole tree is in evaluation mode; each module is in its own mode again afterwards."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


class Module:
    """What models are made of: Parameters, Modules and lists of Modules as attributes, and a `forward`.

    A parameter's name is the dotted path of attributes and list positions to it, as in PyTorch.
    """

    separable: ClassVar[bool] = False  # whether the answer to an image depends on no other of its batch: then batches are computed in parts
    no_decay: ClassVar[Collection[str]] = ("bias", "cls_token", "pos_embed")  # own parameters that weight decay leaves alone, by attribute

    training: bool = False

    def forward(self, *inputs: Any) -> Any:
        raise NotImplementedError

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        tracer = current_tracer()
        if tracer is None:
            return self.forward(*inputs, **options)
        tracer.enter(self)
        try:
            return self.forward(*inputs, **options)
        finally:
            tracer.leave()

    @property
    def num_exits(self) -> int:
        """How many answers `exits` gives."""
        return 1

    def exits(self, *inputs: Any) -> list[Any]:
        """All answers that training sums the loss over: of a cascade one for each exit, of any other module its only one."""
        return [self(*inputs)]

    def stage(self, k: int, images: Any, state: tuple[Any, ...] = ()) -> tuple[Any, tuple[Any, ...]]:
        """The answer of exit k alone, and the state that the next one begins from: Tensors or None.

        state: that of exit k - 1 for these images; () before the first.
        """
        return self(images), ()

    def unwrapped(self) -> Module:
        """The module itself, or the one that it wraps and whose parameters it shares."""
        return self

    def child_slots(self) -> Iterator[tuple[str, Any, Any, Module | Parameter]]:
        """Of each Module and Parameter this one holds: its name, the dict or list it stands in, its key there, and itself."""
        for name, value in vars(self).items():
            if isinstance(value, (Module, Parameter)):
                yield name, vars(self), name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", value, i, item) for i, item in enumerate(value) if isinstance(item, (Module, Parameter)))

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Every parameter, frozen ones too, with its dotted name, in the order they were made; a shared one under each of its names."""
        for name, _, _, child in self.child_slots():
            if isinstance(child, Parameter):
                yield prefix + name, child
            else:
                yield from child.named_parameters(f"{prefix}{name}.")

    def parameters(self) -> list[Parameter]:
        return [p for _, p in self.named_parameters()]

    def named_modules(self, name: str = "") -> Iterator[tuple[str, Module]]:
        """This module, as `name`, and all below it with their dotted names; a shared one under each of its names."""
        yield name, self
        for own, _, _, child in self.child_slots():
            if isinstance(child, Module):
                yield from child.named_modules(f"{name}.{own}" if name else own)

    def modules(self) -> Iterator[Module]:
        """This module and all below it."""
        return (module for _, module in self.named_modules())

    def decayed_parameters(self) -> list[Parameter]:
        """The parameters that weight decay acts on, as in timm and DeiT; the first name of a shared parameter counts.

        It spares those of one dimension (biases, scales of normalisations, LayerScale), and those that their module names in `no_decay`.
        """
        decays: dict[int, tuple[Parameter, bool]] = {}
        for module in self.modules():
            for name, _, _, child in module.child_slots():
                if isinstance(child, Parameter):
                    decays.setdefault(id(child), (child, child.ndim > 1 and name not in module.no_decay))
        return [parameter for parameter, decayed in decays.values() if decayed]

    def train(self, mode: bool = True) -> Module:
        """Switch dropout and DropPath on (or off) in the whole tree; returns self."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        return self.train(False)

    def to(self, device: str) -> Module:
        """Move all parameters, and what dropout draws from, to "cpu" or "cuda"; returns self. A Trainer of the model is then of no use."""
        for parameter in self.parameters():
            parameter.data = to_device(parameter.data, device)
        for module in self.modules():
            for value in vars(module).values():
                if hasattr(value, "to") and not isinstance(value, (Module, Parameter)):
                    value.to(device)
        return self

    def astype(self, dtype: np.dtype) -> Module:
        """Convert all parameters, on the CPU, to a dtype; returns self."""
        for parameter in self.parameters():
            parameter.data = parameter.data.astype(dtype, copy=False)
        return self

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of every parameter by its dotted name."""
        return {name: np.array(p.numpy()) for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, np.ndarray], strict: bool = True) -> None:
        """Copy arrays into the parameters of the same names, converted to their dtype.

        Raises UserError that lists every missing, unexpected and wrongly shaped name, before anything is changed; with strict=False
        names that are missing or unexpected are passed over.
        """
        own = dict(self.named_parameters())
        wrong = [f"{n} is {tuple(state[n].shape)}, not {p.shape}" for n, p in own.items() if n in state and state[n].shape != p.shape]
        missing = [n for n in own if n not in state] if strict else []
        unexpected = [n for n in state if n not in own] if strict else []
        faults = [
            f"{word}: {', '.join(names)}"
            for word, names in (("wrong shape", wrong), ("missing", missing), ("unexpected", unexpected))
            if names
        ]
        if faults:
            raise UserError("weights do not fit the model; " + "; ".join(faults))
        for name, parameter in own.items():
            if name in state:
                copy_from_numpy(parameter.data, np.asarray(state[name]))


def dtype_of(model: Module) -> np.dtype:
    """The dtype of a model's parameters; raises UserError where it has none."""
    first = next((p for _, p in model.named_parameters()), None)
    if first is None:
        raise UserError("the model has no parameters")
    return first.dtype


def device_of(model: Module) -> str:
    """The device that a model's parameters lie on."""
    return next((p.device for _, p in model.named_parameters()), "cpu")
