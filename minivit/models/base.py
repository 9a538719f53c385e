"""What all families share: a checked configuration, a seeded beginning, a head, and the register of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import repeat
from math import isfinite
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from ..cost import ModelCost, count
from ..errors import UserError, nearest
from ..initialisers import Initialiser, initialise
from ..kernels.core.dtypes import BFLOAT16
from ..layers import Dropout, Linear, Random
from ..module import Module
from ..tensor import Tensor


@dataclass(frozen=True)
class Config:
    """The base of each family's configuration: the fields every family has, and the check of all fields against their annotations.

    An int is at least 1 (or the `least` of its metadata), a rate at least 0 and below 1, any other float finite and above 0, a Literal one
    of its values. Raises UserError.
    """

    image_size: int = 224  # pixels, both sides
    in_channels: int = 3  # colours
    num_classes: int = 1000  # outputs of the head
    dtype: Literal["float32", "float64"] = "float32"  # of parameters and activations

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            value = _checked(entry.name, getattr(self, entry.name), hints[entry.name], entry.metadata.get("least", 1))
            object.__setattr__(self, entry.name, value)


@dataclass(frozen=True)
class BackboneConfig(Config):
    """The fields of a family that cuts images into patches, and whose blocks can be a stage of a cascade (`models/dynamic.py`)."""

    patch_size: int = 16  # pixels, both sides; divides image_size where there is no patch_stride
    patch_stride: int | None = None  # pixels from one patch to the next; None: patch_size
    patch_padding: int = field(default=0, metadata={"least": 0})  # pixels of zeros around the image
    extra_channels: int = field(default=0, metadata={"least": 0})  # that a cascade appends to the input of each block's channel MLP


def _checked(name: str, value: Any, hint: Any, least: int) -> Any:
    """`value` as plain int, float, bool, str or None."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in choices:
            raise UserError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}{nearest(str(value), choices)}")
    elif type(None) in choices:
        return None if value is None else _checked(name, value, choices[0], least)
    elif hint is bool:
        if not isinstance(value, (bool, np.bool_)):
            raise UserError(f"{name} must be true or false, not {value!r}")
        return bool(value)
    elif hint is int:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")
        return int(value)
    elif hint is float:
        rate = name.endswith("rate")
        number = isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
        if not number or not (0 <= value < 1 if rate else value > 0):
            raise UserError(f"{name} must be a number {'of at least 0 and below 1' if rate else 'above 0'}, not {value!r}")
        return float(value)
    return value


_Config = Config  # inside the class below, Config is its attribute


