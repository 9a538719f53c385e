"""Base classes of the model families: configuration, seeded initialisation, head, and conversion of weights from files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import repeat
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError
from ..grad_mode import current_tracer
from ..kernels.core.dtypes import BFLOAT16
from ..nn.cost import ModelCost, count
from ..nn.initialisers import Initialiser, initialise
from ..nn.layers import Dropout, Linear, Random, Stem
from ..nn.module import Module, Parameter
from ..tensor import Tensor
from . import channels, positions
from . import config as configs
from .config import StageConfig


class Model(Module):
    """An image classifier.

    A family is a subclass with the class attributes `family`, `Config` and `presets`, whose `__init__` builds the modules and ends with
    `self.initialise()`, and which defines `features` and `initialisers`. The output for an image must not depend on other images of the
    batch, because Trainer splits batches into parts; otherwise the family sets `separable` to False.

    attends: whether the model has attention. part_name: what one of its `backbones` is called. config: an instance of the family's Config.
    name: the name under which the model was created. random: the random state of its dropout layers.
    """

    family: ClassVar[str]
    attends: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    part_name: ClassVar[str] = "exit"
    no_muon: ClassVar[Collection[str]] = ("head",)
    Config: ClassVar[type[configs.Config]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]  # name of the preset -> fields of the configuration

    head: Linear
    head_drop: Dropout
    calibration: Any = None  # a cascade's thresholds (`minivit.calibrate`)

    def __init__(self, config: configs.Config, seed: int = 0, random: Random | None = None) -> None:
        self.config, self.seed, self.name = config, seed, self.family
        self.random = random or Random(seed)

    def initialisers(self) -> dict[str, Initialiser]:
        """{pattern of parameter names: distribution}; the first match applies, see `nn/initialisers.py`."""
        raise NotImplementedError

    def initialise(self, only: str = "*") -> None:
        """Initialise the parameters whose names match the pattern `only`, from the model's seed."""
        table, stems = self.initialisers(), dict[str, Initialiser | None]()
        for name, module in self.named_modules() if table else ():
            if isinstance(module, Stem) and (own := module.initialisers()):  # which then decides of all its parameters
                stems |= {f"{name}.{pattern}": draw for pattern, draw in own.items()} | {f"{name}.*": None}
        initialise(self, stems | {pattern: draw for pattern, draw in table.items() if pattern not in stems}, self.seed, only)

    def features(self, images: Any) -> Tensor:
        """The input of the head: images (B, in_channels, rows, columns) -> (B, dim)."""
        raise NotImplementedError

    def forward(self, images: Any) -> Tensor:
        """Logits: images (B, in_channels, rows, columns), a float array or Tensor -> (B, num_classes)."""
        return self.head(self.head_drop(self.features(images)), precise=True)

    def begin(self, images: Any) -> Tensor:
        """Returns the images in the model's dtype; images in bfloat16 stay in it, and so do all activations.

        In training mode, advances the random state, so that dropout layers draw new masks.
        """
        if self.training and self.random.active:
            self.random.advance()
        array = images.data if isinstance(images, Tensor) else np.asarray(images)
        dtype = np.dtype(self.config.dtype)
        if array.dtype in (dtype, BFLOAT16):
            return images if isinstance(images, Tensor) else Tensor(array)
        if isinstance(images, Tensor) and images.requires_grad:
            raise UserError(f"images that require a gradient must have the model's dtype {dtype}, not {array.dtype}")
        return Tensor(array.astype(dtype))

    def cost(self) -> ModelCost:
        """The multiply-adds for one image, by layer and in total, and its activations; `nn/cost.py` defines what is counted."""
        return count(self)

    def reset_head(self, num_classes: int) -> None:
        """Replace the head by a new one for another number of classes, initialised like the first.

        Call it before creating a Trainer, which refers to the current parameters.
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
        """Prepare for a new training run: move to the CPU, reseed dropout, and discard data that depends on the current weights."""
        self.to("cpu")
        self.random.state[...] = seed, 0

    # ----------------------------------------------------------------------------------------------------------- weights of files
    def rename_foreign(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`state` with parameter names of the authors' code, if any, replaced by this model's."""
        return state

    def google_names(self, names: Collection[str]) -> dict[str, str] | None:
        """{parameter name: its name in Google's .npz files}; None for a family without such files. names: the names in the file.

        A name with "{query,key,value}" stands for three arrays of the file that form one parameter.
        """
        return None

    def timm_arguments(self) -> tuple[str, dict[str, Any]]:
        """The function or class of timm that makes a model with these parameters, and its arguments by name.

        "eps" among them is that of the normalisations, for which timm takes a layer. Raises UserError if timm has no such model.
        """
        raise UserError(f"timm has no {self.family}: export it as .onnx, or save it as it is with save_weights")

    def resize_positions(self, state: dict[str, np.ndarray], method: str) -> dict[str, np.ndarray]:
        """`state`, a state dict of this family, with its position embeddings resized to this model's grid (`positions.resize`)."""
        return state

    def take_weights(self, other: Model) -> None:
        """Take the weights of the same model for images of another size; what is fixed and depends on the size stays.

        Raises UserError if position embeddings cannot be resized.
        """
        own = dict(self.named_parameters())
        theirs = {name: a for name, a in other.state_dict().items() if own[name].requires_grad or own[name].shape == a.shape}
        self.load_state_dict(self.resize_positions(theirs, "bilinear"), strict=False)

    def convert_channels(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`state` with its patch projections converted to this model's in_channels (`channels.convert`)."""
        names = [f"{name}.{module.first}" for name, module in self.named_modules() if isinstance(module, Stem)]
        return state | {name: channels.convert(state[name], self.config.in_channels) for name in names if name in state}

    def metadata(self) -> dict[str, str]:
        """Further metadata of a weights file, as text by key, in addition to the configuration."""
        return {}

    def read_metadata(self, metadata: Mapping[str, str]) -> Any:
        """Parse the `metadata` of a file into the argument of `restore`. Raises UserError if it is damaged."""
        return None

    def restore(self, content: Any, own_file: bool) -> None:
        """Apply the result of `read_metadata`, after the weights of the file have been loaded.

        own_file: whether the model was created from this file; if not, its weights may differ from the file's.
        """

    # ----------------------------------------------------------------------------------------------------------------- for pictures
    def backbones(self) -> list[Any]:
        """What to draw separately: the stages of a cascade, the branches of a CrossViT, otherwise the model itself."""
        return [self]

    def patch_filters(self) -> np.ndarray | None:
        """The weights (outputs, in_channels, rows, columns) that meet the pixels (`Stem.filters`), or None."""
        stem = next((module for module in self.modules() if isinstance(module, Stem)), None)
        return None if stem is None else stem.filters.numpy()

    def position_embedding(self) -> tuple[np.ndarray, tuple[int, int]] | None:
        """The position embeddings (patches, dim) and their grid (rows, columns), or None."""
        return None

    def token_mixing_weights(self) -> list[np.ndarray]:
        """For each block, the weights (F, patches) from the patches to the hidden units of its token-mixing MLP."""
        return []


def timm_patches(config: Any) -> dict[str, Any]:
    """The arguments of timm for images, patches and classes. Raises UserError for patches that timm has not."""
    if config.stem != "patch" or config.patch_stride not in (None, config.patch_size) or config.patch_padding != 0:
        raise UserError("timm's models cut images into patches that do not overlap: this stem has no names there, export it as .onnx")
    names = {"img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.in_channels}
    return names | {"num_classes": config.num_classes}


class Backbone(Model):
    """A model of blocks over patch tokens, which can be a stage of a cascade.

    A family defines `embed`, `blocks`, and `pool` if the head reads more than the class token. Each block maps tokens (B, N, dim) to tokens
    and, if the configuration has extra_channels, takes `extra` (B, N, extra_channels), additional input of its channel MLP. Blocks with
    attention take `bias` and `return_logits` as in ViT. Ops with multiply-adds must run inside modules, because `cost` identifies the stage
    by module names.
    prefix: number of class tokens before the patch tokens. grid: (rows, columns) of patches. random: shared by the stages of a cascade.
    """

    config: StageConfig
    blocks: list[Any]
    relation_reuse: Any = None  # set by a cascade, as is each block's feature_reuse
    prefix: int = 0
    grid: tuple[int, int]
    pos_embed: Parameter | None = None  # (1, prefix + patches, dim), of a family that adds an embedding to each token
    norm: Any  # the final normalisation

    def embed(self, images: Tensor) -> Tensor:
        """The tokens before the first block: images (B, in_channels, rows, columns) in the model's dtype -> (B, N, dim)."""
        raise NotImplementedError

    @property
    def tokens_read(self) -> int | None:
        """How many of the first tokens the head reads, in a family whose blocks take `first`; None: all.

        The last block then computes what comes after its attention for these alone, with the same result.
        """
        return None

    def pool(self, tokens: Tensor) -> Tensor:
        """The input of the head, after the final normalisation: (B, N, dim) -> (B, dim); here that of the class token."""
        tokens = self.norm(tokens)
        return tokens[:, 0] if tokens.shape[1] > 1 else tokens.reshape(len(tokens), -1)

    def resize_positions(self, state: dict[str, np.ndarray], method: str) -> dict[str, np.ndarray]:
        if self.pos_embed is None:
            return state
        return positions.fitted(state, "pos_embed", self.pos_embed.shape, self.grid, self.prefix, method)

    def position_embedding(self) -> tuple[np.ndarray, tuple[int, int]] | None:
        return None if self.pos_embed is None else (self.pos_embed.numpy()[0, self.prefix :], self.grid)

    def encode(
        self,
        images: Tensor,
        features: Tensor | None = None,
        relation: Tensor | None = None,
        logits: list[Tensor] | None = None,
        all_tokens: bool = True,
    ) -> Tensor:
        """The tokens after the last block: images (B, in_channels, rows, columns) in the model's dtype -> (B, N, dim).

        features, relation: in a cascade, the reused data of the previous stage (`models/cascade/dynamic.py`). logits: a list to which the
        scaled attention logits (B, H, N, N) of each block are appended, including the bias from `relation`. all_tokens: whether to return
        more than the `tokens_read`. The cost is counted as in papers, where the last block computes all.
        """
        tracer = current_tracer()
        first = None if all_tokens or (tracer and tracer.whole) else self.tokens_read
        biases = repeat(None) if relation is None else self.relation_reuse(relation)
        x = self.embed(images)
        for block, bias in zip(self.blocks, biases):
            options: dict[str, Any] = {} if features is None else {"extra": block.feature_reuse(features)}
            if bias is not None:
                options["bias"] = bias
            if first is not None and block is self.blocks[-1]:
                options["first"] = first
            if logits is None:
                x = block(x, **options)
            else:
                x, block_logits = block(x, **options, return_logits=True)
                logits.append(block_logits)
        return x

    def tokens(self, images: Any) -> Tensor:
        """The tokens after the last block, beginning with the class token if there is one: images -> (B, N, dim)."""
        return self.encode(self.begin(images))

    def features(self, images: Any) -> Tensor:
        return self.pool(self.encode(self.begin(images), all_tokens=False))
