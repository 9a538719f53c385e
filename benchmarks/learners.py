"""Who learns in `learning.py`: minivit by its own choice, and its rivals in PyTorch, each trained until its time is over.

A rival's learning rate follows the time that has passed, so its schedule ends when the time does; the time of one test is kept back. The
rivals see the same batches as minivit would make with the policy of the data.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import chain, count
from math import cos, pi
from tempfile import TemporaryDirectory
from threading import Thread
from time import perf_counter
from typing import Any

import numpy as np

import minivit
from minivit.cli.options import assignment
from minivit.data import Batches, Dataset
from minivit.inference.evaluate import evaluate
from minivit.training.timing import INFERENCE

WARMUP = 0.05  # of the time
BATCH = 64
TEST_BATCH = 256


def learn(learner: str, dataset: Dataset, minutes: float, seed: int, options: list[str]) -> dict[str, Any]:
    """The accuracy that a learner reaches in some minutes, and what it did in them."""
    start = perf_counter()
    result = ours(dataset, minutes, seed, options) if learner == "minivit" else theirs(learner, dataset, minutes, seed)
    return {"learner": learner, "seed": seed, "minutes": minutes, "seconds": perf_counter() - start, **result}


def ours(dataset: Dataset, minutes: float, seed: int, options: list[str]) -> dict[str, Any]:
    given = dict(assignment(text, "--train") for text in options)
    with TemporaryDirectory() as folder:
        run = minivit.train(data=dataset, minutes=minutes, seed=seed, out=folder, overwrite=True, **given)
    last = run.history[-1]
    return {
        "test_accuracy": last["test_accuracy"],
        "balanced_accuracy": last["balanced_accuracy"],
        "epochs": last["epoch"],
        "model": run.model.unwrapped().name,
        "parameters": sum(p.size for p in run.model.parameters()),
        "history": run.history,
    }


# ----------------------------------------------------------------------------------------------------------------------- rivals
def small_cnn(size: int, channels: int, classes: int) -> Any:
    """Six convolutions with batch normalisation: 1.1 million parameters."""
    from torch import nn

    layers: list[Any] = []
    for inputs, outputs, pools in ((channels, 32, 1), (32, 64, 1), (64, 128, 0), (128, 128, 1), (128, 256, 0), (256, 256, 0)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pools
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes))


def plain_vit(size: int, channels: int, classes: int) -> Any:
    """The ViT of width 192 and depth 6 with 8 × 8 patches that timm makes, and its first weights."""
    from torch import nn

    from .torch_models import create_model

    tokens = {"class_token": True, "pool": "token", "patch_size": max(1, size // 8), "image_size": size, "in_channels": channels}
    blocks = {"dim": 192, "depth": 6, "heads": 3, "mlp_ratio": 4, "qkv_bias": True, "eps": 1e-6}
    model = create_model("vit", tokens | blocks | {"num_classes": classes})
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    nn.init.normal_(model.cls_token, std=1e-6)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return model


def compact_transformer(size: int, channels: int, classes: int) -> Any:
    """A compact convolutional transformer (2104.05704, section 3): convolutions and pooling make the tokens, attention pools them."""
    import torch
    from torch import nn

    dim, depth, heads = 128, 2, 2

    class Compact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stages, inputs, side = [], channels, size
            while side > 8 or not stages:
                last = side <= 16
                outputs = dim if last else 64
                stages += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
                inputs, side = outputs, (side + 1) // 2
            self.tokens = nn.Sequential(*stages)
            self.positions = nn.Parameter(0.02 * torch.randn(1, side * side, dim))
            layer = nn.TransformerEncoderLayer(dim, heads, dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
            self.norm, self.weigh, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1), nn.Linear(dim, classes)

        def forward(self, images: Any) -> Any:
            x = self.tokens(images).flatten(2).transpose(1, 2) + self.positions
            x = self.norm(self.encoder(x))
            return self.head((self.weigh(x).softmax(1) * x).sum(1))

    return Compact()


# By name: the model, whether it is trained by SGD with momentum rather than AdamW, and the highest learning rate.
RIVALS = {"cnn": (small_cnn, True, 0.05), "vit": (plain_vit, False, 1e-3), "cct": (compact_transformer, False, 1e-3)}


class Answers:
    """The logits of a model of PyTorch as `evaluate` asks for them."""

    stages = 1

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, images: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.model(torch.from_numpy(images)).numpy()[None]


def theirs(learner: str, dataset: Dataset, minutes: float, seed: int) -> dict[str, Any]:
    import torch
    from torch import nn

    from .torch_models import decayed

    start = perf_counter()
    torch.manual_seed(seed)
    make, by_sgd, peak = RIVALS[learner]
    _, size, _, channels = dataset.train_images.shape
    model = make(size, channels, dataset.num_classes).to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    if by_sgd:
        optimizer = torch.optim.SGD(parameters, lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        groups: list[list[Any]] = [[], []]
        for name, parameter in model.named_parameters():
            groups[decayed(name, parameter)].append(parameter)
        optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}], lr=peak, weight_decay=0.05)
    lossfn = nn.CrossEntropyLoss(label_smoothing=0.1)
    source = Batches(
        dataset.train_images,
        dataset.train_labels,
        batch_size=min(BATCH, len(dataset.train_images)),
        num_classes=dataset.num_classes,
        mean=dataset.mean,
        std=dataset.std,
        seed=seed,
        augmentation=dataset.augmentation,
    )
    end, history = 60 * minutes, []
    model.train()
    losses: list[float] = []
    first = 0.0  # seconds until the first step was done, which takes longer than others
    for steps, (images, labels) in enumerate(chain.from_iterable(source.epoch(epoch) for epoch in count())):
        passed = perf_counter() - start
        first = passed if steps == 1 else first
        a_step = (passed - first) / max(1, steps - 1)
        if steps and passed + a_step * (1 + INFERENCE * len(dataset.test_images) / source.batch_size) > end:
            break
        share = passed / end
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (share + 1e-3) / WARMUP) * (1 + cos(pi * share)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss = lossfn(model(torch.from_numpy(images)), torch.from_numpy(labels))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0 if not by_sgd else 5.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) == len(source):
            history.append({"epoch": len(history) + 1, "train_loss": float(np.mean(losses)), "seconds": perf_counter() - start})
            losses = []
    model.eval()
    result = evaluate(
        Answers(model), dataset.test_images, dataset.test_labels, dataset.mean, dataset.std, dataset.num_classes, batch_size=TEST_BATCH
    )
    return {
        "test_accuracy": result.accuracies[-1],
        "balanced_accuracy": result.balanced_accuracy,
        "epochs": steps / len(source),
        "model": make.__name__,
        "parameters": sum(p.numel() for p in parameters),
        "history": history,
    }


def _end_with_the_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def serve() -> None:
    """Learn as the first argument of the process says, in JSON, and print the result in JSON. Ends when its standard input does."""
    Thread(target=_end_with_the_input, daemon=True).start()
    given = json.loads(sys.argv[1])
    loaded = minivit.load_data(given["data"], image_size=given["image_size"], progress=False).limited(given["limit"])
    if given["tiny"] and given["learner"] == "minivit":  # whose seconds are too few to compile kernels
        with TemporaryDirectory() as folder:
            minivit.train(data=loaded, epochs=1, out=folder, overwrite=True, progress=False)
    print(json.dumps(learn(given["learner"], loaded, given["minutes"], given["seed"], given["train"])))
