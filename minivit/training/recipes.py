"""The default hyperparameters of `minivit.train`: one recipe per dataset, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from sys import maxsize
from typing import Annotated, Any

from ..errors import UserError, nearest, shown
from ..optim import OPTIMIZERS, SCHEDULES
from ..schema import Checked, Limits, Rate, Size
from ..sides import Sides, both

ADAMW_LR = 1e-3  # the peak learning rate of another optimizer than the recipe's
NotNegative = Annotated[float, Limits(least=0)]


@dataclass(frozen=True)
class Recipe(Checked):
    """Hyperparameters of a training run. Raises UserError for a value out of range."""

    model: str = "localvit_micro_patch4_32"
    epochs: Size = 20
    batch_size: Size = 64
    optimizer: str = "muon"  # the name of an optimizer (`minivit.optim`)
    lr: NotNegative = 6e-3  # peak learning rate
    schedule: str = "linear"  # the name of a schedule (`minivit.optim`)
    min_lr: NotNegative = 0.0  # learning rate after the last step of the schedule
    warmup: NotNegative = 1.0  # epochs in which the learning rate rises to `lr`
    weight_decay: NotNegative = 0.05  # decoupled; not for biases, scales, the class token and the position embedding
    clip_norm: NotNegative = 1.0  # maximum global norm of the gradient; 0: no clipping
    label_smoothing: Rate = 0.1
    mixup: NotNegative = 0.0  # alpha of mixup's Beta distribution; 0: off
    cutmix: NotNegative = 0.0  # alpha of CutMix's Beta distribution; 0: off
    repeats: Size = 1  # how many times an image that is chosen stands in a batch, changed anew each time
    progressive_resizing: Rate = 0.0  # share of the epochs, at the beginning, in which images are smaller (SIDES); 0: off
    layer_decay: Annotated[float, Limits(above=0, most=1)] = 1.0  # factor of the learning rate from a block to the block before it
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
    "digits": Recipe(epochs=40, batch_size=32, warmup=4.0),
}
OTHERS = Recipe()

# What learns most in minutes on a CPU: the longest side of an image up to which it suits, and how the presets of that size end.
MODELS = ((15, "patch2_8"), (47, "patch4_32"), (79, "patch8_64"), (111, "patch8_96"), (maxsize, "patch16_128"))
WIDTHS = "micro", "mini", "midi"  # of each: from the smallest to the largest
ENOUGH = 150  # epochs: if a given time has more for a model, the next larger one is trained
MIXED = {"mixup": 0.2, "cutmix": 1.0}  # of trainings of so many epochs that the images would be known by heart
MIXED_FROM = 30  # epochs
SIDES = 0.5, 0.75  # one after the other, of the side that images have afterwards
RESIZED = 0.65  # progressive_resizing of the default models, for square images of at least RESIZED_FROM pixels a side
RESIZED_FROM = 32
SEEN, FEWEST, MOST = 600_000, 10, 100  # images that the default number of epochs shows in all; the least and the most epochs


def models_for(image_size: Sides) -> list[str]:
    """The models that are trained by default on images of a size, from the smallest to the largest."""
    end = next(end for most, end in MODELS if max(both(image_size)) <= most)
    return [f"localvit_{width}_{end}" for width in WIDTHS]


def recipe_for(dataset: str, images: int, image_size: Sides, **overrides: Any) -> Recipe:
    """The recipe for a dataset with this number and size of training images, with values overridden by `overrides` (unless None).

    Unless overridden, the model is the smallest of `models_for`, the batch size at most the number of images, and the warmup at most a
    fifth of the epochs, of which there are the fewer the more images there are. Data without a recipe of its own is mixed in a long
    training, and small at first if the model is one of these.
    """
    recipe = RECIPES.get(dataset, OTHERS)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    epochs = overrides.get("epochs", recipe.epochs if dataset in RECIPES else min(MOST, max(FEWEST, SEEN // images)))
    defaults: dict[str, Any] = {"model": models_for(image_size)[0], "batch_size": min(recipe.batch_size, images), "epochs": epochs}
    defaults["warmup"] = min(recipe.warmup, epochs / 5)
    if dataset not in RECIPES and epochs >= MIXED_FROM:
        defaults |= MIXED
    rows, columns = both(image_size)
    if dataset not in RECIPES and overrides.get("model") in (None, *models_for(image_size)) and rows == columns >= RESIZED_FROM:
        defaults["progressive_resizing"] = RESIZED
    if overrides.get("optimizer", recipe.optimizer) != recipe.optimizer:
        defaults["lr"] = ADAMW_LR
    return replace(recipe, **defaults | overrides)
