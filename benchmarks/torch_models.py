"""The models in PyTorch: ViT and Mixer as a timm user has them, the others transcribed from their papers, under the names of `state_dict`.

Letters: B batch, N tokens, C channels, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, approximate: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, N, C)


class ViTBlock(nn.Module):
    def __init__(self, config: dict[str, Any], approximate: str) -> None:
        super().__init__()
        dim, eps = config["dim"], config["eps"]
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, config["heads"], config["qkv_bias"])
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * config["mlp_ratio"]), approximate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, config: dict[str, Any], approximate: str) -> None:
        super().__init__()
        dim, self.mean = config["dim"], config["pool"] == "mean"
        tokens = (config["image_size"] // config["patch_size"]) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config["class_token"] else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config["class_token"] + tokens, dim))
        self.patch_embed = PatchEmbed(config["in_channels"], dim, config["patch_size"])
        self.blocks = nn.Sequential(*(ViTBlock(config, approximate) for _ in range(config["depth"])))
        self.norm = nn.Identity() if self.mean else nn.LayerNorm(dim, config["eps"])
        self.fc_norm = nn.LayerNorm(dim, config["eps"]) if self.mean else nn.Identity()
        self.head = nn.Linear(dim, config["num_classes"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        x = self.norm(self.blocks(x + self.pos_embed))  # (B, N, C)
        pooled = x[:, self.cls_token is not None :].mean(1) if self.mean else x[:, 0]
        return self.head(self.fc_norm(pooled))


class MixerBlock(nn.Module):
    def __init__(self, config: dict[str, Any], approximate: str, tokens: int) -> None:
        super().__init__()
        dim, eps = config["dim"], config["eps"]
        self.norm1 = nn.LayerNorm(dim, eps)
        self.mlp_tokens = Mlp(tokens, config["token_hidden"], approximate)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp_channels = Mlp(dim, config["channel_hidden"], approximate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, config: dict[str, Any], approximate: str) -> None:
        super().__init__()
        dim, tokens = config["dim"], (config["image_size"] // config["patch_size"]) ** 2
        self.stem = PatchEmbed(config["in_channels"], dim, config["patch_size"])
        self.blocks = nn.Sequential(*(MixerBlock(config, approximate, tokens) for _ in range(config["depth"])))
        self.norm = nn.LayerNorm(dim, config["eps"])
        self.head = nn.Linear(dim, config["num_classes"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.stem(images))).mean(1))


class Product(nn.Module):
    def __init__(self, config: dict[str, Any], approximate: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(config["in_channels"], config["in_channels"], bias=False) for _ in range(config["depth"])))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.flatten(1))


class LinearGelu(nn.Sequential):
    """norm, GELU, linear, with the numbers 0, 1, 2."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__(nn.LayerNorm(inputs, eps), nn.GELU(), nn.Linear(inputs, outputs))


