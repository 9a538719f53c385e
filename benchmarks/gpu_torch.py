"""PyTorch's training step on a GPU: float32 weights, bfloat16 products by autocast, its fused attention and AdamW; eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .torch_models import create_model, decayed, load

MODES = ("eager", "compiled", "compiled reduce-overhead", "compiled cuDNN attention")  # max-autotune compiles for minutes


def step(ours: Any, batch: int, mode: str, timed: Callable[[Callable[[], Any], Callable[[], None]], float]) -> dict[str, Any]:
    """Seconds and peak memory of a step of the model that `ours`, minivit's, is. timed(run, wait): the seconds of run()."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    config = ours.config
    model = create_model(ours.family, asdict(config))
    load(model, ours.state_dict())
    model = model.cuda().train()
    images = torch.randn(batch, *config.image_shape, device="cuda")
    labels = torch.randint(config.num_classes, (batch,), device="cuda")
    named = list(model.named_parameters())
    with_decay, others = ([p for n, p in named if decayed(n, p) is wanted] for wanted in (True, False))
    groups = [{"params": with_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05, fused=True)
    attention = partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION) if mode.endswith("cuDNN attention") else nullcontext
    compiled_mode = "reduce-overhead" if mode.endswith("reduce-overhead") else None
    forward = model if mode == "eager" else torch.compile(model, mode=compiled_mode, dynamic=False)

    def run() -> None:
        optimizer.zero_grad()
        with attention(), torch.autocast("cuda", torch.bfloat16):
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    for _ in range(3):  # compiles, and captures where the mode does
        run()
    seconds = timed(run, torch.cuda.synchronize)
    return {"seconds": seconds, "memory": torch.cuda.max_memory_allocated()}


def alone(op: str, batch: int, tokens: int, timed: Callable[[Callable[[], Any], Callable[[], None]], float]) -> dict[str, float]:
    """Seconds of forward, and of forward and backward, of "attention" (6 heads of 64) or "layernorm" (384 channels) in bfloat16."""
    if op == "attention":
        inputs = [torch.randn(batch, 6, tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        function: Callable[..., Any] = F.scaled_dot_product_attention
    else:
        inputs = [torch.randn(batch, tokens, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)]
        inputs += [torch.randn(384, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        function = torch.compile(lambda x, w, b: F.layer_norm(x, (384,), w, b), dynamic=False)
    arrived = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def both() -> None:
        torch.autograd.grad(function(*inputs), inputs, arrived)

    return {"forward": timed(forward, torch.cuda.synchronize), "both": timed(both, torch.cuda.synchronize)}
