"""T2T-ViT (Yuan et al., 2101.11986), with the authors' parameter names: a transformer over tokens that come from overlapping patches.

Three unfolds make the tokens (section 3.1): patches of pixels, mixed by a small attention block, are laid out as a grid, from which
overlapping patches are taken again, and once more. The small block is a Performer, whose attention is linear in the number of tokens, or a
transformer. The backbone is deep and narrow, with ViT's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np

from .. import functional as F
from ..errors import UserError
from ..nn.initialisers import Initialiser, lecun_normal, normal, orthogonal, truncated_normal, xavier_uniform
from ..nn.layers import Dropout, LayerNorm, Linear, Mlp, Random, Sequential, check_images, patch_grid, with_class_token
from ..nn.module import Module, filled
from ..schema import checked
from ..sides import both, times
from ..tensor import Tensor
from .base import Backbone
from .config import Patch, Positive, Rate, Size, StageConfig
from .registry import register
from .vit import Block, ViTConfig

UNFOLDS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))


@dataclass(frozen=True)
class T2TConfig(StageConfig):
    """The defaults are those of T2T-ViT-14. In a cascade, `patches` are the first unfolds, and the option `unfolds` holds the other two."""

    patch_options: ClassVar = ("unfolds",)

    unfolds: tuple[Patch, Patch, Patch] = UNFOLDS  # (size, stride, padding) in pixels, then in tokens of the grid before
    tokens: Literal["performer", "transformer"] = "performer"  # the attention blocks between the unfolds
    token_dim: Size = 64  # channels of a token between the unfolds
    kernel_features: Size | None = None  # random features of a Performer; None: token_dim / 2
    token_drop_rate: Rate = 0.1  # dropout after a Performer's projection and its MLP, as in the authors' code
    dim: Size = 384  # channels of a token of the backbone
    depth: Size = 14  # blocks
    heads: Size = 6  # attention heads of a block; divides dim
    mlp_ratio: Positive = 3.0  # hidden channels of a block's MLP, in units of dim
    qkv_bias: bool = False  # whether a block's projection to q, k and v has a bias
    drop_rate: Rate = 0.0  # dropout before the head
    pos_drop_rate: Rate = 0.0  # dropout after the position embedding
    proj_drop_rate: Rate = 0.0  # dropout after a block's attention's projection and each layer of its MLP
    attn_drop_rate: Rate = 0.0  # dropout of attention probabilities of blocks
    drop_path_rate: Rate = 0.0  # stochastic depth of the last block; increases linearly with depth, from 0 in the first
    eps: Positive = 1e-5  # of every layer normalisation
    init: Literal["timm", "jax", "zeros"] = "timm"  # initialisation: as in the authors' code, as in Google's ViT, or none

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block()

    @classmethod
    def patch_fields(cls, patch: Patch, options: Mapping[str, Any]) -> dict[str, Any]:
        later = checked("options: unfolds, after those of patches,", options.get("unfolds", UNFOLDS[1:]), tuple[Patch, Patch])
        return {"unfolds": (patch, *later)}

    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of tokens after each unfold. Raises UserError if an unfold takes patches larger than what is before it."""
        grids = [both(self.image_size)]
        for number, (size, stride, padding) in enumerate(self.unfolds, 1):
            try:
                grids.append(patch_grid(grids[-1], size, stride, padding))
            except UserError:
                raise UserError(
                    f"unfolds: number {number} takes patches of {times(both(size))}, and of images of {times(grids[0])} only "
                    f"{times(grids[-1])} with padding {padding} are left there: take smaller strides or a larger image"
                ) from None
        return grids[1:]

    def block(self) -> ViTConfig:
        """The configuration of a block of the backbone. Raises UserError where its fields do not fit each other."""
        names = "dim depth heads mlp_ratio qkv_bias proj_drop_rate attn_drop_rate eps dtype extra_channels"
        return ViTConfig(**{name: getattr(self, name) for name in names.split()})


def _preset(dim: int, depth: int, heads: int, ratio: float, **options: Any) -> dict[str, Any]:
    return dict(dim=dim, depth=depth, heads=heads, mlp_ratio=ratio, **options)


