"""`train`: train a model by name, or an existing one, on a dataset, and write a run folder."""

from __future__ import annotations

import platform
import re
import signal
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ..data import Batches, Dataset, load_data
from ..data.cifar import recognise
from ..data.folder import training_size
from ..data.idx import holds_idx
from ..data.load import KNOWN
from ..data.train_test_overlap import hash_sample
from ..errors import UserError
from ..files import user_path
from ..inference.classifier import Classifier, Preprocessing
from ..interrupts import interruptible
from ..io.run_folder import RunFolder, check_free
from ..kernels.cpu.compile import has_compiled_kernels
from ..kernels.cpu.run import threads_set
from ..models import FAMILIES, PRESETS, Model, create_model
from ..nn.module import Module
from ..optim import OPTIMIZERS
from ..progress import say
from ..runtime.devices import check_device
from ..runtime.precision import fastest, precision_for
from ..runtime.threads import thread_count
from ..sides import both, times
from ..version import __version__
from .class_weights import class_weights, imbalance
from .loop import Interrupted, Loop, Phase, duration
from .options import TrainOptions, takes_options
from .profiling import profile as profile_step
from .recipes import ENOUGH, SIDES, Recipe, models_for, recipe_for
from .timing import Fitting, fitting, step_seconds, test_seconds
from .trainer import Trainer


@dataclass(frozen=True, eq=False)
class Run:
    """The result of `train`."""

    model: Classifier  # trained, in evaluation mode; has predict()
    history: list[dict[str, Any]]  # one entry per test, as in metrics.jsonl
    folder: Path  # config.json, metrics.jsonl, model.safetensors, curves.png

    @property
    def test_accuracy(self) -> float:
        """The test accuracy of the weights that were kept, in 0..1."""
        return self.history[-1]["test_accuracy"]


@takes_options
def train(model: str | Module | None = None, data: Any = "digits", **options: Any) -> Run:
    """Train a model on images, and write a run folder.

    None selects the value of the recipe for the data (`minivit.training.recipes`); the model is adapted to the data's classes, channels and
    image size.

    Raises UserError, one line, for any invalid argument; TrainingError if the loss is not finite; Interrupted. In the last two cases the
    run folder contains the weights of the last finished epoch.
    """
    start = perf_counter()
    train_options = TrainOptions(model, data, **options)
    with interruptible(signal.SIGINT):
        try:
            loop = _prepare(train_options, start)
        except KeyboardInterrupt:
            raise Interrupted("interrupted before training began; nothing was written") from None
        with closing(loop.folder), threads_set(loop.trainer.threads):
            loop.run(train_options.progress)
    return Run(loop.classifier, loop.folder.history, loop.folder.path)


def _prepare(options: TrainOptions, start: float) -> Loop:
    """Everything that comes before the first step; the run folder last. start: when `train` was called, by perf_counter."""
    check_device(options.device)
    precision_for(options.precision, np.dtype(np.float32))  # raises
    threads = thread_count(options.threads)
    check_free(options.out, options.overwrite)
    loaded = _load(options)
    fraction = options.validation_fraction
    dataset = loaded.validating(fraction, options.split_seed) if fraction else loaded
    setup = _setup(options, dataset, threads)
    say(loaded.summary(), options.progress)
    if fraction:
        say(f"{len(dataset.test_images)} of the training images decide which weights are kept", options.progress)
    if options.class_weights is None and (line := imbalance(dataset.train_labels, dataset.class_names)):
        say(line, options.progress)
    if not has_compiled_kernels():
        say("compiling kernels for this machine, once: some seconds", options.progress)
    test_every = options.test_every or 1
    if options.minutes is not None:
        setup, fits = _fitted(options, start, setup, len(loaded.test_images) if fraction else 0)
        test_every = options.test_every or fits.test_every
    recipe, settings, (*early, (model, trainer, batches, _)) = setup.recipe, setup.settings, setup.phases
    say(f"{model.name}: {trainer.flat.size:,} parameters to train", options.progress)
    for phase in early:
        say(f"epochs up to {phase.end}: images of {times(phase.batches.images.shape[1:3])} pixels", options.progress)
    if options.precision == "auto":
        name, reason = fastest(options.device)
        say(f"precision {trainer.precision.name}: {reason if trainer.precision.name == name else 'that of the model'}", options.progress)
    if options.profile:
        for line in [*str(profile_step(model, recipe.batch_size, **settings)).split("\n"), ""]:
            say(line)
    training_hashes = hash_sample(loaded.train_images) if model.num_exits > 1 else ()  # only used by the calibration of cascades
    classifier = Classifier(model, dataset.class_names, Preprocessing.of(dataset), training_hashes, trainer.precision.name, options.tta)
    config = _config(options, loaded, recipe, batches, model, trainer, settings, test_every)
    folder = RunFolder.create(options.out, f"{_slug(model.name)}-{_slug(dataset.name)}", config, options.overwrite)
    say(f"run folder {folder.path}", options.progress)
    return Loop(setup.phases, classifier, dataset, recipe, folder, test_every, loaded if fraction else None)


