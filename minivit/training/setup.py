"""What is trained: model, trainers and batches of each size of images, with as many epochs as fit into the minutes that were given."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ..data import Batches, Dataset
from ..errors import UserError
from ..models import Model, create_model
from ..nn.module import Module
from ..optim import OPTIMIZERS
from ..progress import say
from ..sides import both, times
from .class_weights import class_weights
from .loop import Phase, duration
from .options import TrainOptions
from .recipes import ENOUGH, SIDES, Recipe, models_for, recipe_for
from .timing import Fitting, fitting, step_seconds, test_seconds
from .trainer import Trainer


class Setup(NamedTuple):
    """What is trained, and how."""

    recipe: Recipe
    datasets: list[Dataset]  # of each phase
    phases: list[Phase]  # the last one is that of the model
    settings: dict[str, Any]  # the arguments of the trainers


def set_up(options: TrainOptions, dataset: Dataset, threads: int, before: Setup | None = None, **chosen: Any) -> Setup:
    """before: an earlier setup for this dataset. chosen: values of the recipe in addition to those that the user gives."""
    recipe = recipe_for(dataset.name, len(dataset.train_images), dataset.image_size, **options.of_recipe() | chosen)
    model = _adapt(options, dataset, recipe) if isinstance(options.model, Module) else _create(options, dataset, recipe)
    weights = class_weights(options.class_weights, dataset.train_labels, dataset.class_names)
    settings = _trainer_settings(options, recipe, threads, weights)
    datasets, phases, start = before.datasets if before else [*_smaller(options, dataset, recipe, model), dataset], list[Phase](), 0
    for number, images in enumerate(datasets, 1):
        is_last = images is dataset
        end = recipe.epochs if is_last else round(recipe.progressive_resizing * recipe.epochs * number / len(SIDES))
        if start < end < recipe.epochs or is_last:
            of_size = model if is_last else _create_smaller(options, images, recipe, model)
            phases.append(Phase(of_size, Trainer(of_size, **settings), _batches(options, images, recipe), end))
            start = end
    return Setup(recipe, datasets, phases, settings)


def _smaller(options: TrainOptions, dataset: Dataset, recipe: Recipe, model: Model) -> list[Dataset]:
    """The dataset at the sizes of the first epochs, if these are others than the model's. Raises UserError if they cannot be."""
    if not recipe.progressive_resizing:
        return []
    rows, columns = both(dataset.image_size)
    if isinstance(options.model, Module) or rows != columns:
        raise UserError("progressive_resizing is for a model given by name, and square images: leave it out")
    patch = max(both(getattr(model.config, "patch_size", 1)))
    sizes = [max(1, round(side * rows / patch)) * patch for side in SIDES]
    trained = dataset.whole()  # nobody looks at small test images
    return [replace(trained.resized(size), mean=dataset.mean, std=dataset.std) for size in sizes]


def _create_smaller(options: TrainOptions, dataset: Dataset, recipe: Recipe, model: Model) -> Model:
    """The same model for smaller images. Raises UserError if the `model` cannot take its weights."""
    smaller = _create(options, dataset, recipe)
    try:
        model.take_weights(smaller)  # which will be others when they count
    except UserError as error:
        raise UserError(f"progressive_resizing is not for {model.name}, whose weights depend on the size of the images") from error
    return smaller


def fit_minutes(options: TrainOptions, start: float, setup: Setup, once: int) -> tuple[Setup, Fitting]:
    """The setup with as many epochs as fit into the minutes, or that of a larger model, if none was given and there is time for it.

    start: when `train` was called. once: the number of images that are tested once, at the end.
    """
    dataset, threads = setup.datasets[-1], setup.phases[-1].trainer.threads
    fits = _fit(options, start, setup, once)
    for larger in models_for(dataset.image_size)[1:]:
        if options.model is None and fits.epochs > ENOUGH:
            setup = set_up(options, dataset, threads, setup, model=larger)
            fits = _fit(options, start, setup, once)
    return set_up(options, dataset, threads, setup, model=setup.recipe.model, epochs=fits.epochs), fits


