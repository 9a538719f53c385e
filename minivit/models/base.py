"""What all families share: a checked configuration, a seeded beginning, a head, and the register of names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import repeat
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError
from ..kernels.core.dtypes import BFLOAT16
from ..nn.cost import ModelCost, count
from ..nn.initialisers import Initialiser, initialise
from ..nn.layers import Dropout, Linear, Random
from ..nn.module import Module
from ..tensor import Tensor
from . import config as configs
from .config import BackboneConfig


class Model(Module):
    """A classifier of images.

    A family is a subclass with the three class attributes below, whose `__init__` builds the modules and ends with `self.initialise()`, and
    which defines `features` and `initialisers`. Its answer to an image depends on no other one of the batch, unless the family sets
    `separable` to False: Trainer computes batches in parts.

    attends: whether it has attention. config: the family's Config. name: the name it was created by. random: the state of its dropout
    layers.
    """

    family: ClassVar[str]
    attends: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    Config: ClassVar[type[configs.Config]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]  # name -> fields of the configuration

    head: Linear
    head_drop: Dropout
    calibration: Any = None  # a cascade's thresholds (`minivit.calibrate`)

    def __init__(self, config: configs.Config, seed: int = 0, random: Random | None = None) -> None:
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

    def astype(self, dtype: np.dtype) -> Model:
        super().astype(dtype)
        self.config = replace(self.config, dtype=dtype.name)  # type: ignore[arg-type]
        return self

    def restart(self, seed: int) -> None:
        """Begin to train anew, on the CPU: dropout draws by this seed, and what belonged to the weights so far is forgotten."""
        self.to("cpu")
        self.random.state[...] = seed, 0

    # ----------------------------------------------------------------------------------------------------------- weights of files
    def rename_foreign(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`state` under this model's names, where it has those of the authors' code."""
        return state

    def google_names(self, names: Collection[str]) -> dict[str, str] | None:
        """For each parameter its name in Google's .npz files, which hold these `names`; None for a family without such files.

        A name with "{query,key,value}" stands for three arrays that lie in one of the model's.
        """
        return None

    def resize_positions(self, state: dict[str, np.ndarray], method: str) -> dict[str, np.ndarray]:
        """`state`, a state dict of this family, with its position embeddings resized to this model's grid (`positions.resize`)."""
        return state

    def metadata(self) -> dict[str, str]:
        """The text that a file of the weights keeps beside them and the configuration, by name."""
        return {}

    def read_metadata(self, metadata: Mapping[str, str]) -> Any:
        """What `restore` takes, from the `metadata` of a file. Raises UserError where it is damaged."""
        return None

    def restore(self, content: Any, own_file: bool) -> None:
        """Take the content of `read_metadata` after the weights of the file.

        own_file: whether the model was made for this file; otherwise the weights may differ from the file's.
        """

    # ----------------------------------------------------------------------------------------------------------------- for pictures
    def backbones(self) -> list[Any]:
        """The models that one image passes, each with pictures of its own: the stages of a cascade, else the model itself."""
        return [self]

    def patch_filters(self) -> np.ndarray | None:
        """The weights (dim, in_channels, P, P) that project patches; None where there are none."""
        embed = getattr(self, "patch_embed", None)
        return None if embed is None else embed.proj.weight.numpy()

    def position_embedding(self) -> tuple[np.ndarray, int] | None:
        """The position embeddings (grid², dim) of the patches, and their grid; None where there are none."""
        return None

    def token_mixing_weights(self) -> list[np.ndarray]:
        """For each block the weights (F, grid²) by which the hidden units of its token-mixing MLP see the patches."""
        return []


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

        features, relation: of a cascade, what the stage before hands on (`models/cascade/dynamic.py`). logits: a list to which the scaled
        attention logits (B, H, N, N) of each block are appended, with the bias that the relation adds to them.
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