PRESETS: dict[str, dict[str, Any]] = {
    "t2t_vit_nano_8": dict(
        image_size=8,
        in_channels=1,
        num_classes=10,
        unfolds=((3, 1, 1), (3, 2, 1), (3, 1, 1)),  # 8, 4 and 4 a side
        token_dim=16,
        init="jax",
        **_preset(64, 4, 4, 2.0),
    ),
    "t2t_vit_tiny_32": dict(
        image_size=32,
        num_classes=10,
        unfolds=((5, 2, 2), (3, 2, 1), (3, 1, 1)),  # 16, 8 and 8 a side
        **_preset(192, 9, 3, 3.0),
    ),
    "t2t_vit_7": _preset(256, 7, 4, 2.0),
    "t2t_vit_10": _preset(256, 10, 4, 2.0),
    "t2t_vit_12": _preset(256, 12, 4, 2.0),
    "t2t_vit_14": _preset(384, 14, 6, 3.0),
    "t2t_vit_19": _preset(448, 19, 7, 3.0),
    "t2t_vit_24": _preset(512, 24, 8, 3.0),
    "t2t_vit_t_14": _preset(384, 14, 6, 3.0, tokens="transformer"),
    "t2t_vit_t_19": _preset(448, 19, 7, 3.0, tokens="transformer"),
    "t2t_vit_t_24": _preset(512, 24, 8, 3.0, tokens="transformer"),
}