def _fit(options: TrainOptions, start: float, setup: Setup, once: int) -> Fitting:
    """What fits into the minutes that are left, which a line says."""
    assert options.minutes is not None
    end, phases = start + 60 * options.minutes, setup.phases
    steps = [step_seconds(phase.trainer, phase.batches, (end - perf_counter()) / len(phases)) for phase in phases]
    shares = np.diff([0, *(phase.end for phase in phases)]) / phases[-1].end  # of the epochs
    a_step, a_test = float(shares @ steps), test_seconds(steps[-1], phases[-1].batches)
    left = end - perf_counter() - once * a_test
    batches = phases[-1].batches
    fits = fitting(left, a_step * len(batches), a_test * len(setup.datasets[-1].test_images))
    speed = f"{phases[-1].model.name}: {batches.batch_size / a_step:.0f} images/s here"
    say(f"{speed}, so {fits.epochs} epochs in {duration(left)}, a test every {fits.test_every}", options.progress)
    return fits


def _trainer_settings(options: TrainOptions, recipe: Recipe, threads: int, weights: tuple[float, ...] | None) -> dict[str, Any]:
    defaults = OPTIMIZERS[recipe.optimizer].options()
    given = {name: getattr(options, name) for name in defaults if hasattr(options, name)}
    optimizer_options = {name: defaults[name] if value is None else value for name, value in given.items()}
    return dict(
        precision=options.precision,
        device=options.device,
        optimizer=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
        label_smoothing=recipe.label_smoothing,
        class_weights=weights,
        accumulate=options.accumulate,
        ema=recipe.ema,
        layer_decay=recipe.layer_decay,
        threads=threads,
        **optimizer_options,
    )


def _batches(options: TrainOptions, dataset: Dataset, recipe: Recipe) -> Batches:
    return Batches(
        dataset.train_images,
        dataset.train_labels,
        batch_size=recipe.batch_size,
        num_classes=dataset.num_classes,
        mean=dataset.mean,
        std=dataset.std,
        seed=options.seed,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        repeats=recipe.repeats,
        augmentation=dataset.augmentation if options.augmentation is None else options.augmentation,
        device=options.device,
    )


def _create(options: TrainOptions, dataset: Dataset, recipe: Recipe) -> Model:
    model_options = dict(options.model_options or {})
    implied: dict[str, Any] = {"dtype": "float64"} if options.precision == "float64" else {}
    if recipe.drop_path:
        implied["drop_path_rate"] = recipe.drop_path
    data_options: dict[str, Any] = {
        "num_classes": dataset.num_classes,
        "image_size": dataset.image_size,
        "in_channels": dataset.in_channels,
        "seed": options.seed,
    }
    clash = next((name for name in model_options if name in data_options), None)
    if clash:
        raise UserError(f"{clash} is not for model_options: the data, or image_size, in_channels and seed themselves, decide it")
    return create_model(recipe.model, **data_options, **implied | model_options)


def unwrapped(module: Module) -> Model:
    """The Model inside a Classifier, or itself. Raises UserError for another Module."""
    model = module.unwrapped()
    if not isinstance(model, Model):
        raise UserError(f"train() takes a model of create_model, not {type(model).__name__}: train other modules with a Trainer")
    return model


def _adapt(options: TrainOptions, dataset: Dataset, recipe: Recipe) -> Model:
    """Adapt a Model instance to the data, with a new head if the number of classes differs. Raises UserError if it does not fit."""
    assert isinstance(options.model, Module)
    model = unwrapped(options.model)
    if options.model_options or recipe.drop_path:
        raise UserError("model_options and drop_path are for a model given by name: give them to create_model (drop_path_rate)")
    size, channels = model.config.image_size, model.config.in_channels
    if (dataset.image_size, dataset.in_channels) != (size, channels):
        raise UserError(
            f"the model takes {times(both(size), channels)} images, but image_size and in_channels ask for "
            f"{times(dataset.train_images.shape[1:])}: leave them out"
        )
    model.restart(options.seed)
    if model.config.num_classes != dataset.num_classes:
        say(f"a new head for {dataset.num_classes} classes, in place of {model.config.num_classes}", options.progress)
        model.reset_head(dataset.num_classes)
    return model
