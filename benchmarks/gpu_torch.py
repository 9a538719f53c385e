"""PyTorch's training step on a GPU: float32 weights, bfloat16 products by autocast, its fused attention and AdamW; eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.nn import functional as F

from .torch_models import create_model, decayed, load

MODES = ("eager", "compiled", "compiled reduce-overhead", "compiled max-autotune")


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
    words = mode.split()
    forward = model if words == ["eager"] else torch.compile(model, mode=words[1] if len(words) > 1 else None, dynamic=False)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    for _ in range(3):  # compiles, and captures where the mode does
        run()
    seconds = timed(run, torch.cuda.synchronize)
    return {"seconds": seconds, "memory": torch.cuda.max_memory_allocated()}
