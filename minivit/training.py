"""`train`: from a model's name and data to a trained model in a run folder. The loop, its history, its progress."""
from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from . import __version__
from .checkpoint import CURVES, MODEL, RunFolder
from .data import Batches, Dataset, load_data
from .data.cifar import recognise
from .data.idx import holds_idx
from .errors import UserError, nearest
from .models import Model, create_model
from .models.base import FAMILIES, PRESETS
from .optim import SCHEDULES
from .plots import save_learning_curves
from .predict import Classifier, Preprocessing, check_available, evaluate
from .recipes import Recipe, recipe_for
from .trainer import Trainer, TrainingError

__all__ = ["Interrupted", "Run", "Trainer", "TrainingError", "train"]


class Interrupted(KeyboardInterrupt):
    """An interrupt that left a usable run folder; the message says where."""


@dataclass(frozen=True, eq=False)
class Run:
    """What `train` gives."""

    model: Classifier                                   # trained, in evaluation mode; has predict()
    history: list[dict[str, Any]]                       # an entry an epoch, as in metrics.jsonl
    folder: Path                                        # config.json, metrics.jsonl, model.safetensors, curves.png

    @property
    def test_accuracy(self) -> float:
        """In 0..1, after the last epoch."""
        return self.history[-1]["test_accuracy"]


def train(model: str | Model | None = None, data: Any = "digits", *, epochs: int | None = None, batch_size: int | None = None,
          lr: float | None = None, min_lr: float | None = None, warmup: float | None = None, schedule: str = "cosine",
          weight_decay: float | None = None, clip_norm: float | None = None, label_smoothing: float | None = None,
          augmentation: str | None = None, mixup: float | None = None, cutmix: float | None = None, drop_path: float | None = None,
          ema: float | None = None, optimizer: str = "adamw", momentum: float = 0.9, accumulate: int = 1, seed: int = 0,
          precision: str = "float32", device: str = "cpu", image_size: int | None = None, in_channels: int | None = None,
          test_fraction: float = 0.2, split_seed: int = 0, skip_bad_images: bool = False, limit: int | None = None,
          model_options: Mapping[str, Any] | None = None, out: str | os.PathLike[str] | None = None, overwrite: bool = False,
          progress: bool = True) -> Run:
    """Train a model on images, and write a run folder.

    What is None follows the recipe of the data (`minivit.recipes`); the model is made to fit the data's classes, channels and image size.

    model: name of a model, or a Model, which is trained further
    data: digits, cifar10, cifar100, a folder of images, an .npz file or archive, arrays or a Dataset (see `load_data`)
    epochs: passes over the training images
    batch_size: images of an optimizer step
    lr: highest learning rate
    min_lr: learning rate at the end of the cosine schedule
    warmup: epochs in which the learning rate rises
    schedule: what follows the warmup, cosine or constant
    weight_decay: decoupled weight decay, not of biases, scales and position embeddings
    clip_norm: largest norm of the whole gradient; 0 is off
    label_smoothing: share of the target that all classes divide
    augmentation: none, flip, crop-flip or affine, or a policy of one's own; by default what the data bears
    mixup: alpha of mixup; 0 is off
    cutmix: alpha of CutMix; 0 is off
    drop_path: stochastic depth of the last block
    ema: decay of a running average of the weights, which is then what is tested and kept; 0 is off
    optimizer: adamw or sgd
    momentum: of sgd
    accumulate: parts that a batch is computed in, for less memory
    seed: of weights, order, augmentation and dropout; the same seed gives the same run bit for bit on the same machine
    precision: float32 or float64
    device: cpu
    image_size: pixels that images are resized to
    in_channels: 1 for gray, 3 for RGB
    test_fraction: share of each class that is kept for testing, where the data has no split
    split_seed: of that split
    skip_bad_images: leave out images that cannot be read, and name them
    limit: use at most so many training and so many test images, spread evenly
    model_options: further options of the model, such as depth or pool
    out: the run folder; by default runs/<model>-<data>-<number>
    overwrite: replace the run that is in that folder
    progress: show a progress bar on a terminal, and a line an epoch elsewhere, on standard error

    Raises UserError, one line, for all that is wrong with these; TrainingError where the loss is not finite; Interrupted. In either of the
    last two the run folder holds the weights of the last finished epoch.
    """
    check_available(precision=precision, device=device)
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {schedule!r}{nearest(schedule, SCHEDULES)}: choose {', '.join(SCHEDULES)}")
    announce = _say if progress else _say_nothing
    dataset = _load(data, model, image_size, in_channels, limit, test_fraction=test_fraction, split_seed=split_seed,
                    skip_bad_images=skip_bad_images, progress=progress)
    recipe = recipe_for(dataset.name, len(dataset.train_images), model=model if isinstance(model, str) else None, epochs=epochs,
                        batch_size=batch_size, lr=lr, min_lr=min_lr, warmup=warmup, weight_decay=weight_decay, clip_norm=clip_norm,
                        label_smoothing=label_smoothing, mixup=mixup, cutmix=cutmix, drop_path=drop_path, ema=ema)
    batches = Batches(dataset.train_images, dataset.train_labels, batch_size=recipe.batch_size, num_classes=dataset.num_classes,
                      mean=dataset.mean, std=dataset.std, seed=seed, mixup=recipe.mixup, cutmix=recipe.cutmix,
                      augmentation=dataset.augmentation if augmentation is None else augmentation)
    options = dict(model_options or {})
    trained = _adapt(model, dataset, seed, options, drop_path, announce) if isinstance(model, Module) else create_model(
        recipe.model, num_classes=dataset.num_classes, image_size=dataset.image_size, in_channels=dataset.in_channels, seed=seed,
        **_drop_path(recipe), **_dtype(precision), **options)
    trainer = Trainer(trained, precision=precision, device=device, optimizer=optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay,
                      momentum=momentum, clip_norm=recipe.clip_norm, label_smoothing=recipe.label_smoothing, accumulate=accumulate,
                      ema=recipe.ema)
    if recipe.batch_size % accumulate:
        raise UserError(f"accumulate must divide batch_size: {recipe.batch_size} is not a multiple of {accumulate}")
    folder = RunFolder.create(out, f"{_slug(trained.name)}-{_slug(dataset.name)}", overwrite)
    folder.write_config(_config(trained, dataset, arguments))