# ------------------------------------------------------------------------------------------------------------- model and data
def _load(options: TrainOptions) -> Dataset:
    """The dataset at the requested image size, or that of a Model instance, or for a folder of images the default size of the
    model, or one that suits the images."""
    model, image_size, in_channels, fit = options.model, options.image_size, options.in_channels, options.fit
    if isinstance(model, Module):
        config = _unwrapped(model).config
        image_size, in_channels = image_size or config.image_size, in_channels or config.in_channels
        if isinstance(model, Classifier) and not isinstance(options.data, Dataset):
            fit = fit or model.preprocessing.fit
    elif image_size is None:
        preferred = _preferred_size(model) if model else None  # also rejects an unknown name before data is decoded
        if path := _image_folder(options.data):
            image_size = preferred or training_size(path)
    dataset = load_data(
        options.data,
        image_size=image_size,
        in_channels=in_channels,
        fit=fit,
        test_fraction=options.test_fraction,
        split_seed=options.split_seed,
        skip_bad_images=options.skip_bad_images,
        max_pixels=options.max_pixels,
        progress=options.progress,
    )
    return dataset.limited(options.limit)


def _preferred_size(name: str) -> int | tuple[int, int]:
    family = FAMILIES.get(name) or PRESETS.get(name) or type(create_model(name))  # raises, naming the nearest
    return family.Config(**family.presets.get(name, {})).image_size


def _image_folder(data: Any) -> Path | None:
    """The path of a folder of images; None if the data is something else."""
    path = user_path(data) if isinstance(data, (str, Path)) and data not in KNOWN else None
    return path if path is not None and path.is_dir() and not recognise(path) and not holds_idx(path) else None


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


def _unwrapped(module: Module) -> Model:
    model = module.unwrapped()
    if not isinstance(model, Model):
        raise UserError(f"train() takes a model of create_model, not {type(model).__name__}: train other modules with a Trainer")
    return model


def _adapt(options: TrainOptions, dataset: Dataset, recipe: Recipe) -> Model:
    """Adapt a Model instance to the data, with a new head if the number of classes differs. Raises UserError if it does not fit."""
    assert isinstance(options.model, Module)
    model = _unwrapped(options.model)
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


# ------------------------------------------------------------------------------------------------------------------- the run
class Setup(NamedTuple):
    """What is trained, and how."""

    recipe: Recipe
    datasets: list[Dataset]  # of each phase
    phases: list[Phase]  # the last one is that of the model
    settings: dict[str, Any]  # the arguments of the trainers


def _setup(options: TrainOptions, dataset: Dataset, threads: int, before: Setup | None = None, **chosen: Any) -> Setup:
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
    return [replace(dataset.resized(size), mean=dataset.mean, std=dataset.std) for size in sizes]


def _create_smaller(options: TrainOptions, dataset: Dataset, recipe: Recipe, model: Model) -> Model:
    """The same model for smaller images. Raises UserError if the `model` cannot take its weights."""
    smaller = _create(options, dataset, recipe)
    try:
        model.take_weights(smaller)  # which will be others when they count
    except UserError as error:
        raise UserError(f"progressive_resizing is not for {model.name}, whose weights depend on the size of the images") from error
    return smaller


def _fitted(options: TrainOptions, start: float, setup: Setup, once: int) -> tuple[Setup, Fitting]:
    """The setup with as many epochs as fit into the minutes, or that of a larger model, if none was given and there is time for it.

    start: when `train` was called. once: the number of images that are tested once, at the end.
    """
    dataset, threads = setup.datasets[-1], setup.phases[-1].trainer.threads
    fits = _fit(options, start, setup, once)
    for larger in models_for(dataset.image_size)[1:]:
        if options.model is None and fits.epochs > ENOUGH:
            setup = _setup(options, dataset, threads, setup, model=larger)
            fits = _fit(options, start, setup, once)
    return _setup(options, dataset, threads, setup, model=setup.recipe.model, epochs=fits.epochs), fits


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
        threads=threads,
        **optimizer_options,
    )


def _config(
    options: TrainOptions,
    dataset: Dataset,
    recipe: Recipe,
    batches: Batches,
    model: Model,
    trainer: Trainer,
    settings: dict[str, Any],
    test_every: int,
) -> dict[str, Any]:
    """Everything needed to repeat the run."""
    unchanged = (
        "seed",
        "device",
        "test_fraction",
        "validation_fraction",
        "split_seed",
        "skip_bad_images",
        "max_pixels",
        "limit",
        "tta",
    )
    arguments = {
        **asdict(recipe),
        **{name: getattr(options, name) for name in unchanged},
        "model": model.name,
        "data": _repeatable(options.data),
        "augmentation": batches.policy,
        "momentum": settings.get("momentum"),
        "test_every": test_every,
        "accumulate": trainer.parts(recipe.batch_size),
        "precision": trainer.precision.name,
        "image_size": dataset.image_size,
        "in_channels": dataset.in_channels,
        "fit": dataset.fit,
        "class_weights": settings["class_weights"],
        "model_options": dict(options.model_options or {}),
    }
    return {
        "arguments": arguments,
        "model_given": isinstance(options.model, Module),
        "model_config": asdict(model.config),
        "dataset": dataset.summary(),
        "split_hash": dataset.split_hash,
        "class_names": dataset.class_names,
        "parameters": trainer.flat.size,
        "minivit": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": metadata.version("numba"),
    }


def _repeatable(data: Any) -> str | None:
    """The data as an argument that can be used again: a name, an absolute path, or None for arrays."""
    if isinstance(data, (str, Path)):
        return str(data) if data in KNOWN else str(user_path(data).resolve())
    return None


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"
