"""LocalViT (Li et al., 2104.05707), with the names of the authors' code.

A Vision Transformer whose MLPs are inverted residual blocks of MobileNet: a depthwise convolution between the two layers, which become 1×1
convolutions, brings locality. They see the patches as a map; the class token passes them by. There is no layer normalisation before them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from .. import functional as F
from ..errors import UserError
from ..nn.convolution import Conv2d, DepthwiseConv2d, EfficientChannelAttention, SqueezeExcitation, convolve_all
from ..nn.initialisers import Initialiser, kaiming_uniform, lecun_normal, normal, on_convolutions, truncated_normal, uniform, xavier_uniform
from ..nn.layers import Attention, AttentionPool, BatchNorm, Dropout, DropPath, LayerNorm, Linear, Random, Sequential, with_class_token
from ..nn.module import Module, filled
from ..nn.stems import stem_of
from ..tensor import Tensor
from .base import Backbone
from .config import BackboneConfig, Positive, Rate, Size
from .registry import register

FUNCTIONS = {"hswish": "hardswish", "relu6": "relu6"}


@dataclass(frozen=True)
class LocalViTConfig(BackboneConfig):
    """The defaults are those of LocalViT-T."""

    dim: Size = 192  # channels of a token
    depth: Size = 12  # blocks
    heads: Size = 4  # attention heads of a block; divides dim
    mlp_ratio: Positive = 4.0  # hidden channels of a block's convolutions, in units of dim
    qkv_bias: bool = True  # whether the projection to q, k and v has a bias
    activation: Literal["hswish", "relu6"] = "hswish"  # after the first two convolutions
    depthwise: Literal["middle", "first", "none"] = "middle"  # place of the depthwise convolution: between the others, before them, nowhere
    channel_attention: Literal["se", "eca", "eca_hard"] | None = "se"  # before the last: squeeze-and-excitation, ECA, with hard sigmoid
    # Input of the head: the class token, or without one the mean of the patch tokens, plain or weighted by learned scores (2104.05704).
    pool: Literal["cls", "mean", "attention"] = "cls"
    se_reduction: Size = 192  # hidden channels of a block's convolutions, in units of the hidden units of its squeeze-and-excitation
    drop_rate: Rate = 0.0  # dropout before the head
    pos_drop_rate: Rate = 0.0  # dropout after the position embedding
    proj_drop_rate: Rate = 0.0  # dropout after the attention's projection
    attn_drop_rate: Rate = 0.0  # dropout of attention probabilities
    drop_path_rate: Rate = 0.0  # stochastic depth of the last block's attention; increases linearly with depth, from 0 in the first
    eps: Positive = 1e-6  # of every layer normalisation; batch normalisation has 1e-5
    init: Literal["timm", "jax", "zeros"] = "timm"  # initialisation: as in the authors' code, as in Google's ViT, or none


# A convolution stem, and blocks without channel attention: what learns most in minutes on a CPU (docs/results.md). Attention pooling won on
# images of 32 pixels, not on digits and photographs (benchmarks/LOG.md).
COMPACT: dict[str, Any] = dict(num_classes=10, mlp_ratio=2.0, channel_attention=None, pool="mean", stem="convolution", init="jax")

PRESETS: dict[str, dict[str, Any]] = {
    "localvit_micro_patch2_8": dict(COMPACT, image_size=8, in_channels=1, patch_size=2, dim=64, depth=2, heads=4),
    "localvit_mini_patch2_8": dict(COMPACT, image_size=8, in_channels=1, patch_size=2, dim=96, depth=3, heads=3),
    "localvit_midi_patch2_8": dict(COMPACT, image_size=8, in_channels=1, patch_size=2, dim=128, depth=4, heads=4, stem_width=32),
    "localvit_micro_patch4_32": dict(COMPACT, image_size=32, patch_size=4, dim=96, depth=3, heads=3, pool="attention"),
    "localvit_mini_patch4_32": dict(COMPACT, image_size=32, patch_size=4, dim=128, depth=4, heads=4, stem_width=32, pool="attention"),
    "localvit_midi_patch4_32": dict(COMPACT, image_size=32, patch_size=4, dim=192, depth=5, heads=6, stem_width=48, pool="attention"),
    "localvit_micro_patch8_64": dict(COMPACT, image_size=64, patch_size=8, dim=96, depth=3, heads=3),
    "localvit_mini_patch8_64": dict(COMPACT, image_size=64, patch_size=8, dim=128, depth=4, heads=4, stem_width=32),
    "localvit_midi_patch8_64": dict(COMPACT, image_size=64, patch_size=8, dim=192, depth=5, heads=6, stem_width=48),
    "localvit_micro_patch8_96": dict(COMPACT, image_size=96, patch_size=8, dim=96, depth=3, heads=3, stem_width=16),
    "localvit_mini_patch8_96": dict(COMPACT, image_size=96, patch_size=8, dim=128, depth=4, heads=4),
    "localvit_midi_patch8_96": dict(COMPACT, image_size=96, patch_size=8, dim=192, depth=5, heads=6, stem_width=32),
    "localvit_micro_patch16_128": dict(COMPACT, image_size=128, patch_size=16, dim=96, depth=3, heads=3, stem_width=12),
    "localvit_mini_patch16_128": dict(COMPACT, image_size=128, patch_size=16, dim=128, depth=4, heads=4, stem_width=16),
    "localvit_midi_patch16_128": dict(COMPACT, image_size=128, patch_size=16, dim=192, depth=5, heads=6),
    "localvit_nano_patch2_8": dict(
        image_size=8, patch_size=2, in_channels=1, num_classes=10, dim=64, depth=4, mlp_ratio=2.0, se_reduction=32, init="jax"
    ),
    "localvit_nano_patch4_32": dict(image_size=32, patch_size=4, num_classes=10, dim=128, depth=4, se_reduction=128, init="jax"),
    "localvit_tiny_patch4_32": dict(image_size=32, patch_size=4, num_classes=10, depth=9),
    "localvit_tiny": dict(),
    "localvit_tiny_mlp4_act3_r4": dict(se_reduction=4),
    "localvit_tiny_mlp6_act1": dict(mlp_ratio=6.0, activation="relu6", channel_attention=None),
    "localvit_small": dict(dim=384, heads=8, se_reduction=384),
}


class Locality(Module):
    """The convolutions of a block, without the residual: a map (B, H, W, C + extra_channels) -> (B, H, W, C) (section 3.2, figure 3)."""

    def __init__(self, config: LocalViTConfig) -> None:
        dim, hidden, dtype = config.dim, int(config.dim * config.mlp_ratio), config.dtype
        if hidden < 1:
            raise UserError(f"mlp_ratio={config.mlp_ratio} leaves no hidden channel of dim {dim}: make it larger")
        inputs = dim + config.extra_channels
        self.activation = FUNCTIONS[config.activation]

        def depthwise(channels: int) -> list[Any]:  # None stands for the activation
            return [DepthwiseConv2d(channels, 3, padding=1, bias=False, dtype=dtype), BatchNorm(channels, dtype=dtype), None]

        layers: list[Any] = [Conv2d(inputs, hidden, 1, bias=False, dtype=dtype), BatchNorm(hidden, dtype=dtype), None]
        if config.depthwise == "first":
            layers = [*depthwise(inputs), *layers]
        elif config.depthwise == "middle":
            layers += depthwise(hidden)
        if config.channel_attention == "se":
            layers.append(SqueezeExcitation(hidden, config.se_reduction, dtype))
        elif config.channel_attention:
            layers.append(EfficientChannelAttention(hidden, config.channel_attention == "eca_hard", dtype))
        layers += [Conv2d(hidden, dim, 1, bias=False, dtype=dtype), BatchNorm(dim, dtype=dtype)]
        self.conv = Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return convolve_all(self.conv.layers, x, self.activation)


class Block(Module):
    """x += attention(norm1(x)) for all tokens, then x += conv(x) for the map of patches: (B, N, C) -> (B, N, C), N = prefix + rows·columns.

    extra: (B, N, extra_channels), appended to the input of the convolutions. bias: (B, H, N, N), added to the scaled attention logits.
    return_logits: also return these logits, after the tokens.
    """

    def __init__(self, config: LocalViTConfig, grid: tuple[int, int], drop_path_rate: float, random: Random) -> None:
        dim, dtype = config.dim, config.dtype
        self.grid, self.prefix = grid, int(config.pool == "cls")
        self.norm1 = LayerNorm(dim, config.eps, dtype)
        self.attn = Attention(dim, config.heads, random, config.qkv_bias, config.attn_drop_rate, config.proj_drop_rate, dtype)
        self.drop_path = DropPath(drop_path_rate, random)
        self.conv = Locality(config)

    def forward(self, x: Tensor, extra: Tensor | None = None, bias: Tensor | None = None, return_logits: bool = False) -> Any:
        result = self.attn(self.norm1(x), bias, return_logits)
        branch, logits = result if return_logits else (result, None)
        patches = x = x + self.drop_path(branch)
        if self.prefix:
            class_token, patches = F.split(x, (1, x.shape[1] - 1), axis=1)  # (B, 1, C), (B, rows·columns, C)
        inputs = patches if extra is None else F.concatenate(patches, extra[:, self.prefix :], axis=2)
        y = self.conv(inputs.reshape(len(x), *self.grid, -1)).reshape(patches.shape)
        x = F.concatenate(class_token, patches + y, axis=1) if self.prefix else patches + y
        return (x, logits) if return_logits else x


@register
class LocalViT(Backbone):
    """The complete model; the input of the head is the class token, as in the paper, or a mean of the patch tokens.

    A plain mean precedes the final normalisation, as in timm's ViT; attention pooling follows it.
    Raises UserError if heads does not divide dim, patch_size does not divide image_size, or mlp_ratio or se_reduction leaves nothing.
    """

    family, Config, presets = "localvit", LocalViTConfig, PRESETS
    attends = True

    config: LocalViTConfig
    blocks: list[Block]

    def __init__(self, config: LocalViTConfig, seed: int = 0, random: Random | None = None) -> None:
        super().__init__(config, seed, random)
        dim, dtype, random = config.dim, config.dtype, self.random
        embed = stem_of(config)
        self.prefix, self.grid = int(config.pool == "cls"), embed.grid
        self.cls_token = filled((1, 1, dim), 0, dtype) if self.prefix else None
        self.pos_embed = filled((1, self.prefix + prod(embed.grid), dim), 0, dtype)
        self.patch_embed = embed
        self.pos_drop = Dropout(config.pos_drop_rate, random)
        self.blocks = [Block(config, self.grid, float(rate), random) for rate in np.linspace(0.0, config.drop_path_rate, config.depth)]
        self.norm = LayerNorm(dim, config.eps, dtype)
        self.attention_pool = AttentionPool(dim, dtype) if config.pool == "attention" else None
        self.head_drop = Dropout(config.drop_rate, random)
        self.head = Linear(dim, config.num_classes, dtype=dtype)
        self.initialise()

    def initialisers(self) -> dict[str, Initialiser]:
        config = self.config
        if config.init == "zeros":
            return {}
        if config.init == "jax":
            return {
                "pos_embed": normal(0.02),
                "patch_embed.proj.weight": lecun_normal,
                "*.qkv.weight": xavier_uniform(parts=3),
                "*.attn.proj.weight": xavier_uniform(),
                "*.fc.?.weight": xavier_uniform(),
                "*.conv.weight": lecun_normal,  # of ECA
                "*.conv.?.weight": on_convolutions(lecun_normal),
            }
        weight_init = truncated_normal(0.02)
        return {
            "cls_token": weight_init,
            "pos_embed": weight_init,
            "patch_embed.*": uniform(config.patch_values**-0.5),
            "*.attn.*.weight": weight_init,
            "*.fc.?.weight": weight_init,
            "*.conv.weight": kaiming_uniform,  # of ECA
            "*.conv.?.weight": kaiming_uniform,
            "head.weight": weight_init,
        }

    def embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)  # (B, patches, C)
        return self.pos_drop(with_class_token(x, self.cls_token, self.pos_embed))  # (B, N, C)

    def pool(self, tokens: Tensor) -> Tensor:
        if self.prefix:
            return super().pool(tokens)
        return self.norm(tokens.mean(1)) if self.attention_pool is None else self.attention_pool(self.norm(tokens))
