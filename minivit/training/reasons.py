"""Why a training is as it is: a line for each thing that `train` may choose itself, which config.json keeps."""

from __future__ import annotations

from dataclasses import fields

from ..data import Dataset
from ..nn.module import Module
from ..runtime.precision import fastest
from ..sides import times
from .class_weights import imbalance
from .finetuning import Origin
from .options import TrainOptions
from .recipes import ENOUGH, FEWEST, MOST, RECIPES, SEEN, Recipe, models_for

GIVEN = "given"


def reasons(options: TrainOptions, dataset: Dataset, recipe: Recipe, origin: Origin | None, precision: str) -> dict[str, str]:
    """Why the model, the epochs, the recipe, the augmentation, the precision and the weights of classes are what they are.

    dataset: the images that are trained on. precision: its name, of the training.
    """
    own = dataset.name in RECIPES
    given = [item.name for item in fields(Recipe) if item.name not in ("model", "epochs") and getattr(options, item.name) is not None]
    but = f", but for what was given: {', '.join(given)}" if given else ""
    suits = f"the smallest for images of {times(dataset.train_images.shape[1:3])} pixels"
    if options.model is not None:
        model = "given as a model" if isinstance(options.model, Module) else GIVEN
    elif origin:
        model = f"that of the weights it began with, {origin.file.name}"
    elif recipe.model != models_for(dataset.image_size)[0]:
        model = f"{suits} would have had time for more than {ENOUGH} epochs"
    else:
        model = suits
    if options.epochs is not None:
        epochs = GIVEN
    elif options.minutes is not None:
        epochs = f"as many as fit into {options.minutes:g} minutes"
    elif own:
        epochs = f"the recipe of {dataset.name}"
    else:
        epochs = f"about {SEEN:,} images in all, from {FEWEST} to {MOST} epochs"
    chosen, why = fastest(options.device)
    auto = f"the fastest that trains as well as float32: {why}" if precision == chosen else "that of the model"
    equal = "no class has more than three times the training images of another"
    return {
        "model": model,
        "epochs": epochs,
        "recipe": f"{f'that of {dataset.name}' if own else 'the one for all data without its own'}{but}",
        "augmentation": "the policy of this kind of data" if options.augmentation is None else GIVEN,
        "precision": auto if options.precision == "auto" else GIVEN,
        "class_weights": GIVEN if options.class_weights is not None else imbalance(dataset.train_labels, dataset.class_names) or equal,
    }
