"""Module and Parameter: a tree of named arrays."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError, listed
from ..grad_mode import current_tracer
from ..kernels.core.arrays import copy_from_numpy, to_device
from ..tensor import Tensor


class Parameter(Tensor):
    """A leaf tensor of a module. With requires_grad=False it is frozen: saved and loaded, but not trained."""

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        super().__init__(data, requires_grad)


_outline: ContextVar[list[int] | None] = ContextVar("outline", default=None)  # how many parameters are made, and may be made


@contextmanager
def outlines(most: int) -> Iterator[None]:
    """Context manager: modules made inside it are outlines, whose parameters have a shape and a dtype but take no memory, so that sizes can
    be judged before anything is allocated. More than `most` parameters raise UserError. `Module.allocate` makes an outline a module."""
    token = _outline.set([0, most])
    try:
        yield
    finally:
        _outline.reset(token)


def in_outline() -> bool:
    """Whether modules made now are outlines."""
    return _outline.get() is not None


def filled(shape: tuple[int, ...], value: float, dtype: str, requires_grad: bool = True) -> Parameter:
    """A new parameter, all of one value. Layers make their parameters with it, because it knows of `outlines`.

    Raises UserError for a shape that no memory holds.
    """
    if prod(shape) >= 2**60:
        raise UserError(f"a parameter of shape {shape} is larger than any memory: choose smaller sizes")
    counts = _outline.get()
    if counts is None:
        # Zeros take memory when they are first written.
        return Parameter(np.full(shape, value, dtype) if value else np.zeros(shape, dtype), requires_grad)
    counts[0] += 1
    if counts[0] > counts[1]:
        raise UserError(f"the model has more than {counts[1]:,} parameter arrays: make it smaller")
    parameter = Parameter(np.empty(0, dtype), requires_grad)
    parameter.data = np.ndarray(shape, dtype, np.array(value, dtype), strides=(0,) * len(shape))  # the one value, read everywhere
    return parameter


@contextmanager
def evaluating(module: Module) -> Iterator[None]:
    """Context manager: all modules are in evaluation mode inside it, and each is in its previous mode afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


