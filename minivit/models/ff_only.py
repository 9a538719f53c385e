"""The feed-forward-only transformer, "Do You Even Need Attention?" (Melas-Kyriazi, 2105.02723), with the names of the author's code.

A Vision Transformer with attention replaced by an MLP over the tokens. Unlike in MLP-Mixer, this MLP comes second in a block, its
normalisation is over the tokens too, and there are position embeddings and a class token, which is mixed with the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from .. import functional as F
from ..errors import UserError
from ..nn.initialisers import Initialiser, lecun_normal, normal, truncated_normal, uniform, xavier_uniform
from ..nn.layers import Dropout, DropPath, LayerNorm, Linear, Mlp, Random, TokenLayerNorm, TokenMlp, with_class_token
from ..nn.module import Module, filled
from ..nn.stems import stem_of
from ..sides import both
from ..tensor import Tensor
from .base import Backbone
from .config import BackboneConfig, PatchSize, Positive, Rate, Size
from .registry import register


@dataclass(frozen=True)
class FFOnlyConfig(BackboneConfig):
    """The defaults are those of the tiny model."""

    position_grid: PatchSize | None = None  # grid of the stored position embeddings, (rows, columns) or one number; None: the patches'
    dim: Size = 192  # channels of a token
    depth: Size = 12  # blocks
    mlp_ratio: Positive = 4.0  # hidden size of the channel MLP in units of dim, and of the token MLP in units of the number of tokens
    drop_rate: Rate = 0.0  # dropout before the head
    pos_drop_rate: Rate = 0.0  # dropout after the position embedding
    proj_drop_rate: Rate = 0.0  # dropout after each layer of both MLPs
    drop_path_rate: Rate = 0.0  # stochastic depth of the last block; increases linearly with depth, from 0 in the first
    eps: Positive = 1e-6  # of every layer normalisation
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # exact, or the tanh approximation
    init: Literal["timm", "jax", "zeros"] = "timm"  # initialisation: as in the author's code, as in Google's ViT, or none


PRESETS: dict[str, dict[str, Any]] = {
    "ff_only_nano_patch2_8": dict(image_size=8, patch_size=2, in_channels=1, num_classes=10, dim=64, depth=4, init="jax"),
    "ff_only_nano_patch4_32": dict(image_size=32, patch_size=4, num_classes=10, dim=128, depth=4, init="jax"),
    "ff_only_tiny": dict(),
    "ff_only_base": dict(dim=768),
    "ff_only_large": dict(patch_size=32, position_grid=14, dim=1024, depth=24),
}


class Block(Module):
    """x += mlp1(norm1(x)) over the channels, then x += mlp2(norm2(x)) over the tokens (section 2): (B, N, C) -> (B, N, C).

    extra: (B, N, extra_channels), appended to the input of the first normalisation.
    """

    def __init__(self, config: FFOnlyConfig, tokens: int, drop_path_rate: float, random: Random) -> None:
        dim, ratio, drop, dtype = config.dim, config.mlp_ratio, config.proj_drop_rate, config.dtype
        mlp_dim = dim + config.extra_channels
        self.mlp1 = Mlp(mlp_dim, int(dim * ratio), random, config.activation, drop, dtype, out=dim)
        self.norm1 = LayerNorm(mlp_dim, config.eps, dtype)
        self.drop_path1 = DropPath(drop_path_rate, random)
        self.mlp2 = TokenMlp(tokens, int(tokens * ratio), random, config.activation, drop, dtype)
        self.norm2 = TokenLayerNorm(tokens, config.eps, dtype)
        self.drop_path2 = DropPath(drop_path_rate, random)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        y = self.norm1(x if extra is None else F.concatenate(x, extra, axis=2))
        x = x + self.drop_path1(self.mlp1(y)) if self.drop_path1.active else self.mlp1(y, residual=x)
        y = self.norm2(x)
        return x + self.drop_path2(self.mlp2(y)) if self.drop_path2.active else self.mlp2(y, residual=x)


class PositionEncoding(Module):
    """The position embeddings (1, 1 + patches, dim) of the class token and the patches; the latter are resized bilinearly to the grid.

    pos_embed is stored as an image, (1, dim, rows, columns).
    """

    no_decay = (*Module.no_decay, "cls_pos_embed")

    def __init__(self, stored: tuple[int, int], grid: tuple[int, int], dim: int, dtype: str) -> None:
        self.stored, self.grid = stored, grid
        self.pos_embed = filled((1, dim, *stored), 0.0, dtype)
        self.cls_pos_embed = filled((1, 1, dim), 0.0, dtype)

    def forward(self) -> Tensor:
        positions = self.pos_embed.reshape(1, -1, prod(self.stored)).transpose(0, 2, 1)  # (1, stored, C)
        if self.stored != self.grid:
            positions = F.resample(positions, self.stored, self.grid, "bilinear")  # (1, patches, C)
        return F.concatenate(self.cls_pos_embed, positions, axis=1)


@register
class FFOnly(Backbone):
    """The complete model; the input of the head is the class token.

    Raises UserError if patch_size does not divide image_size, or mlp_ratio leaves an MLP without hidden units.
    """

    family, Config, presets = "ff_only", FFOnlyConfig, PRESETS

    config: FFOnlyConfig
    blocks: list[Block]
    prefix = 1

    def __init__(self, config: FFOnlyConfig, seed: int = 0, random: Random | None = None) -> None:
        super().__init__(config, seed, random)
        dim, dtype, random = config.dim, config.dtype, self.random
        self.cls_token = filled((1, 1, dim), 0.0, dtype)
        self.patch_embed = stem_of(config)
        self.grid = self.patch_embed.grid
        tokens = 1 + prod(self.grid)
        if int(min(dim, tokens) * config.mlp_ratio) < 1:
            raise UserError(f"mlp_ratio={config.mlp_ratio} leaves no hidden unit of {dim} channels or {tokens} tokens: make it larger")
        self.pos_encoding = PositionEncoding(both(config.position_grid or self.grid), self.grid, dim, dtype)
        self.pos_drop = Dropout(config.pos_drop_rate, random)
        self.blocks = [Block(config, tokens, float(rate), random) for rate in np.linspace(0.0, config.drop_path_rate, config.depth)]
        self.norm = LayerNorm(dim, config.eps, dtype)
        self.head_drop = Dropout(config.drop_rate, random)
        self.head = Linear(dim, config.num_classes, dtype=dtype)
        self.initialise()

    def initialisers(self) -> dict[str, Initialiser]:
        config = self.config
        if config.init == "zeros":
            return {}
        if config.init == "jax":
            return {
                "pos_encoding.*": normal(0.02),
                "patch_embed.proj.weight": lecun_normal,
                "*.mlp?.*.weight": xavier_uniform(),
                "*.mlp?.*.bias": normal(1e-6),
            }
        weight_init = truncated_normal(0.02)
        return {
            "cls_token": weight_init,
            "pos_encoding.*": weight_init,
            "patch_embed.*": uniform(config.patch_values**-0.5),
            "*.mlp?.*.weight": weight_init,
            "head.weight": weight_init,
        }

    def embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)  # (B, patches, C)
        return self.pos_drop(with_class_token(x, self.cls_token, self.pos_encoding()))  # (B, N, C)

    def position_embedding(self) -> tuple[np.ndarray, tuple[int, int]]:
        stored = self.pos_encoding.stored
        return self.pos_encoding.pos_embed.numpy()[0].reshape(-1, prod(stored)).T, stored

    def token_mixing_weights(self) -> list[np.ndarray]:
        return [block.mlp2.fc1.weight.numpy()[:, self.prefix :] for block in self.blocks]
