"""DeepViT (Zhou et al., 2103.11886), with the authors' parameter names: a ViT whose attention maps are mixed among the heads.

In deep transformers the attention of later blocks becomes alike. Re-attention regenerates it: the maps of all heads are mixed by a learned
matrix and normalised over the batch before they weight the values (section 4.2).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

from .. import functional as F
from ..errors import UserError, shown
from ..nn.convolution import Conv2d
from ..nn.initialisers import Initialiser, kaiming_uniform, uniform
from ..nn.layers import Attention, BatchNorm, PatchEmbed, Projection, Random, Stem, check_images, patch_grid
from ..nn.module import Module
from ..schema import Limits
from ..sides import Sides, both
from ..tensor import Tensor
from . import vit
from .config import Count, Positive, Size
from .registry import register
from .vit import ViT, ViTConfig


@dataclass(frozen=True)
class DeepViTConfig(ViTConfig):
    """The defaults are those of DeepViT-16B."""

    dim: Size = 384  # channels of a token
    depth: Size = 16  # blocks
    heads: Size = 12  # attention heads of a block; divides dim
    mlp_ratio: Positive = 3.0  # hidden channels of a block's MLP, in units of dim
    reattention_blocks: Annotated[Sequence[Count], Limits(most=1024)] | None = None  # blocks with Re-attention, from 0; None: all
    reattention_scale: Positive = 1.0  # factor of the mixed and normalised attention maps
    residual_scale: Positive = 1.0  # a: a block normalises a·x, and divides its branches by a
    stem_width: Size = 64  # channels of the first two convolutions of the stem

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(i >= self.depth for i in self.reattention_blocks or ()):
            raise UserError(f"reattention_blocks must be from 0 to {self.depth - 1}, not {shown(self.reattention_blocks)}")

    def check_convolution_stem(self) -> None:
        for patch, image in zip(both(self.patch_size), both(self.image_size)):
            if patch % 2 or image % patch:
                raise UserError(f"stem='convolution' takes an even patch_size that divides image_size, not {patch} for {image} pixels")

    def reattends(self, i: int) -> bool:
        """Whether the i-th block has Re-attention."""
        return self.reattention_blocks is None or i in self.reattention_blocks


PRESETS: dict[str, dict[str, Any]] = {
    "deepvit_nano_patch2_8": dict(image_size=8, patch_size=2, in_channels=1, num_classes=10, dim=64, depth=4, heads=4, init="jax"),
    "deepvit_tiny_patch4_32": dict(image_size=32, patch_size=4, num_classes=10, dim=192, depth=12, heads=6),
    "deepvit_16b": dict(),
    "deepvit_24b": dict(depth=24),
    "deepvit_32b": dict(depth=32),
    "deepvit_s": dict(dim=396, reattention_blocks=tuple(range(11, 16)), reattention_scale=33**-0.5, residual_scale=0.5, stem="convolution"),
    "deepvit_l": dict(dim=420, depth=32, reattention_blocks=tuple(range(20, 32)), residual_scale=0.5, stem="convolution"),
}


def _half(patch_size: Sides) -> tuple[int, int]:
    rows, columns = both(patch_size)
    return rows // 2, columns // 2


class ConvolutionStem(Stem):
    """Three convolutions in place of the patch projection: (B, in_channels, H, W) -> (B, N, dim).

    7×7 with stride 2 and 3×3, each with batch normalisation and ReLU, then patches of half the patch size.
    """

    first = "conv1.weight"
    no_muon = (first,)

    def __init__(self, config: DeepViTConfig) -> None:
        width, dtype, half = config.stem_width, config.dtype, _half(config.patch_size)
        self.shape, self.grid = config.image_shape, patch_grid(config.image_size, config.patch_size)
        self.conv1 = Conv2d(config.in_channels, width, 7, stride=2, padding=3, bias=False, dtype=dtype)
        self.bn1 = BatchNorm(width, dtype=dtype)
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False, dtype=dtype)
        self.bn2 = BatchNorm(width, dtype=dtype)
        self.proj = Conv2d(width, config.dim, half, stride=half, dtype=dtype)

    def initialisers(self) -> dict[str, Initialiser]:
        return {"*.weight": kaiming_uniform, "proj.bias": uniform(prod(self.proj.weight.shape[1:]) ** -0.5)}

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.shape)
        x = self.conv1(images.transpose(0, 2, 3, 1), self.bn1, "relu")  # (B, H/2, W/2, width)
        x = self.proj(self.conv2(x, self.bn2, "relu"))  # (B, rows, columns, dim)
        return x.reshape(len(x), -1, x.shape[3])


class ReAttention(Attention):
    """Attention whose probabilities are mixed among the heads and normalised, before they weight the values (equation 3).

    The normalisation and the mixing are one matrix A and one constant c for each head (`kernels/head_mixing.py`).
    """

    needs_probabilities = True

    def __init__(self, config: DeepViTConfig, random: Random) -> None:
        heads, dtype = config.heads, config.dtype
        super().__init__(config.dim, heads, random, config.qkv_bias, config.attn_drop_rate, config.proj_drop_rate, dtype)
        self.scale = config.reattention_scale
        self.reatten_matrix = Projection(heads, heads, 1, dtype)
        self.var_norm = BatchNorm(heads, dtype=dtype)

    def context(self, probabilities: Tensor, v: Tensor) -> Tensor:
        H, norm = self.heads, self.var_norm
        matrix = self.reatten_matrix.weight.reshape(H, H)
        if self.training:
            norm.check_batch(probabilities)
            mean, covariance = F.head_moments(probabilities)
            mixed_mean = (matrix @ mean.reshape(H, 1)).reshape(H) + self.reatten_matrix.bias
            mixed_variance = ((matrix @ covariance) * matrix).sum(1)
            norm.follow(mixed_mean, mixed_variance, probabilities.size // H)
        else:
            mixed_mean, mixed_variance = norm.running_mean, norm.running_var
        factor = norm.weight / F.sqrt(mixed_variance + norm.eps) * self.scale  # (H,)
        constant = norm.bias * self.scale + factor * (self.reatten_matrix.bias - mixed_mean)
        return F.head_mixing(probabilities, v, matrix * factor.reshape(H, 1), constant)


class Scale(Module):
    """x times a constant."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Block(vit.Block):
    """As in ViT, but with Re-attention in some blocks; with a residual_scale a, x += attention(norm(a·x)) / a, and the MLP likewise."""

    def __init__(self, config: DeepViTConfig, reattends: bool, drop_path_rate: float, random: Random) -> None:
        self.reattends = reattends
        super().__init__(config, drop_path_rate, random)
        if config.residual_scale != 1.0:
            for norm in self.norm1, self.norm2:
                norm.eps = config.eps / config.residual_scale**2  # the same as scaling x
            self.ls1, self.ls2 = (Scale(1 / config.residual_scale) for _ in range(2))

    def attention(self, config: ViTConfig, random: Random) -> Attention:
        assert isinstance(config, DeepViTConfig)
        return ReAttention(config, random) if self.reattends else super().attention(config, random)


@register
class DeepViT(ViT):
    """The complete model. Its batches are not computed in parts, because of the batch normalisation.

    Raises UserError as `ViT` does, for blocks that there are not, and for an odd image or patch size with stem="convolution".
    """

    family, Config, presets = "deepvit", DeepViTConfig, PRESETS

    config: DeepViTConfig

    @staticmethod
    def _patch_embed(config: ViTConfig) -> Stem:
        assert isinstance(config, DeepViTConfig)
        return ConvolutionStem(config) if config.stem == "convolution" else PatchEmbed.of(config)

    def block(self, i: int, drop_path_rate: float) -> Block:
        return Block(self.config, self.config.reattends(i), drop_path_rate, self.random)

    def initialisers(self) -> dict[str, Initialiser]:
        config = self.config
        if config.init == "zeros":
            return {}
        return {"*.reatten_matrix.*": uniform(config.heads**-0.5), **super().initialisers()}

    def google_names(self, names: Collection[str]) -> None:
        return None