class Module:
    """Base class of layers and models: Parameters, Modules and lists of Modules as attributes, and a `forward`.

    A parameter's name is its dotted path of attributes and list positions, as in PyTorch.
    """

    separable: ClassVar[bool] = False  # whether an image's output is independent of the rest of the batch: batches may be split into parts
    no_decay: ClassVar[Collection[str]] = ("bias", "cls_token", "pos_embed")  # attributes whose parameters are exempt from weight decay
    no_muon: ClassVar[Collection[str]] = ()  # names, of parameters or modules below it, that are no matrices between hidden layers
    statistics: ClassVar[Collection[str]] = ()  # attributes whose parameters follow the batches in training: frozen, but not constant
    ignored: ClassVar[Collection[str]] = ()  # names of state dicts by other programs that it has no use for

    parts: int = 1  # how many matrices of equal shape each of its own parameters stacks
    training: bool = False
    frozen: bool = False  # stays in evaluation mode

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
        """The number of outputs of `exits`."""
        return 1

    def exits(self, *inputs: Any) -> list[Any]:
        """The outputs over which training sums the loss: one per exit of a cascade, the only output of any other module."""
        return [self(*inputs)]

    def stage(self, k: int, images: Any, state: tuple[Any, ...] = ()) -> tuple[Any, tuple[Any, ...]]:
        """The output of exit k alone, and the state (Tensors or None) that the next exit starts from.

        state: the state of exit k - 1 for these images; () for the first exit.
        """
        return self(images), ()

    def unwrapped(self) -> Module:
        """The module itself, or the module that it wraps."""
        return self

    def child_slots(self) -> Iterator[tuple[str, Any, Any, Module | Parameter]]:
        """For each direct child Module or Parameter: its name, the dict or list that contains it, its key there, and the child."""
        for name, value in vars(self).items():
            if isinstance(value, (Module, Parameter)):
                yield name, vars(self), name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", value, i, item) for i, item in enumerate(value) if isinstance(item, (Module, Parameter)))

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """All parameters with their dotted names, including frozen ones, in order of creation; a shared one under each of its names."""
        for name, _, _, child in self.child_slots():
            if isinstance(child, Parameter):
                yield prefix + name, child
            else:
                yield from child.named_parameters(f"{prefix}{name}.")

    def parameters(self) -> list[Parameter]:
        return [p for _, p in self.named_parameters()]

    def distinct_parameters(self) -> list[Parameter]:
        """All parameters, a shared one once, in the order of their first names."""
        return list({id(parameter): parameter for parameter in self.parameters()}.values())

    def named_modules(self, name: str = "") -> Iterator[tuple[str, Module]]:
        """This module, as `name`, and all its descendants with their dotted names; a shared one under each of its names."""
        yield name, self
        for child_name, _, _, child in self.child_slots():
            if isinstance(child, Module):
                yield from child.named_modules(f"{name}.{child_name}" if name else child_name)

    def modules(self) -> Iterator[Module]:
        """This module and all its descendants."""
        return (module for _, module in self.named_modules())

    def decayed_parameters(self) -> list[Parameter]:
        """The parameters with weight decay, as in timm and DeiT; for a shared parameter, its first name counts.

        Parameters with one dimension (biases, scales of normalisations, LayerScale) and those in their module's `no_decay` are exempt.
        """
        decays: dict[int, tuple[Parameter, bool]] = {}
        for module in self.modules():
            for name, _, _, child in module.child_slots():
                if isinstance(child, Parameter):
                    decays.setdefault(id(child), (child, child.ndim > 1 and name not in module.no_decay))
        return [parameter for parameter, decayed in decays.values() if decayed]

    def hidden_matrices(self) -> dict[int, tuple[int, int, int]]:
        """The weights between hidden layers: {id of the parameter: (matrices that it stacks, rows and columns of each)}.

        These are the parameters with weight decay but those below the names in their modules' `no_muon`: weights that meet the images, the
        head, and kernels of single channels. The weights of a convolution are one matrix, (outputs, inputs·rows·columns) (Jordan et al.
        2024). A row or a column alone is none.
        """
        parts: dict[int, int] = {}
        others: set[int] = set()
        for module in self.modules():
            parts |= {id(child): module.parts for _, _, _, child in module.child_slots() if id(child) not in parts}
            if module.no_muon:
                named = module.named_parameters()
                others |= {id(p) for name, p in named if any(f"{name}.".startswith(f"{each}.") for each in module.no_muon)}
        kept = [(p, parts[id(p)]) for p in self.decayed_parameters() if id(p) not in others]
        shapes = {id(p): (number, p.shape[0] // number, prod(p.shape[1:])) for p, number in kept}
        return {key: shape for key, shape in shapes.items() if min(shape[1:]) > 1}

    def layer_numbers(self) -> dict[int, tuple[int, int]]:
        """{id of a parameter: (number of layers before its own, number of layers after it)}, counted as in BEiT (2106.08254).

        A module with a list of `blocks`, as each stage of a cascade is one, has these layers: what it creates before the blocks, each
        block, and what it creates after them. Parameters elsewhere are not in the result.
        """
        found: dict[int, tuple[int, int]] = {}
        for module in self.modules():
            blocks = vars(module).get("blocks")
            if isinstance(blocks, list) and blocks:
                layer, last = 0, len(blocks) + 1
                for name, parameter in module.named_parameters():
                    if name.startswith("blocks."):
                        layer = 1 + int(name.split(".")[1])
                    elif layer:
                        layer = last
                    found.setdefault(id(parameter), (layer, last - layer))
        return found

    def statistic_parameters(self) -> list[Parameter]:
        """The parameters of this module and its descendants that follow the batches in training, without duplicates."""
        return list({id(p): p for module in self.modules() for p in map(vars(module).get, module.statistics) if p is not None}.values())

    def train(self, mode: bool = True) -> Module:
        """Switch dropout, DropPath and the statistics of batches on (or off) in this module and its descendants; returns self."""
        for module in self.modules():
            module.training = mode and not module.frozen
        return self

    def eval(self) -> Module:
        return self.train(False)

    def to(self, device: str) -> Module:
        """Move all parameters and the random state to "cpu" or "cuda"; returns self. An existing Trainer of the model becomes invalid."""
        for parameter in self.parameters():
            parameter.data = to_device(parameter.data, device)
        for module in self.modules():
            for value in vars(module).values():
                if hasattr(value, "to") and not isinstance(value, (Module, Parameter)):
                    value.to(device)
        return self

    def astype(self, dtype: np.dtype) -> Module:
        """Convert all parameters (which must be on the CPU) to a dtype; returns self."""
        for parameter in self.parameters():
            parameter.data = parameter.data.astype(dtype, copy=False)
        return self

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters by their dotted names."""
        return {name: np.array(p.numpy()) for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, np.ndarray], strict: bool = True) -> None:
        """Copy arrays into the parameters of the same names, converted to their dtype.

        Raises UserError, before anything is changed, that lists all missing, unexpected and wrongly shaped names; with strict=False missing
        and unexpected names are ignored.
        """
        self.check_state_dict(state, strict)
        for name, parameter in self.named_parameters():
            if name in state:
                copy_from_numpy(parameter.data, np.asarray(state[name]))

    def check_state_dict(self, state: Mapping[str, np.ndarray], strict: bool = True) -> None:
        """Raises UserError for arrays that `load_state_dict` would not take."""
        parameters = dict(self.named_parameters())
        misshapen = [
            f"{n} is {tuple(state[n].shape)}, not {p.shape}" for n, p in parameters.items() if n in state and state[n].shape != p.shape
        ]
        missing = [n for n in parameters if n not in state] if strict else []
        ignored = {f"{name}.{each}".lstrip(".") for name, module in self.named_modules() for each in module.ignored}
        unexpected = [n for n in state if n not in parameters and n not in ignored] if strict else []
        errors = [
            f"{problem}: {listed(names)}"
            for problem, names in (("wrong shape", misshapen), ("missing", missing), ("unexpected", unexpected))
            if names
        ]
        if errors:
            raise UserError("weights do not fit the model; " + "; ".join(errors))

    def allocate(self) -> None:
        """Give the parameters of an outline (`outlines`) memory of their own; `load_state_dict` then sets their values."""
        for parameter in self.parameters():
            parameter.data = np.empty(parameter.shape, parameter.dtype)


def dtype_of(model: Module) -> np.dtype:
    """The dtype of a model's parameters. Raises UserError if it has none."""
    first = next((p for _, p in model.named_parameters()), None)
    if first is None:
        raise UserError("the model has no parameters")
    return first.dtype


def device_of(model: Module) -> str:
    """The device of a model's parameters."""
    return next((p.device for _, p in model.named_parameters()), "cpu")
