"""PyTorch as a contender: the models as a timm user has them, under timm's parameter names, run eagerly.

Letters: B batch, N tokens, C channels, H heads, D head size.
"""
from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .measure import PRODUCT, TINY_PRODUCT, product_rate
from .worker import Problem


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)        # (B, H, N, D) each
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
        return self.proj(images).flatten(2).transpose(1, 2)                     # (B, N, C)


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
        x = self.norm(self.blocks(x + self.pos_embed))                          # (B, N, C)
        pooled = x[:, self.cls_token is not None:].mean(1) if self.mean else x[:, 0]
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


FAMILIES = {"vit": ViT, "mixer": Mixer}
APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}
NO_DECAY = ("cls_token", "pos_embed")                   # besides parameters of one dimension


def create_model(family: str, config: dict[str, Any]) -> nn.Module:
    """config: the fields of minivit's Config. Raises ValueError for what is not built here: dropout, LayerScale."""
    unknown = [n for n, value in config.items() if value and (n == "layer_scale" or n.endswith("_rate"))]
    if unknown:
        raise ValueError(f"the PyTorch model has no {', '.join(unknown)}")
    return FAMILIES[family](config, APPROXIMATIONS[config["activation"]])


class Contender:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = create_model(problem.family, problem.config)
        self.model.load_state_dict({name: torch.from_numpy(array) for name, array in problem.weights.items()})
        self.images, self.labels = torch.from_numpy(problem.images), torch.from_numpy(problem.labels)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        named = list(self.model.named_parameters())
        decayed, others = ([p for n, p in named if (p.ndim > 1 and n not in NO_DECAY) is wanted] for wanted in (True, False))
        return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], **self.problem.adamw)

    def train(self) -> float:
        self.model.train()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.inference_mode()
    def infer(self) -> np.ndarray:
        self.model.eval()
        return self.model(self.images).numpy()

    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().numpy() for name, p in self.model.named_parameters()}

    def product_rates(self, tiny: bool) -> dict[str, float]:
        size = TINY_PRODUCT if tiny else PRODUCT
        a, b = torch.randn(2, size, size)
        c = torch.empty(size, size)
        return {"PyTorch": product_rate(lambda: torch.mm(a, b, out=c), size, tiny)}
