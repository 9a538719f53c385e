"""The default hyperparameters of `minivit.train`: one recipe per dataset, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from ..errors import UserError, nearest, shown
from ..optim import OPTIMIZERS, SCHEDULES
from ..schema import Checked, Limits, Rate, Size

NotNegative = Annotated[float, Limits(least=0)]


@dataclass(frozen=True)
class Recipe(Checked):
    """Hyperparameters of a training run. Raises UserError for a value out of range."""

    model: str = "vit_tiny_patch4_32"
    epochs: Size = 20
    batch_size: Size = 64
    optimizer: str = "adamw"  # the name of an optimizer (`minivit.optim`)
    lr: NotNegative = 1e-3  # peak learning rate
    schedule: str = "cosine"  # the name of a schedule (`minivit.optim`)
    min_lr: NotNegative = 0.0  # learning rate after the last step of the schedule
    warmup: NotNegative = 1.0  # epochs in which the learning rate rises to `lr`
    weight_decay: NotNegative = 0.05  # decoupled; not for biases, scales, the class token and the position embedding
    clip_norm: NotNegative = 1.0  # maximum global norm of the gradient; 0: no clipping
    label_smoothing: Rate = 0.1
    mixup: NotNegative = 0.0  # alpha of mixup's Beta distribution; 0: off
    cutmix: NotNegative = 0.0  # alpha of CutMix's Beta distribution; 0: off
    drop_path: Rate = 0.0  # stochastic depth of the last block
    ema: Rate = 0.0  # decay of the running average of weights; 0: off

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in OPTIMIZERS:
            raise UserError(
                f"unknown optimizer {shown(self.optimizer)}{nearest(self.optimizer, OPTIMIZERS)}: choose {', '.join(OPTIMIZERS)}"
            )
        if self.schedule not in SCHEDULES:
            raise UserError(f"unknown schedule {shown(self.schedule)}{nearest(self.schedule, SCHEDULES)}: choose {', '.join(SCHEDULES)}")
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
