"""What is trained: model, trainers and batches of each size of images, with as many epochs as fit into the minutes that were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ..data import Batches, Dataset
from ..errors import UserError
from ..inference.classifier import Preprocessing
from ..models import Model, create_model
from ..nn.module import Module
from ..optim import OPTIMIZERS
from ..progress import say
from ..sides import both, times
from .class_weights import class_weights
from .finetuning import HeadAlone, Origin, begin_with, features_of, freeze, frozen_names, learns_from_features
from .loop import Phase
from .options import TrainOptions
from .progress_bar import duration
from .recipes import ENOUGH, SIDES, Recipe, models_for, recipe_for
from .timing import Fitting, fitting, step_seconds, test_seconds
from .trainer import Trainer


class Setup(NamedTuple):
    """What is trained, and how."""

    recipe: Recipe
    origin: Origin | None  # of the first weights
    frozen: tuple[str, ...]  # what the model does not train by itself, by name
    thaw: Callable[[], None]  # to be called when the training has ended: undoes `freeze`
    datasets: list[Dataset]  # of each phase
    phases: list[Phase]  # the last one is that of the model
    settings: dict[str, Any]  # the arguments of the trainers

    def extended(self, epochs: int) -> Setup:
        """The same with another number of epochs, of which the last phase has what the others leave."""
        recipe, phases = replace(self.recipe, epochs=epochs), [*self.phases[:-1], self.phases[-1]._replace(end=epochs)]
        return self._replace(recipe=recipe, phases=phases)


def set_up(
    options: TrainOptions, dataset: Dataset, threads: int, origin: Origin | None, before: Setup | None = None, **chosen: Any
) -> Setup:
    """before: an earlier setup for this dataset. chosen: values of the recipe in addition to those that the user gives."""
    if before:
        before.thaw()
    recipe = _recipe(options, dataset, origin, **chosen)
    model = _adapt(options, dataset, recipe) if isinstance(options.model, Module) else _create(options, dataset, recipe, origin)
    frozen, thaw = frozen_names(model), freeze(model, options.frozen)
    weights = class_weights(options.class_weights, dataset.train_labels, dataset.class_names)
    settings = _trainer_settings(options, recipe, threads, weights)
    datasets, phases, start = before.datasets if before else [*_smaller(options, dataset, recipe, model), dataset], list[Phase](), 0
    for number, images in enumerate(datasets, 1):
        is_last = images is dataset
        end = recipe.epochs if is_last else round(recipe.progressive_resizing * recipe.epochs * number / len(SIDES))
        if start < end < recipe.epochs or is_last:
            of_size = model if is_last else _create_smaller(options, images, recipe, model, origin)
            phases.append(_phase(options, images, recipe, of_size, settings, end))
            start = end
    return Setup(recipe, origin, frozen, thaw, datasets, phases, settings)


def _recipe(options: TrainOptions, dataset: Dataset, origin: Origin | None, **chosen: Any) -> Recipe:
    """Raises UserError for weights that do not say which model they are of, if no model is given."""
    given = options.of_recipe() | chosen
    if origin:
        if options.model is None and origin.name is None:
            raise UserError(f"{origin.file} does not say which model its weights are of: give model, a name of list_models()")
        given = {"model": origin.name, "progressive_resizing": 0.0} | given
    return recipe_for(dataset.name, len(dataset.train_images), dataset.image_size, **given)


def _phase(options: TrainOptions, dataset: Dataset, recipe: Recipe, model: Model, settings: dict[str, Any], end: int) -> Phase:
    """Epochs with the images of a dataset; or with what the head makes of them, computed once, if nothing else learns or changes."""
    batches = _batches(options, dataset, recipe)
    if not learns_from_features(model, batches):
        return Phase(model, Trainer(model, **settings), batches, end)
    say("the inputs of the head are computed once, since nothing before it learns", options.progress)
    features = features_of(model, Preprocessing.of(dataset).batches(dataset.train_images, recipe.batch_size))
    channels = features.shape[-1]
    fixed = replace(dataset, train_images=features, mean=(0.0,) * channels, std=(1.0,) * channels)
    return Phase(model, Trainer(HeadAlone(model), **settings | {"layer_decay": 1.0}), _batches(options, fixed, recipe), end)


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


def _create_smaller(options: TrainOptions, dataset: Dataset, recipe: Recipe, model: Model, origin: Origin | None) -> Model:
    """The same model for smaller images. Raises UserError if the `model` cannot take its weights."""
    smaller = _create(options, dataset, recipe, origin)
    freeze(smaller, options.frozen)
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
        if options.model is None and setup.origin is None and fits.epochs > ENOUGH:
            setup = set_up(options, dataset, threads, None, setup, model=larger)
            fits = _fit(options, start, setup, once)
    return set_up(options, dataset, threads, setup.origin, setup, model=setup.recipe.model, epochs=fits.epochs), fits


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


def _create(options: TrainOptions, dataset: Dataset, recipe: Recipe, origin: Origin | None) -> Model:
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
    of_origin = origin.options or {} if origin and options.model is None else {}
    model = create_model(recipe.model, **data_options, **of_origin | implied | model_options)
    if origin:
        begin_with(model, origin, dataset, options.progress)
    return model


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
