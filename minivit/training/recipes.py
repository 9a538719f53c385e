"""The default hyperparameters of `minivit.train`: one recipe per dataset, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training run. Raises UserError for a value out of range."""

    model: str = "vit_tiny_patch4_32"
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate after the last step of the cosine schedule
    warmup: float = 1.0  # epochs in which the learning rate rises to `lr`
    weight_decay: float = 0.05  # decoupled; not for biases, scales, the class token and the position embedding
    clip_norm: float = 1.0  # maximum global norm of the gradient; 0: no clipping
    label_smoothing: float = 0.1
    mixup: float = 0.0  # alpha of mixup's Beta distribution; 0: off
    cutmix: float = 0.0  # alpha of CutMix's Beta distribution; 0: off
    drop_path: float = 0.0  # stochastic depth of the last block
    ema: float = 0.0  # decay of the running average of weights; 0: off

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("lr", "min_lr", "warmup", "weight_decay", "clip_norm", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < inf:
                raise UserError(f"{name} must be a number of at least 0, got {getattr(self, name)!r}")
        for name in ("label_smoothing", "drop_path", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be a number of at least 0 and below 1, got {getattr(self, name)!r}")
        if self.lr == 0 or self.min_lr > self.lr:
            raise UserError(f"lr must be above 0 and not below min_lr, got lr={self.lr:g} and min_lr={self.min_lr:g}")
        if self.warmup >= self.epochs:
            raise UserError(f"warmup must end before the last epoch does: {self.warmup:g} of {self.epochs} epochs leave none")


# By `Dataset.name`. The default augmentation is an attribute of the dataset (`Dataset.augmentation`).
RECIPES = {
    "digits": Recipe(model="vit_nano_patch2_8", epochs=100, batch_size=32, lr=3e-3, warmup=10.0, mixup=0.2, ema=0.998),
}
OTHERS = Recipe()


def recipe_for(dataset: str, images: int, **overrides: Any) -> Recipe:
    """The recipe for a dataset with this number of training images, with values overridden by `overrides` (unless None).

    Unless overridden, the batch size is at most the number of images, and the warmup at most a fifth of the epochs.
    """
    recipe = RECIPES.get(dataset, OTHERS)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    defaults = {"batch_size": min(recipe.batch_size, images), "warmup": min(recipe.warmup, overrides.get("epochs", recipe.epochs) / 5)}
    return replace(recipe, **defaults | overrides)
