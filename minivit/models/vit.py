"""Vision Transformer (Dosovitskiy et al., 2010.11929), with timm's parameter names, shapes and defaults."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import numpy as np

from .. import functional as F
from ..errors import UserError
from ..nn.initialisers import Initialiser, lecun_normal, normal, truncated_normal, uniform, xavier_uniform
from ..nn.layers import Attention, AttentionPool, Dropout, DropPath, LayerNorm, LayerScale, Linear, Mlp, Random, Stem, with_class_token
from ..nn.module import Module, Parameter, filled
from ..nn.stems import stem_of
from ..sides import Sides, simplest
from ..tensor import Tensor
from . import positions
from .base import Backbone, timm_patches
from .config import BackboneConfig, Positive, Rate, Size, ratio_of
from .names import dense, from_hugging_face, norm
from .registry import register


@dataclass(frozen=True)
class ViTConfig(BackboneConfig):
    """The defaults are those of ViT-B/16."""

    dim: Size = 768  # channels of a token
    depth: Size = 12  # blocks
    heads: Size = 12  # attention heads of a block; divides dim
    mlp_ratio: Positive = 4.0  # hidden channels of a block's MLP, in units of dim
    qkv_bias: bool = True  # whether the projection to q, k and v has a bias
    # Input of the head: the class token, the mean of the patch tokens, or their mean weighted by learned scores (2104.05704).
    pool: Literal["cls", "mean", "attention"] = "cls"
    class_token: bool = True  # whether there is a class token; required by pool="cls"
    # DeiT's second token, after the class token (2012.12877): none, alone, or with a head of its own; the logits are then the mean of both.
    distillation: Literal["none", "token", "head"] = field(default="none", metadata={"not_in_cascades": True})
    layer_scale: Positive | None = None  # initial factor of each residual branch (2103.17239); None: no LayerScale
    drop_rate: Rate = 0.0  # dropout before the head
    pos_drop_rate: Rate = 0.0  # dropout after the position embedding
    proj_drop_rate: Rate = 0.0  # dropout after the attention's projection and each layer of the MLP
    attn_drop_rate: Rate = 0.0  # dropout of attention probabilities
    drop_path_rate: Rate = 0.0  # stochastic depth of the last block; increases linearly with depth, from 0 in the first
    eps: Positive = 1e-6  # of every layer normalisation
    activation: Literal["gelu", "gelu_tanh"] = "gelu"  # exact, or the tanh approximation, which Google's weights expect
    init: Literal["timm", "jax", "zeros"] = "timm"  # initialisation: as in timm, as in Google's code, or none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool == "cls" and not self.class_token:
            raise UserError("pool='cls' needs a class token: set class_token=True, or pool='mean'")
        if self.distillation != "none" and self.pool != "cls":
            raise UserError(f"distillation={self.distillation!r} stands beside a class token that the head reads: set pool='cls'")
        if int(self.dim * self.mlp_ratio) < 1:
            raise UserError(f"mlp_ratio={self.mlp_ratio} leaves no hidden channel of dim {self.dim}: make it larger")


PRESETS: dict[str, dict[str, Any]] = {
    "vit_nano_patch2_8": dict(
        image_size=8, patch_size=2, in_channels=1, num_classes=10, dim=64, depth=4, heads=4, pool="mean", class_token=False, init="jax"
    ),
    "vit_nano_patch4_32": dict(
        image_size=32, patch_size=4, num_classes=10, dim=128, depth=4, heads=4, pool="mean", class_token=False, init="jax"
    ),
    "vit_tiny_patch4_32": dict(image_size=32, patch_size=4, num_classes=10, dim=192, depth=9, heads=3),
    "vit_small_patch4_32": dict(image_size=32, patch_size=4, num_classes=10, dim=384, depth=7, heads=6, pool="mean", class_token=False),
    "vit_tiny_patch16_224": dict(dim=192, heads=3),
    "vit_small_patch16_224": dict(dim=384, heads=6),
    "vit_base_patch32_224": dict(patch_size=32),
    "vit_base_patch16_224": dict(),
    "vit_large_patch16_224": dict(dim=1024, depth=24, heads=16),
    "vit_huge_patch14_224": dict(patch_size=14, dim=1280, depth=32, heads=16),
}


class Block(Module):
    """x += attention(norm(x)); x += mlp(norm(x)) (section 3.1, equations 2 and 3): (B, N, C) -> (B, N, C).

    extra: (B, N, extra_channels), appended to the input of the second normalisation. bias: (B, H, N, N), added to the scaled attention
    logits. return_logits: also return these logits, after the tokens. first: return, and compute, so many first tokens alone.
    """

    def __init__(self, config: ViTConfig, drop_path_rate: float, random: Random) -> None:
        dim, dtype = config.dim, config.dtype
        self.norm1 = LayerNorm(dim, config.eps, dtype)
        self.attn = self.attention(config, random)
        self.ls1: Module | None = None if config.layer_scale is None else LayerScale(dim, config.layer_scale, dtype)
        self.drop_path1 = DropPath(drop_path_rate, random)
        mlp_dim = dim + config.extra_channels
        self.norm2 = LayerNorm(mlp_dim, config.eps, dtype)
        self.mlp = Mlp(mlp_dim, int(dim * config.mlp_ratio), random, config.activation, config.proj_drop_rate, dtype, out=dim)
        self.ls2: Module | None = None if config.layer_scale is None else LayerScale(dim, config.layer_scale, dtype)
        self.drop_path2 = DropPath(drop_path_rate, random)

    def attention(self, config: ViTConfig, random: Random) -> Attention:
        """The attention of the block."""
        return Attention(config.dim, config.heads, random, config.qkv_bias, config.attn_drop_rate, config.proj_drop_rate, config.dtype)

    def forward(
        self,
        x: Tensor,
        extra: Tensor | None = None,
        bias: Tensor | None = None,
        return_logits: bool = False,
        first: int | None = None,
    ) -> Any:
        # On a GPU, the product of the projection adds x at the cost of reading it; elsewhere the normalisation does.
        adds = x.device == "cuda" and extra is None and self.ls1 is None and not (self.drop_path1.active or self.attn.proj_drop.active)
        result = self.attn(self.norm1(x), bias, return_logits, first, x if adds else None)
        branch, logits = result if return_logits else (result, None)
        if first is not None and not adds:
            x, extra = x[:, :first], None if extra is None else extra[:, :first]
        branch = self.drop_path1(self.ls1(branch) if self.ls1 else branch)
        if adds:
            x, y = branch, self.norm2(branch)
        elif extra is None:
            x, y = self.norm2.add(x, branch)
        else:
            x = x + branch
            y = self.norm2(F.concatenate(x, extra, axis=2))
        if self.ls2 is None and not self.drop_path2.active:
            x = self.mlp(y, residual=x)
        else:
            branch = self.mlp(y)
            x = x + self.drop_path2(self.ls2(branch) if self.ls2 else branch)
        return (x, logits) if return_logits else x


@register
class ViT(Backbone):
    """The complete model.

    Mean pooling follows timm: it excludes the class token and precedes the final normalisation, which is then named `fc_norm`. Attention
    pooling excludes it too, and follows the normalisation, as in the Compact Convolutional Transformer.
    Raises UserError if heads does not divide dim, or patch_size does not divide image_size.
    """

    family, Config, presets = "vit", ViTConfig, PRESETS
    attends = True

    config: ViTConfig
    blocks: list[Block]
    pos_embed: Parameter
    no_decay = (*Module.no_decay, "dist_token")
    no_muon = ("head", "head_dist")
    ignored = ("mask_token",)  # of self-supervised training

    def __init__(self, config: ViTConfig, seed: int = 0, random: Random | None = None) -> None:
        super().__init__(config, seed, random)
        dim, dtype, random = config.dim, config.dtype, self.random
        embed = self._patch_embed(config)
        distilled = config.distillation != "none"
        self.prefix, self.grid = int(config.class_token) + distilled, embed.grid
        self.cls_token = filled((1, 1, dim), 0.0, dtype) if config.class_token else None
        self.dist_token = filled((1, 1, dim), 0.0, dtype) if distilled else None
        self.pos_embed = filled((1, self.prefix + prod(embed.grid), dim), 0.0, dtype)
        self.patch_embed = embed
        self.pos_drop = Dropout(config.pos_drop_rate, random)
        self.blocks = [self.block(i, float(rate)) for i, rate in enumerate(np.linspace(0.0, config.drop_path_rate, config.depth))]
        norm = LayerNorm(dim, config.eps, dtype)
        self.norm: Any
        self.fc_norm: LayerNorm | None
        self.norm, self.fc_norm = (None, norm) if config.pool == "mean" else (norm, None)
        self.attention_pool = AttentionPool(dim, dtype) if config.pool == "attention" else None
        self.head_drop = Dropout(config.drop_rate, random)
        self.head = Linear(dim, config.num_classes, dtype=dtype)
        self.head_dist = Linear(dim, config.num_classes, dtype=dtype) if config.distillation == "head" else None
        self.initialise()

    def block(self, i: int, drop_path_rate: float) -> Block:
        """The i-th block."""
        return Block(self.config, drop_path_rate, self.random)

    def initialisers(self) -> dict[str, Initialiser]:
        config = self.config
        if config.init == "zeros":
            return {}
        if config.init == "jax":  # Google's code initialises q, k and v separately
            return {
                "pos_embed": normal(0.02),
                "patch_embed.proj.weight": lecun_normal,
                "*.qkv.weight": xavier_uniform(parts=3),
                "*.attn.proj.weight": xavier_uniform(),
                "*.mlp.*.weight": xavier_uniform(),
                "*.mlp.*.bias": normal(1e-6),
            }
        weight_init = truncated_normal(0.02)
        return {
            "cls_token": normal(1e-6),
            "dist_token": weight_init,
            "pos_embed": weight_init,
            "patch_embed.*": uniform(config.patch_values**-0.5),
            "*.attn.*.weight": weight_init,
            "*.mlp.*.weight": weight_init,
            "head*.weight": weight_init,
        }

    @property
    def tokens_read(self) -> int | None:
        return None if self.config.pool != "cls" else 2 if self.config.distillation == "head" else 1

    def forward(self, images: Any) -> Tensor:
        if self.head_dist is None:
            return super().forward(images)
        tokens = self.norm(self.encode(self.begin(images), all_tokens=False))
        answers = [head(self.head_drop(tokens[:, i]), precise=True) for i, head in enumerate((self.head, self.head_dist))]
        return (answers[0] + answers[1]) * 0.5

    def reset_head(self, num_classes: int) -> None:
        super().reset_head(num_classes)
        if self.head_dist is not None:
            self.head_dist = Linear(self.config.dim, num_classes, dtype=self.config.dtype)
            self.head_dist.train(self.training)
            self.initialise("head_dist.*")

    def embed(self, images: Tensor) -> Tensor:
        x = with_class_token(self.patch_embed(images), self.dist_token)
        return self.pos_drop(with_class_token(x, self.cls_token, self.pos_embed))  # (B, N, C)

    def pool(self, tokens: Tensor) -> Tensor:
        if self.config.pool == "cls":
            return super().pool(tokens)
        patches = tokens[:, 1:] if self.prefix else tokens
        if self.attention_pool is not None:
            return self.attention_pool(self.norm(patches))
        assert self.fc_norm is not None
        return self.fc_norm(patches.mean(1))

    @staticmethod
    def _patch_embed(config: ViTConfig) -> Stem:
        return stem_of(config)

    def resize(self, image_size: Sides) -> None:
        """Change the input size, pixels or (rows, columns): the position embedding is resized as in timm, bicubic with antialiasing.

        Call it before creating a Trainer, which refers to the current parameters. Raises UserError if patch_size does not divide the size.
        """
        config = replace(self.config, image_size=simplest(image_size))
        embed = self._patch_embed(config)
        for name, _, _, layer in self.patch_embed.child_slots():
            setattr(embed, name, layer)
        resized = positions.resize(self.pos_embed.numpy(), embed.grid, self.prefix, "bicubic_antialias", self.grid)
        self.pos_embed = Parameter(resized)
        self.config, self.patch_embed, self.grid = config, embed, embed.grid

    def rename_foreign(self, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Renames Hugging Face's names. Raises UserError for tokens that there are not here."""
        state = from_hugging_face(state)
        for name in ("register_tokens", "reg_token"):
            if name in state:
                raise UserError(f"the file is of a ViT with register tokens ({name}), which minivit's has not: take one without")
        return state

    def timm_arguments(self) -> tuple[str, dict[str, Any]]:
        config = self.config
        if type(self) is not ViT:
            return super().timm_arguments()
        if config.pool == "attention":
            raise UserError("timm has no mean of the tokens by learned scores: export it as .onnx")
        if config.distillation == "token":
            raise UserError("timm has no distillation token without a head of its own: export it as .onnx")
        hidden = int(config.dim * config.mlp_ratio)
        found: dict[str, Any] = {"model_name": "deit_base_distilled_patch16_224" if self.head_dist else "vit_base_patch16_224"}
        found |= timm_patches(config) | {"embed_dim": config.dim, "depth": config.depth, "num_heads": config.heads}
        found |= {"mlp_ratio": ratio_of(hidden, config.dim), "qkv_bias": config.qkv_bias, "eps": config.eps}
        found |= {} if config.layer_scale is None else {"init_values": config.layer_scale}
        found |= {} if config.class_token else {"class_token": False}
        found |= {"global_pool": "avg"} if config.pool == "mean" else {}
        found |= {"act_layer": config.activation} if config.activation != "gelu" else {}
        return "timm.create_model", found

    def google_names(self, names: Collection[str]) -> dict[str, str] | None:
        if self.norm is None:
            raise UserError("in Google's files the final normalisation comes before the mean over tokens, here after it: take pool='cls'")
        is_original = "Transformer/encoderblock_0/LayerNorm_2/scale" in names  # big_vision numbers each kind of layer from 0
        attention, norm2, mlp = (1, 2, 3) if is_original else (0, 1, 0)
        position = "pos_embedding" if "pos_embedding" in names else "Transformer/posembed_input/pos_embedding"
        table = ({"cls_token": "cls"} if self.config.class_token else {}) | {"pos_embed": position}
        for i in range(self.config.depth):
            ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
            table |= norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0") | norm(f"{ours}.norm2", f"{theirs}/LayerNorm_{norm2}")
            table |= dense(f"{ours}.attn.qkv", f"{theirs}/MultiHeadDotProductAttention_{attention}/{{query,key,value}}")
            table |= dense(f"{ours}.attn.proj", f"{theirs}/MultiHeadDotProductAttention_{attention}/out")
            for k in (0, 1):
                table |= dense(f"{ours}.mlp.fc{k + 1}", f"{theirs}/MlpBlock_{mlp}/Dense_{k}")
        return table | dense("patch_embed.proj", "embedding") | norm("norm", "Transformer/encoder_norm") | dense("head", "head")