class TokenMlp(Sequential):
    """The MLP of a Performer, whose layers have numbers as names: x + linear(gelu(linear(z))), (B, T, E) -> (B, T, E)."""

    def __init__(self, dim: int, dtype: str) -> None:
        super().__init__(Linear(dim, dim, dtype=dtype), None, Linear(dim, dim, dtype=dtype))  # None stands for the GELU

    def forward(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        first, _, second = self.layers
        return F.channel_mixing_mlp(z, first.weight, first.bias, second.weight, second.bias, residual=residual)


class Performer(Module):
    """y = v + proj(attention(norm1(x))), y + mlp(norm2(y)), with linear attention (`kernels/performer.py`): (B, T, inputs) -> (B, T, E).

    w: its random features (m, E), which are not trained. The residual connection begins at v, as x has other channels.
    """

    def __init__(self, inputs: int, config: T2TConfig, random: Random) -> None:
        dim, dtype = config.token_dim, config.dtype
        self.w = filled((config.kernel_features or max(1, dim // 2), dim), 0, dtype, requires_grad=False)
        self.kqv = Linear(inputs, 3 * dim, dtype=dtype, parts=3)
        self.proj = Linear(dim, dim, dtype=dtype)
        self.norm1 = LayerNorm(inputs, config.eps, dtype)
        self.norm2 = LayerNorm(dim, config.eps, dtype)
        self.mlp = TokenMlp(dim, dtype)
        self.drop1, self.drop2 = (Dropout(config.token_drop_rate, random) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y, v = F.performer(self.kqv(self.norm1(x)), self.w)
        y, z = self.norm2.add(v, self.drop1(self.proj(y)))
        return y + self.drop2(self.mlp(z)) if self.drop2.active else self.mlp(z, residual=y)


class TokenAttention(Module):
    """Attention with one head of other channels than its input's: returns v and proj(attention), (B, T, inputs) -> (B, T, E) twice.

    The scale is that of the input's channels, inputs^-1/2.
    """

    def __init__(self, inputs: int, dim: int, dtype: str) -> None:
        self.scale, self.dim = inputs**-0.5, dim
        self.qkv = Linear(inputs, 3 * dim, bias=False, dtype=dtype, parts=3)
        self.proj = Linear(dim, dim, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        qkv = self.qkv(x)  # (B, T, 3·E)
        return qkv[:, :, 2 * self.dim :], self.proj(F.attention(qkv, 1, self.scale))


class TokenTransformer(Module):
    """The same as a Performer, with softmax attention and no dropout: (B, T, inputs) -> (B, T, E)."""

    def __init__(self, inputs: int, config: T2TConfig, random: Random) -> None:
        dim, dtype = config.token_dim, config.dtype
        self.norm1 = LayerNorm(inputs, config.eps, dtype)
        self.attn = TokenAttention(inputs, dim, dtype)
        self.norm2 = LayerNorm(dim, config.eps, dtype)
        self.mlp = Mlp(dim, dim, random, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.norm2.add(*self.attn(self.norm1(x)))
        return self.mlp(z, residual=y)


class TokensToToken(Module):
    """Three unfolds, with a token block after the first two and a projection after the last: (B, in_channels, H, W) -> (B, N, dim)."""

    no_muon = ("attention1.kqv", "attention1.attn.qkv")  # the first weights, of either kind of block

    def __init__(self, config: T2TConfig, random: Random) -> None:
        self.shape, self.unfolds = config.image_shape, config.unfolds
        block = Performer if config.tokens == "performer" else TokenTransformer
        first, second, last = (prod(both(unfold[0])) for unfold in self.unfolds)
        self.attention1 = block(first * config.in_channels, config, random)
        self.attention2 = block(second * config.token_dim, config, random)
        self.project = Linear(last * config.token_dim, config.dim, dtype=config.dtype)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.shape)
        x = images
        for unfold, layer in zip(self.unfolds, (self.attention1, self.attention2, self.project)):
            patches = F.unfold(x, *unfold, channels_last=x is not images)  # (B, rows, columns, C·size²)
            B, rows, columns, size = patches.shape
            x = layer(patches.reshape(B, rows * columns, size)).reshape(B, rows, columns, -1)
        return x.reshape(B, rows * columns, -1)


def sinusoid(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """The fixed position embedding (1, tokens, dim): sine and cosine in turn, of n / 10000^(2⌊j/2⌋/dim), float32 (1706.03762, 3.5)."""
    _, tokens, dim = shape
    channels = np.arange(dim)
    angles = np.arange(tokens)[:, None] / 10000.0 ** (2 * (channels // 2) / dim)
    return np.where(channels % 2, np.cos(angles), np.sin(angles)).astype(np.float32)[None]


@register
class T2T(Backbone):
    """The complete model; the input of the head is the class token.

    The position embedding and the features of the Performers are not trained. Raises UserError if heads does not divide dim, or an unfold
    does not fit.
    """

    family, Config, presets = "t2t", T2TConfig, PRESETS
    attends = True
    prefix = 1

    config: T2TConfig
    blocks: list[Block]

    def __init__(self, config: T2TConfig, seed: int = 0, random: Random | None = None) -> None:
        super().__init__(config, seed, random)
        dim, dtype, random = config.dim, config.dtype, self.random
        self.grid = config.grids()[-1]
        self.cls_token = filled((1, 1, dim), 0, dtype)
        self.pos_embed = filled((1, 1 + prod(self.grid), dim), 0, dtype, requires_grad=False)
        self.tokens_to_token = TokensToToken(config, random)
        self.pos_drop = Dropout(config.pos_drop_rate, random)
        rates = np.linspace(0.0, config.drop_path_rate, config.depth)
        self.blocks = [Block(config.block(), float(rate), random) for rate in rates]
        self.norm = LayerNorm(dim, config.eps, dtype)
        self.head_drop = Dropout(config.drop_rate, random)
        self.head = Linear(dim, config.num_classes, dtype=dtype)
        self.initialise()

    def initialisers(self) -> dict[str, Initialiser]:
        if self.config.init == "zeros":
            return {}
        fixed: dict[str, Initialiser] = {"pos_embed": sinusoid, "tokens_to_token.*.w": orthogonal}
        if self.config.init == "jax":
            return fixed | {
                "tokens_to_token.project.weight": lecun_normal,
                "*.kqv.weight": xavier_uniform(parts=3),
                "*.qkv.weight": xavier_uniform(parts=3),
                "*.proj.weight": xavier_uniform(),
                "*.mlp.*.weight": xavier_uniform(),
                "*.mlp.*.bias": normal(1e-6),
            }
        weight_init = truncated_normal(0.02)
        matrices = "tokens_to_token.project", "*.kqv", "*.qkv", "*.proj", "*.mlp.*", "head"
        return fixed | {"cls_token": weight_init} | {f"{name}.weight": weight_init for name in matrices}

    @property
    def tokens_read(self) -> int:
        return 1

    def embed(self, images: Tensor) -> Tensor:
        x = self.tokens_to_token(images)  # (B, patches, C)
        return self.pos_drop(with_class_token(x, self.cls_token, self.pos_embed))  # (B, N, C)
