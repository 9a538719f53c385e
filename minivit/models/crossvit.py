"""CrossViT (Chen et al., 2103.14899), with timm's parameter names: transformers over patches of two sizes, joined by class tokens.

Each stage runs the blocks of both branches. Then the class token of each branch, projected to the width of the other one, attends to the
patch tokens there, and is projected back (section 3.3, equations 4 to 6). A branch's answer comes from its class token, and the logits of
the model are the mean of both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import numpy as np

from .. import functional as F
from ..errors import UserError
from ..nn.convolution import Conv2d, convolve_all
from ..nn.initialisers import Initialiser, kaiming_uniform, normal, truncated_normal, uniform, xavier_uniform
from ..nn.layers import (
    CrossAttention,
    Dropout,
    DropPath,
    LayerNorm,
    Linear,
    PatchEmbed,
    Random,
    Sequential,
    Stem,
    check_images,
    patch_grid,
    with_class_token,
)
from ..nn.module import Module, filled
from ..sides import both
from ..tensor import Tensor
from . import positions
from .base import Model
from .config import Config, ImageSize, PatchSize, Positive, Rate, Size, ratio_of
from .registry import register
from .vit import Block, ViTConfig

BRANCHES = (0, 1)
# The strides of a convolution stem, by patch size, which is their product; those of 12 and 16 are the authors'.
STRIDES = {2: (2, 1, 1), 3: (3, 1, 1), 4: (2, 2, 1), 6: (2, 3, 1), 8: (2, 2, 2), 12: (4, 3, 1), 16: (4, 2, 2)}


@dataclass(frozen=True)
class CrossViTConfig(Config):
    """The defaults are those of CrossViT-Ti. Fields with two values have one for each branch."""

    image_size: ImageSize = 240  # pixels of the images that come in: (rows, columns), or one number for a square
    branch_sizes: tuple[ImageSize, ImageSize] = (240, 224)  # pixels to which a branch resizes them
    patch_sizes: tuple[PatchSize, PatchSize] = (12, 16)  # pixels; must divide the branch's size
    dims: tuple[Size, Size] = (96, 192)  # channels of a token
    depths: tuple[Size, Size] = (1, 4)  # blocks in a stage
    stages: Size = 3  # times that blocks of both branches and an exchange follow each other
    heads: tuple[Size, Size] = (3, 3)  # attention heads of a block; must divide the branch's dim
    mlp_ratios: tuple[Positive, Positive] = (4.0, 4.0)  # hidden channels of a block's MLP, in units of dim
    stem: Literal["patch", "convolution"] = "patch"  # of each branch: patch projection, or three convolutions
    drop_rate: Rate = 0.0  # dropout before the heads
    pos_drop_rate: Rate = 0.0  # dropout after the position embeddings
    proj_drop_rate: Rate = 0.0  # dropout after the projections of attention and each layer of the MLPs
    attn_drop_rate: Rate = 0.0  # dropout of the attention probabilities of blocks
    drop_path_rate: Rate = 0.0  # stochastic depth of the last block; increases linearly with depth, from 0 in the first
    eps: Positive = 1e-6  # of every layer normalisation
    init: Literal["timm", "jax", "zeros"] = "timm"  # initialisation: as in timm, as in Google's ViT, or none

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [size for size in self.patch_sizes if self.stem == "convolution" and size not in STRIDES]
        if unknown:
            raise UserError(f"stem='convolution' is for patch_sizes of {', '.join(map(str, STRIDES))} pixels, not {unknown[0]}")

    def branch(self, b: int) -> ViTConfig:
        """The configuration of a branch as a ViT of its own. Raises UserError where its fields do not fit each other."""
        return ViTConfig(
            image_size=self.branch_sizes[b],
            in_channels=self.in_channels,
            num_classes=self.num_classes,
            dtype=self.dtype,
            patch_size=self.patch_sizes[b],
            dim=self.dims[b],
            depth=self.depths[b],
            heads=self.heads[b],
            mlp_ratio=self.mlp_ratios[b],
            proj_drop_rate=self.proj_drop_rate,
            attn_drop_rate=self.attn_drop_rate,
            eps=self.eps,
        )


def _preset(dims: tuple[int, int], depth: int, heads: int, ratio: float, **options: Any) -> dict[str, Any]:
    return dict(dims=dims, depths=(1, depth), heads=(heads, heads), mlp_ratios=(ratio, ratio), **options)


PRESETS: dict[str, dict[str, Any]] = {
    "crossvit_nano_8": dict(
        image_size=8,
        branch_sizes=(8, 9),
        patch_sizes=(2, 3),
        in_channels=1,
        num_classes=10,
        dims=(32, 64),
        depths=(1, 2),
        stages=2,
        heads=(2, 4),
        init="jax",
    ),
    "crossvit_tiny_32": dict(image_size=32, branch_sizes=(30, 32), patch_sizes=(3, 4), num_classes=10, dims=(96, 192), depths=(1, 3)),
    "crossvit_tiny_240": _preset((96, 192), 4, 3, 4.0),
    "crossvit_small_240": _preset((192, 384), 4, 6, 4.0),
    "crossvit_base_240": _preset((384, 768), 4, 12, 4.0),
    "crossvit_9_240": _preset((128, 256), 3, 4, 3.0),
    "crossvit_15_240": _preset((192, 384), 5, 6, 3.0),
    "crossvit_18_240": _preset((224, 448), 6, 7, 3.0),
    "crossvit_9_dagger_240": _preset((128, 256), 3, 4, 3.0, stem="convolution"),
    "crossvit_15_dagger_240": _preset((192, 384), 5, 6, 3.0, stem="convolution"),
    "crossvit_18_dagger_240": _preset((224, 448), 6, 7, 3.0, stem="convolution"),
}


class ConvolutionStem(Stem):
    """Three convolutions in place of the patch projection: (B, in_channels, H, W) -> (B, N, dim) (section 4.1, of the models with †).

    The first is 7×7, the others 3×3; the first two have a quarter and half of the channels, and a ReLU.
    """

    first = "proj.0.weight"
    no_muon = (first,)

    def __init__(self, config: ViTConfig) -> None:
        patch, dim, dtype = config.patch_size, config.dim, config.dtype
        assert isinstance(patch, int)
        self.shape, self.grid = config.image_shape, patch_grid(config.image_size, patch)
        channels, strides = (config.in_channels, max(1, dim // 4), max(1, dim // 2), dim), STRIDES[patch]
        first = Conv2d(channels[0], channels[1], 7, strides[0], 3, dtype=dtype)
        second, third = (Conv2d(channels[i], channels[i + 1], 3, strides[i], int(strides[i] < 3), dtype=dtype) for i in (1, 2))
        self.proj = Sequential(first, None, second, None, third)  # None stands for a ReLU

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.shape)
        x = convolve_all(self.proj.layers, images.transpose(0, 2, 3, 1), "relu")  # (B, rows, columns, dim)
        return x.reshape(len(x), -1, x.shape[3])


class Bridge(Sequential):
    """A class token on its way to the width of the other branch: linear(gelu(norm(x))), (B, 1, inputs) -> (B, 1, outputs)."""

    def __init__(self, inputs: int, outputs: int, eps: float, dtype: str) -> None:
        super().__init__(LayerNorm(inputs, eps, dtype), None, Linear(inputs, outputs, dtype=dtype))  # None stands for the GELU

    def forward(self, x: Tensor) -> Tensor:
        norm, _, linear = self.layers
        return linear(F.gelu(norm(x)))


class Fusion(Module):
    """The first token attends to all tokens, itself included: z (B, N, C) -> z[:, :1] + attention(norm(z)), (B, 1, C)."""

    def __init__(self, config: ViTConfig, drop_path_rate: float, random: Random) -> None:
        self.norm1 = LayerNorm(config.dim, config.eps, config.dtype)
        self.attn = CrossAttention(config.dim, config.heads, random, config.proj_drop_rate, config.dtype)
        self.drop_path = DropPath(drop_path_rate, random)

    def forward(self, z: Tensor) -> Tensor:
        return z[:, :1] + self.drop_path(self.attn(self.norm1(z)))


class Stage(Module):
    """The blocks of both branches, and the exchange between them.

    tokens: (B, 1 + patches, dim) of each branch -> the new class token (B, 1, dim) and the patch tokens (B, patches, dim) of each.
    """

    def __init__(self, branches: tuple[ViTConfig, ...], rates: np.ndarray, random: Random) -> None:
        dims, eps, dtype = [c.dim for c in branches], branches[0].eps, branches[0].dtype
        self.blocks = [Sequential(*(Block(c, float(rates[i]), random) for i in range(c.depth))) for c in branches]
        self.projs = [Bridge(dims[b], dims[1 - b], eps, dtype) for b in BRANCHES]
        self.fusion = [Fusion(branches[1 - b], float(rates[-1]), random) for b in BRANCHES]
        self.revert_projs = [Bridge(dims[1 - b], dims[b], eps, dtype) for b in BRANCHES]

    def forward(self, *tokens: Tensor, logits: tuple[list[Tensor], ...] | None = None) -> list[tuple[Tensor, Tensor]]:
        outputs = [self._run_blocks(b, tokens[b], logits) for b in BRANCHES]
        patches = [x[:, 1:] for x in outputs]
        projected = [self.projs[b](outputs[b][:, :1]) for b in BRANCHES]
        fused = [self.fusion[b](F.concatenate(projected[b], patches[1 - b], axis=1)) for b in BRANCHES]
        return [(self.revert_projs[b](fused[b]), patches[b]) for b in BRANCHES]

    def _run_blocks(self, b: int, x: Tensor, logits: tuple[list[Tensor], ...] | None) -> Tensor:
        if logits is None:
            return self.blocks[b](x)
        for block in self.blocks[b].layers:
            x, block_logits = block(x, return_logits=True)
            logits[b].append(block_logits)
        return x


@register
class CrossViT(Model):
    """The complete model. Raises UserError if a branch's patch size does not divide its image size, or its heads do not divide its dim."""

    family, Config, presets = "crossvit", CrossViTConfig, PRESETS
    attends = True
    part_name = "branch"

    config: CrossViTConfig
    head: list[Linear]  # type: ignore[assignment]
    no_decay = (*Module.no_decay, *(f"{name}_{b}" for name in ("cls_token", "pos_embed") for b in BRANCHES))

    def __init__(self, config: CrossViTConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        branches, random = tuple(map(config.branch, BRANCHES)), self.random
        stem = ConvolutionStem if config.stem == "convolution" else PatchEmbed.of
        self.patch_embed: list[Stem] = [stem(c) for c in branches]
        for b, c in enumerate(branches):
            setattr(self, f"pos_embed_{b}", filled((1, 1 + prod(self.patch_embed[b].grid), c.dim), 0, c.dtype))
            setattr(self, f"cls_token_{b}", filled((1, 1, c.dim), 0, c.dtype))
        self.pos_drop = [Dropout(config.pos_drop_rate, random) for _ in BRANCHES]
        rates = np.linspace(0.0, config.drop_path_rate, config.stages * max(config.depths)).reshape(config.stages, -1)
        self.blocks = [Stage(branches, stage_rates, random) for stage_rates in rates]
        self.norm = [LayerNorm(c.dim, c.eps, c.dtype) for c in branches]
        self.head_drop = Dropout(config.drop_rate, random)
        self.head = [Linear(c.dim, config.num_classes, dtype=c.dtype) for c in branches]
        self.initialise()

    def initialisers(self) -> dict[str, Initialiser]:
        config = self.config
        if config.init == "zeros":
            return {}
        stems: dict[str, Initialiser] = {"patch_embed.*.weight": kaiming_uniform}
        for b, embed in enumerate(self.patch_embed):  # a bias as PyTorch draws it, by the inputs of its weights
            weights = ((name, p) for name, p in embed.named_parameters(f"patch_embed.{b}.") if name.endswith("weight"))
            stems |= {name.replace("weight", "bias"): uniform(prod(p.shape[1:]) ** -0.5) for name, p in weights}
        if config.init == "jax":
            return stems | {
                "pos_embed_?": normal(0.02),
                "*.qkv.weight": xavier_uniform(parts=3),
                "blocks.*.attn.*.weight": xavier_uniform(),
                "blocks.*.mlp.*.weight": xavier_uniform(),
                "blocks.*.mlp.*.bias": normal(1e-6),
                "blocks.*projs.?.2.weight": xavier_uniform(),
            }
        weight_init = truncated_normal(0.02)
        tokens = {"pos_embed_?": weight_init, "cls_token_?": weight_init}
        matrices = ("blocks.*.attn.*.weight", "blocks.*.mlp.*.weight", "blocks.*projs.?.2.weight", "head.?.weight")
        return stems | tokens | dict.fromkeys(matrices, weight_init)

    def embed(self, b: int, images: Tensor) -> Tensor:
        """The tokens of a branch before the first stage: images (B, C, H, W) -> (B, N, dim)."""
        B, C, H, W = images.shape
        size = both(self.config.branch_sizes[b])
        if size != (H, W):
            images = F.resample(images.reshape(B * C, H * W, 1), (H, W), size, "bicubic").reshape(B, C, *size)
        token, positions = (getattr(self, f"{name}_{b}") for name in ("cls_token", "pos_embed"))
        return self.pos_drop[b](with_class_token(self.patch_embed[b](images), token, positions))  # (B, N, dim)

    def class_tokens(self, images: Tensor, logits: tuple[list[Tensor], ...] | None = None) -> list[Tensor]:
        """The normalised class token of each branch, (B, dim): images (B, C, H, W) in the model's dtype.

        logits: a list for each branch, to which the scaled attention logits (B, H, N, N) of its blocks are appended.
        """
        check_images(images, self.config.image_shape)
        tokens = [self.embed(b, images) for b in BRANCHES]
        for stage in self.blocks[:-1]:
            tokens = [F.concatenate(*parts, axis=1) for parts in stage(*tokens, logits=logits)]
        last = self.blocks[-1](*tokens, logits=logits)
        return [self.norm[b](last[b][0])[:, 0] for b in BRANCHES]

    def features(self, images: Any) -> Tensor:
        """The class tokens of both branches one after the other: images -> (B, dims[0] + dims[1])."""
        return F.concatenate(*self.class_tokens(self.begin(images)), axis=1)

    def forward(self, images: Any) -> Tensor:
        tokens = self.class_tokens(self.begin(images))
        answers = [self.head[b](self.head_drop(tokens[b]), precise=True) for b in BRANCHES]
        return (answers[0] + answers[1]) * 0.5

    def reset_head(self, num_classes: int) -> None:
        self.config = replace(self.config, num_classes=num_classes)
        self.head = [Linear(dim, num_classes, dtype=self.config.dtype) for dim in self.config.dims]
        for head in self.head:
            head.train(self.training)
        self.initialise("head.*")

    # ----------------------------------------------------------------------------------------------------- weights of files
    def rename_foreign(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames `pos_embed.0`, as the authors write, to timm's `pos_embed_0`, and the class tokens likewise."""
        theirs = {f"{name}.{b}": f"{name}_{b}" for name in ("cls_token", "pos_embed") for b in BRANCHES}
        return {theirs.get(name, name): array for name, array in state.items()}

    def timm_arguments(self) -> tuple[str, dict[str, Any]]:
        config = self.config
        if config.stem == "convolution" and config.patch_sizes != (12, 16):
            raise UserError(f"timm has convolutions for patches of 12 and 16 pixels, not {config.patch_sizes}: export it as .onnx")
        sizes, whole = [both(size) for size in config.branch_sizes], both(config.image_size)
        scales = [ratio_of(size[0], whole[0]) for size in sizes]
        if any(tuple(int(side * scale) for side in whole) != size for scale, size in zip(scales, sizes)):
            raise UserError(f"timm's branches have the proportions of the image, not {config.branch_sizes}: export it as .onnx")
        hidden = [int(dim * ratio) for dim, ratio in zip(config.dims, config.mlp_ratios)]
        found: dict[str, Any] = {"img_size": config.image_size, "img_scale": tuple(scales), "patch_size": config.patch_sizes}
        found |= {"in_chans": config.in_channels, "num_classes": config.num_classes, "embed_dim": config.dims, "num_heads": config.heads}
        found |= {"depth": ((*config.depths, 0),) * config.stages, "mlp_ratio": (*map(ratio_of, hidden, config.dims), 1.0)}
        return "timm.models.CrossVit", found | {"multi_conv": config.stem == "convolution", "eps": config.eps}

    def resize_positions(self, state: dict[str, np.ndarray], method: str) -> dict[str, np.ndarray]:
        for b in BRANCHES:
            name = f"pos_embed_{b}"
            state = positions.fitted(state, name, getattr(self, name).shape, self.patch_embed[b].grid, 1, method)
        return state

    # --------------------------------------------------------------------------------------------------------- for pictures
    def backbones(self) -> list[Any]:
        return [Branch(self, b) for b in BRANCHES]


class Branch:
    """A branch of a CrossViT, to be drawn: it has the hooks for pictures of a `Backbone`."""

    attends, prefix = True, 1

    def __init__(self, model: CrossViT, b: int) -> None:
        self.model, self.b = model, b
        self.grid = model.patch_embed[b].grid

    def encode(self, images: Tensor, features: Any = None, relation: Any = None, logits: list[Tensor] | None = None) -> Tensor:
        """The class token (B, dim) of the branch. The logits of its blocks are appended to `logits`."""
        lists: tuple[list[Tensor], ...] = ([], [])
        token = self.model.class_tokens(images, lists)[self.b]
        if logits is not None:
            logits.extend(lists[self.b])
        return token

    def patch_filters(self) -> np.ndarray:
        return self.model.patch_embed[self.b].filters.numpy()

    def position_embedding(self) -> tuple[np.ndarray, tuple[int, int]]:
        return getattr(self.model, f"pos_embed_{self.b}").numpy()[0, 1:], self.grid

    def token_mixing_weights(self) -> list[np.ndarray]:
        return []