class Model(Module):
    """A classifier of images. A family is a subclass with the three class attributes below, whose `__init__` builds the modules and ends
    with `self.initialise()`, and which defines `features` and `initialisers`. What it answers to an image depends on no other one of the
    batch: Trainer and Predictor compute batches in parts.

    attends: whether it has attention. config: the family's Config. name: the name it was created by. random: the state of its dropout
    layers.
    """

    family: ClassVar[str]
    attends: ClassVar[bool] = False
    Config: ClassVar[type[_Config]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]  # name -> fields of the configuration

    head: Linear
    head_drop: Dropout

    def __init__(self, config: _Config, seed: int = 0, random: Random | None = None) -> None:
        self.config, self.seed, self.name = config, seed, self.family
        self.random = random or Random(seed)

    def initialisers(self) -> dict[str, Initialiser]:
        """{pattern of parameter names: distribution}, the first that fits counts; see `minivit.initialisers`."""
        raise NotImplementedError

    def initialise(self, only: str = "*") -> None:
        """Draw anew the parameters whose names fit `only`, from the model's seed."""
        initialise(self, self.initialisers(), self.seed, only)

    def features(self, images: Any) -> Tensor:
        """What the head sees of each image: images (B, in_channels, image_size, image_size) -> (B, dim)."""
        raise NotImplementedError

    def forward(self, images: Any) -> Tensor:
        """Logits: images (B, in_channels, image_size, image_size), a float array or Tensor -> (B, num_classes)."""
        return self.head(self.head_drop(self.features(images)), precise=True)

    def begin(self, images: Any) -> Tensor:
        """The images in the model's dtype, or in bfloat16 if they are, and then all activations are.

        In training, the dropout layers draw new masks from here on.
        """
        if self.training and self.random.active:
            self.random.advance()
        array = images.data if isinstance(images, Tensor) else np.asarray(images)
        dtype = self.head.weight.dtype
        if array.dtype in (dtype, BFLOAT16):
            return images if isinstance(images, Tensor) else Tensor(array)
        if isinstance(images, Tensor) and images.requires_grad:
            raise UserError(f"images that require a gradient must have the model's dtype {dtype}, not {array.dtype}")
        return Tensor(array.astype(dtype))

    def cost(self) -> ModelCost:
        """The multiply-adds of one image, by layer and in total, and its activations; see `minivit.cost` for what counts."""
        return count(self)

    def reset_head(self, num_classes: int) -> None:
        """Give the model a new head for another number of classes, initialised as at the beginning.

        Do it before a Trainer is made, which holds the parameters that are there.
        """
        self.config = replace(self.config, num_classes=num_classes)
        weight = self.head.weight
        self.head = Linear(weight.shape[1], self.config.num_classes, dtype=weight.dtype.name)
        self.head.train(self.training)
        self.initialise("head.*")

    def own_names(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`state` under this model's names, where it has those of the authors' code."""
        return state

    def fit_positions(self, state: dict[str, np.ndarray], method: str) -> dict[str, np.ndarray]:
        """`state`, a state dict of this family, with its position embeddings resized to this model's grid (`positions.resize`)."""
        return state


class Backbone(Model):
    """A model of blocks over patch tokens, which can be a stage of a cascade.

    A family defines `embed`, `pool` and `blocks`; each block takes tokens (B, N, dim) and returns them, and takes
    `extra` (B, N, extra_channels), where the configuration has extra_channels: more input of its channel MLP. Blocks with attention take
    `bias` and `return_logits` as ViT's do. Ops that cost multiply-adds run in modules, by whose names `cost` knows the stage.
    prefix: class tokens before the patches' tokens. grid: patches a side. random: shared with the other stages of a cascade.
    """

    config: BackboneConfig
    blocks: list[Any]
    relation_reuse: Any = None  # a cascade's, and so is each block's feature_reuse
    prefix: int = 0
    grid: int

    def embed(self, images: Tensor) -> Tensor:
        """The tokens before the first block: images (B, in_channels, S, S) in the model's dtype -> (B, N, dim)."""
        raise NotImplementedError

    def pool(self, tokens: Tensor) -> Tensor:
        """What the head sees, the final normalisation included: (B, N, dim) -> (B, dim)."""
        raise NotImplementedError

    def encode(
        self, images: Tensor, features: Tensor | None = None, relation: Tensor | None = None, logits: list[Tensor] | None = None
    ) -> Tensor:
        """The tokens after the last block: images (B, in_channels, S, S) in the model's dtype -> (B, N, dim).

        features, relation: of a cascade, what the stage before hands on (`models/dynamic.py`). logits: a list to which the scaled attention
        logits (B, H, N, N) of each block are appended, with the bias that the relation adds to them.
        """
        biases = repeat(None) if relation is None else self.relation_reuse(relation)
        x = self.embed(images)
        for block, bias in zip(self.blocks, biases):
            reused: dict[str, Any] = {} if features is None else {"extra": block.feature_reuse(features)}
            if bias is not None:
                reused["bias"] = bias
            if logits is None:
                x = block(x, **reused)
            else:
                x, own = block(x, **reused, return_logits=True)
                logits.append(own)
        return x

    def tokens(self, images: Any) -> Tensor:
        """The tokens after the last block, the class token first where there is one: images -> (B, N, dim)."""
        return self.encode(self.begin(images))

    def features(self, images: Any) -> Tensor:
        return self.pool(self.tokens(images))


FAMILIES: dict[str, type[Model]] = {}
PRESETS: dict[str, type[Model]] = {}  # name of a preset -> its family

M = TypeVar("M", bound=type[Model])


def register(model: M) -> M:
    """Class decorator: `create_model` finds the family and its presets from now on. Raises ValueError for a name that is taken."""
    for name in (model.family, *model.presets):
        if name in FAMILIES or name in PRESETS:
            raise ValueError(f"there is a model named {name!r} already")
    FAMILIES[model.family] = model
    PRESETS.update(dict.fromkeys(model.presets, model))
    return model
