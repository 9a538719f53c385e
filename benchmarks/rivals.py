"""PyTorch as a contender: the models as a timm user has them, under timm's parameter names, in the modes of `sides.py`.

Letters: B batch, N tokens, C channels, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .sides import Side
from .worker import Problem

OPSET = 20  # of ONNX: the first with GELU


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


FAMILIES = {"vit": ViT, "mixer": Mixer, "product": Product}
APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}
NO_DECAY = ("cls_token", "pos_embed")  # besides parameters of one dimension


def create_model(family: str, config: dict[str, Any]) -> nn.Module:
    """config: the fields of minivit's Config. Raises ValueError for what is not built here: dropout, LayerScale."""
    unknown = [n for n, value in config.items() if value and (n == "layer_scale" or n.endswith("_rate"))]
    if unknown:
        raise ValueError(f"the PyTorch model has no {', '.join(unknown)}")
    return FAMILIES[family](config, APPROXIMATIONS[config["activation"]])


class Contender:
    def __init__(self, problem: Problem, side: Side) -> None:
        self.problem, self.compiled = problem, "compiled" in side.words
        self.dtype = torch.bfloat16 if "pure" in side.words else torch.float32
        self.products = nullcontext if "autocast" not in side.words else partial(torch.autocast, "cpu", torch.bfloat16)
        torch.set_float32_matmul_precision("medium" if "medium" in side.words else "highest")
        model = create_model(problem.family, problem.config)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in problem.weights.items()})
        self.model = model.to(self.dtype)
        self.images, self.labels = torch.from_numpy(problem.images), torch.from_numpy(problem.labels)

    @cached_property
    def run(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The model, compiled where the mode says so; for inference with its weights as constants."""
        if not self.compiled:
            return self.model
        torch._inductor.config.freezing = not self.model.training
        return torch.compile(self.model, dynamic=False)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        named = list(self.model.named_parameters())
        decayed, others = ([p for n, p in named if (p.ndim > 1 and n not in NO_DECAY) is wanted] for wanted in (True, False))
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, **self.problem.adamw, fused=True)  # a fourth of the time of the others

    def train(self) -> float:
        self.model.train()
        self.optimizer.zero_grad()
        with self.products():
            logits = self.run(self.images.to(self.dtype))
        loss = F.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def infer(self) -> np.ndarray:
        self.model.eval()
        with torch.no_grad() if self.compiled else torch.inference_mode(), self.products():  # freezing knows no inference mode
            return self.run(self.images.to(self.dtype)).float().numpy()

    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().float().numpy() for name, p in self.model.named_parameters()}

    def export(self, path: str) -> None:
        """Write the model for this batch as ONNX."""
        self.model.eval()
        torch.onnx.export(self.model, (self.images,), path, dynamo=False, opset_version=OPSET)
