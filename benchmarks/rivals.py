"""PyTorch as a contender, in the modes of `sides.py`; `torch_models.py` has its models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial

import numpy as np
import torch
from torch.nn import functional as F

from .sides import Side
from .torch_models import UNUSED, create_model, decayed, load
from .worker import Problem

OPSET = 20  # of ONNX: the first with GELU


class Contender:
    def __init__(self, problem: Problem, side: Side) -> None:
        self.problem, self.compiled = problem, "compiled" in side.words
        self.dtype = torch.bfloat16 if "pure" in side.words else torch.float32
        self.products = nullcontext if "autocast" not in side.words else partial(torch.autocast, "cpu", torch.bfloat16)
        torch.set_float32_matmul_precision("medium" if "medium" in side.words else "highest")
        model = create_model(problem.family, problem.config)
        load(model, problem.weights)
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
        with_decay, others = ([p for n, p in named if decayed(n, p) is wanted] for wanted in (True, False))
        groups = [{"params": with_decay}, {"params": others, "weight_decay": 0.0}]
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
        return {name: p.detach().float().numpy() for name, p in self.model.state_dict().items() if not name.endswith(UNUSED)}

    def export(self, path: str) -> None:
        """Write the model for this batch as ONNX."""
        self.model.eval()
        torch.onnx.export(self.model, (self.images,), path, dynamo=False, opset_version=OPSET)