# --------------------------------------------------------------------------------------------------------------------- CrossViT
class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        B, _, C = z.shape
        q, k, v = (
            w(x).reshape(B, -1, self.heads, C // self.heads).transpose(1, 2) for w, x in ((self.wq, z[:, :1]), (self.wk, z), (self.wv, z))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, 1, C))


class Fusion(nn.Module):
    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = CrossAttention(dim, heads)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z[:, :1] + self.attn(self.norm1(z))


class CrossViTStage(nn.Module):
    def __init__(self, config: dict[str, Any], approximate: str) -> None:
        super().__init__()
        dims, heads, eps = config["dims"], config["heads"], config["eps"]
        fields = [dict(dim=dims[b], heads=heads[b], eps=eps, qkv_bias=True, mlp_ratio=config["mlp_ratios"][b]) for b in (0, 1)]
        self.blocks = nn.ModuleList(nn.Sequential(*(ViTBlock(fields[b], approximate) for _ in range(config["depths"][b]))) for b in (0, 1))
        self.projs = nn.ModuleList(LinearGelu(dims[b], dims[1 - b], eps) for b in (0, 1))
        self.fusion = nn.ModuleList(Fusion(dims[1 - b], heads[1 - b], eps) for b in (0, 1))
        self.revert_projs = nn.ModuleList(LinearGelu(dims[1 - b], dims[b], eps) for b in (0, 1))

    def forward(self, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        tokens = [blocks(x) for blocks, x in zip(self.blocks, tokens)]
        classes = [proj(x[:, :1]) for proj, x in zip(self.projs, tokens)]
        fused = [self.fusion[b](torch.cat((classes[b], tokens[1 - b][:, 1:]), 1)) for b in (0, 1)]
        return [torch.cat((self.revert_projs[b](fused[b]), tokens[b][:, 1:]), 1) for b in (0, 1)]


class CrossViT(nn.Module):
    def __init__(self, config: dict[str, Any], approximate: str) -> None:
        super().__init__()
        dims, self.sizes = config["dims"], config["branch_sizes"]
        for b in (0, 1):
            tokens = 1 + (self.sizes[b] // config["patch_sizes"][b]) ** 2
            self.register_parameter(f"pos_embed_{b}", nn.Parameter(torch.zeros(1, tokens, dims[b])))
            self.register_parameter(f"cls_token_{b}", nn.Parameter(torch.zeros(1, 1, dims[b])))
        self.patch_embed = nn.ModuleList(PatchEmbed(config["in_channels"], dims[b], config["patch_sizes"][b]) for b in (0, 1))
        self.blocks = nn.ModuleList(CrossViTStage(config, approximate) for _ in range(config["stages"]))
        self.norm = nn.ModuleList(nn.LayerNorm(dim, config["eps"]) for dim in dims)
        self.head = nn.ModuleList(nn.Linear(dim, config["num_classes"]) for dim in dims)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = []
        for b, size in enumerate(self.sizes):
            x = images if images.shape[-1] == size else F.interpolate(images, (size, size), mode="bicubic", align_corners=False)
            cls_token = getattr(self, f"cls_token_{b}").expand(len(x), -1, -1)
            tokens.append(torch.cat((cls_token, self.patch_embed[b](x)), 1) + getattr(self, f"pos_embed_{b}"))
        for stage in self.blocks:
            tokens = stage(tokens)
        return sum(head(norm(x)[:, 0]) for head, norm, x in zip(self.head, self.norm, tokens)) / 2


# ---------------------------------------------------------------------------------------------------------------------- DeepViT
class ReAttention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        dim, self.heads = config["dim"], config["heads"]
        self.scale, self.reattention_scale = (dim // self.heads) ** -0.5, config["reattention_scale"]
        self.reatten_matrix = nn.Conv2d(self.heads, self.heads, 1)
        self.var_norm = nn.BatchNorm2d(self.heads)
        self.qkv = nn.Linear(dim, 3 * dim, config["qkv_bias"])
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        attention = self.var_norm(self.reatten_matrix(attention)) * self.reattention_scale
        return self.proj((attention @ v).transpose(1, 2).reshape(B, N, C))


class DeepViT(ViT):
    """With a patch projection as its stem, and residual_scale 1."""

    def __init__(self, config: dict[str, Any], approximate: str) -> None:
        super().__init__(config, approximate)
        for i, block in enumerate(self.blocks):
            if config["reattention_blocks"] is None or i in config["reattention_blocks"]:
                block.attn = ReAttention(config)


# ---------------------------------------------------------------------------------------------------------------------- T2T-ViT
class Performer(nn.Module):
    def __init__(self, inputs: int, dim: int, features: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("w", torch.zeros(features, dim))
        self.kqv = nn.Linear(inputs, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(inputs, eps), nn.LayerNorm(dim, eps)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x @ self.w.T - (x * x).sum(-1, keepdim=True) / 2) / len(self.w) ** 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, q, v = self.kqv(self.norm1(x)).split(self.dim, -1)
        k, q = self.features(k), self.features(q)  # (B, T, m)
        y = q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1).unsqueeze(-1) + 1e-8)
        y = v + self.proj(y)
        return y + self.mlp(self.norm2(y))


class TokensToToken(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.unfolds, dim = [tuple(unfold) for unfold in config["unfolds"]], config["token_dim"]
        features, sizes = config["kernel_features"] or dim // 2, [size * size for size, _, _ in self.unfolds]
        self.attention1 = Performer(sizes[0] * config["in_channels"], dim, features, config["eps"])
        self.attention2 = Performer(sizes[1] * dim, dim, features, config["eps"])
        self.project = nn.Linear(sizes[2] * dim, config["dim"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for (size, stride, padding), layer in zip(self.unfolds, (self.attention1, self.attention2, self.project)):
            grid = (x.shape[-1] + 2 * padding - size) // stride + 1
            x = layer(F.unfold(x, size, padding=padding, stride=stride).transpose(1, 2))
            if layer is not self.project:
                x = x.transpose(1, 2).reshape(len(x), -1, grid, grid)
        return x


class T2T(nn.Module):
    def __init__(self, config: dict[str, Any], approximate: str) -> None:
        super().__init__()
        side = config["image_size"]
        for size, stride, padding in config["unfolds"]:
            side = (side + 2 * padding - size) // stride + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config["dim"]))
        self.register_buffer("pos_embed", torch.zeros(1, 1 + side * side, config["dim"]))
        self.tokens_to_token = TokensToToken(config)
        self.blocks = nn.Sequential(*(ViTBlock(config, approximate) for _ in range(config["depth"])))
        self.norm = nn.LayerNorm(config["dim"], config["eps"])
        self.head = nn.Linear(config["dim"], config["num_classes"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.tokens_to_token(images)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


# --------------------------------------------------------------------------------------------------------------------- LocalViT
class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction), nn.ReLU(), nn.Linear(channels // reduction, channels), nn.Hardsigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class LocalFeedForward(nn.Module):
    """With squeeze-excitation, or without channel attention."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        dim, hidden = config["dim"], int(config["dim"] * config["mlp_ratio"])
        activation = {"hswish": nn.Hardswish, "relu6": nn.ReLU6}[config["activation"]]
        attention = [SqueezeExcitation(hidden, config["se_reduction"])] if config["channel_attention"] == "se" else []
        self.conv = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            activation(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            activation(),
            *attention,
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class LocalBlock(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config["dim"], config["eps"])
        self.attn = Attention(config["dim"], config["heads"], config["qkv_bias"])
        self.conv = LocalFeedForward(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        cls_token, patches = x[:, :1], x[:, 1:]
        B, N, C = patches.shape
        side = int(N**0.5)
        patches = self.conv(patches.transpose(1, 2).reshape(B, C, side, side)).flatten(2).transpose(1, 2)
        return torch.cat((cls_token, patches), 1)


class LocalViT(ViT):
    def __init__(self, config: dict[str, Any], approximate: str) -> None:
        super().__init__(config | {"pool": "cls", "class_token": True}, approximate)
        self.blocks = nn.Sequential(*(LocalBlock(config) for _ in range(config["depth"])))


FAMILIES = {"vit": ViT, "mixer": Mixer, "crossvit": CrossViT, "deepvit": DeepViT, "t2t": T2T, "localvit": LocalViT, "product": Product}
APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}
NO_DECAY = ("cls_token", "pos_embed")  # beginnings of names, besides parameters of one dimension
UNUSED = "num_batches_tracked"  # of batch normalisation


def create_model(family: str, config: dict[str, Any]) -> nn.Module:
    """config: the fields of minivit's Config. Raises ValueError for what is not built here: dropout, LayerScale."""
    unknown = [n for n, value in config.items() if value and (n == "layer_scale" or n.endswith("_rate"))]
    if unknown:
        raise ValueError(f"the PyTorch model has no {', '.join(unknown)}")
    return FAMILIES[family](config, APPROXIMATIONS.get(config.get("activation", "gelu"), "none"))


def load(model: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Give the model these weights, by their names in minivit."""
    counters = {name: buffer for name, buffer in model.named_buffers() if name.endswith(UNUSED)}
    model.load_state_dict(counters | {name: torch.from_numpy(array) for name, array in weights.items()})


def decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies to a parameter."""
    return parameter.ndim > 1 and not name.startswith(NO_DECAY)
