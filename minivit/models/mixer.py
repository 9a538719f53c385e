"""MLP-Mixer (Tolstikhin et al., 2105.01601), with timm's parameter names, shapes and defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from .. import functional as F
from ..nn.initialisers import Initialiser, lecun_normal, normal, xavier_uniform
from ..nn.layers import Dropout, DropPath, LayerNorm, Linear, Mlp, Random, TokenMlp
from ..nn.module import Module
from ..nn.stems import stem_of
from ..tensor import Tensor
from .base import Backbone, timm_patches
from .config import BackboneConfig, Positive, Rate, Size, ratio_of
from .names import dense, norm
from .registry import register


@dataclass(frozen=True)
class MixerConfig(BackboneConfig):
    """The defaults are those of Mixer-S/16."""

    dim: Size = 512  # channels of a token
    depth: Size = 8  # blocks
    token_hidden: Size | None = None  # hidden size of the MLP over tokens; None: dim / 2
    channel_hidden: Size | None = None  # hidden size of the MLP over channels; None: 4 dim
    drop_rate: Rate = 0.0  # dropout before the head
    proj_drop_rate: Rate = 0.0  # dropout after each layer of both MLPs
    drop_path_rate: Rate = 0.0  # stochastic depth, the same in every block and for both MLPs
    eps: Positive = 1e-6  # of every layer normalisation
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # exact, or the tanh approximation, which Google's weights expect
    init: Literal["timm", "jax", "zeros"] = "timm"  # initialisation: as in timm, as in Google's code, or none

    @classmethod
    def stage_defaults(cls, decided: Mapping[str, Any]) -> dict[str, Any]:
        return {"channel_hidden": int(decided["dim"] * decided["mlp_ratio"])}


PRESETS: dict[str, dict[str, Any]] = {
    "mixer_nano_patch2_8": dict(
        image_size=8, patch_size=2, in_channels=1, num_classes=10, dim=64, depth=4, token_hidden=32, channel_hidden=256
    ),
    "mixer_tiny_patch4_32": dict(image_size=32, patch_size=4, num_classes=10, dim=256, depth=8, token_hidden=128, channel_hidden=1024),
    "mixer_s32_224": dict(patch_size=32, dim=512, depth=8, token_hidden=256, channel_hidden=2048),
    "mixer_s16_224": dict(dim=512, depth=8, token_hidden=256, channel_hidden=2048),
    "mixer_b32_224": dict(patch_size=32, dim=768, depth=12, token_hidden=384, channel_hidden=3072),
    "mixer_b16_224": dict(dim=768, depth=12, token_hidden=384, channel_hidden=3072),
    "mixer_l32_224": dict(patch_size=32, dim=1024, depth=24, token_hidden=512, channel_hidden=4096),
    "mixer_l16_224": dict(dim=1024, depth=24, token_hidden=512, channel_hidden=4096),
}


class Block(Module):
    """x += mlp(norm(x)) over the tokens, then over the channels (section 2, equation 1): (B, N, C) -> (B, N, C).

    extra: (B, N, extra_channels), appended to the input of the second normalisation.
    """

    def __init__(self, config: MixerConfig, tokens: int, random: Random) -> None:
        dim, drop, dtype = config.dim, config.proj_drop_rate, config.dtype
        self.norm1 = LayerNorm(dim, config.eps, dtype)
        self.mlp_tokens = TokenMlp(tokens, config.token_hidden or max(1, dim // 2), random, config.activation, drop, dtype)
        self.drop_path1 = DropPath(config.drop_path_rate, random)
        mlp_dim = dim + config.extra_channels
        self.norm2 = LayerNorm(mlp_dim, config.eps, dtype)
        self.mlp_channels = Mlp(mlp_dim, config.channel_hidden or 4 * dim, random, config.activation, drop, dtype, out=dim)
        self.drop_path2 = DropPath(config.drop_path_rate, random)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        if self.drop_path1.active and extra is None:
            x, y = self.norm2.add(x, self.drop_path1(self.mlp_tokens(self.norm1(x))))
        else:
            if self.drop_path1.active:
                x = x + self.drop_path1(self.mlp_tokens(self.norm1(x)))
            else:
                x = self.mlp_tokens(self.norm1(x), residual=x)
            y = self.norm2(x if extra is None else F.concatenate(x, extra, axis=2))
        return x + self.drop_path2(self.mlp_channels(y)) if self.drop_path2.active else self.mlp_channels(y, residual=x)


@register
class Mixer(Backbone):
    """The complete model; the mean over tokens follows the final normalisation.

    Raises UserError if patch_size does not divide image_size.
    """

    family, Config, presets = "mixer", MixerConfig, PRESETS

    config: MixerConfig
    blocks: list[Block]

    def __init__(self, config: MixerConfig, seed: int = 0, random: Random | None = None) -> None:
        super().__init__(config, seed, random)
        dim, dtype = config.dim, config.dtype
        self.stem = stem_of(config)
        self.grid = self.stem.grid
        self.blocks = [Block(config, prod(self.grid), self.random) for _ in range(config.depth)]
        self.norm = LayerNorm(dim, config.eps, dtype)
        self.head_drop = Dropout(config.drop_rate, self.random)
        self.head = Linear(dim, config.num_classes, dtype=dtype)
        self.initialise()

    def initialisers(self) -> dict[str, Initialiser]:
        if self.config.init == "zeros":
            return {}
        if self.config.init == "jax":
            return {"stem.proj.weight": lecun_normal, "*.mlp_*.weight": lecun_normal}
        return {"stem.proj.weight": lecun_normal, "*.mlp_*.weight": xavier_uniform(), "*.mlp_*.bias": normal(1e-6)}

    def embed(self, images: Tensor) -> Tensor:
        return self.stem(images)

    def pool(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens).mean(1)

    def timm_arguments(self) -> tuple[str, dict[str, Any]]:
        config, mlps = self.config, (self.blocks[0].mlp_tokens, self.blocks[0].mlp_channels)
        ratios = tuple(ratio_of(len(mlp.fc1.weight), config.dim) for mlp in mlps)
        found = timm_patches(config) | {"num_blocks": config.depth, "embed_dim": config.dim, "mlp_ratio": ratios, "eps": config.eps}
        return "timm.models.MlpMixer", found | ({"act_layer": config.activation} if config.activation != "gelu" else {})

    def google_names(self, names: Collection[str]) -> dict[str, str]:
        table = dense("stem.proj", "stem") | norm("norm", "pre_head_layer_norm") | dense("head", "head")
        for i in range(self.config.depth):
            ours, theirs = f"blocks.{i}", f"MixerBlock_{i}"
            table |= norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0") | norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1")
            for k in (0, 1):
                table |= dense(f"{ours}.mlp_tokens.fc{k + 1}", f"{theirs}/token_mixing/Dense_{k}")
                table |= dense(f"{ours}.mlp_channels.fc{k + 1}", f"{theirs}/channel_mixing/Dense_{k}")
        return table

    def token_mixing_weights(self) -> list[np.ndarray]:
        return [block.mlp_tokens.fc1.weight.numpy() for block in self.blocks]
