"""`train`: train a model by name, or an existing one, on a dataset, and write a run folder."""

from __future__ import annotations

import platform
import re
import signal
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..data import Batches, Dataset, load_data
from ..data.cifar import recognise
from ..data.folder import training_size
from ..data.idx import holds_idx
from ..data.load import KNOWN
from ..data.train_test_overlap import hash_sample
from ..files import user_path
from ..inference.classifier import Classifier, Preprocessing
from ..interrupts import interruptible
from ..io.run_folder import RunFolder, Unsaved, check_free
from ..kernels.cpu.compile import has_compiled_kernels
from ..kernels.cpu.run import threads_set
from ..models import FAMILIES, PRESETS, Model, create_model
from ..nn.module import Module
from ..progress import say
from ..runtime.devices import check_device
from ..runtime.precision import fastest, precision_for
from ..runtime.threads import thread_count
from ..sides import times
from ..version import __version__
from .checkpoints import Pace
from .class_weights import imbalance
from .finetuning import Origin, find_origin
from .loop import Interrupted, Loop
from .options import TrainOptions, repeatable, takes_options
from .profiling import profile as profile_step
from .reasons import reasons
from .recipes import Recipe
from .resume import Stopped, find_stopped
from .setup import fit_minutes, set_up, unwrapped
from .trainer import Trainer
from .watchers import Functions, TensorBoard, check_tensorboard


@dataclass(frozen=True, eq=False)
class Run:
    """The result of `train`."""

    model: Classifier  # trained, in evaluation mode; has predict()
    history: list[dict[str, Any]]  # one entry per test, as in metrics.jsonl
    folder: Path | None  # config.json, metrics.jsonl, model.safetensors, curves.png, report.html; None with save=False

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
    run folder contains the weights of the last finished epoch. What on_epoch and on_step raise ends the run too. With save=False no folder
    is written.
    """
    start = perf_counter()
    with interruptible(signal.SIGINT):
        try:
            stopped = find_stopped(model, data, options) if options.get("resume") is not None else None
            train_options = stopped.options if stopped else TrainOptions(model, data, **options)
            loop = _prepare(train_options, start, stopped)
        except KeyboardInterrupt:
            raise Interrupted("interrupted before training began; nothing was written") from None
        with closing(loop), threads_set(loop.trainer.threads):
            loop.run(train_options.progress)
    return Run(loop.classifier, loop.folder.history, loop.folder.path if loop.folder.keeps_files else None)


def _prepare(options: TrainOptions, start: float, stopped: Stopped | None) -> Loop:
    """Everything that comes before the first step; the run folder last. start: when `train` was called, by perf_counter.

    stopped: the run that goes on, whose folder is closed if this fails.
    """
    try:
        return _prepared(options, start, stopped)
    except BaseException:
        if stopped:
            stopped.folder.close()
        raise


def _prepared(options: TrainOptions, start: float, stopped: Stopped | None) -> Loop:
    if options.tensorboard:
        check_tensorboard()
    check_device(options.device)
    precision_for(options.precision, np.dtype(np.float32))  # raises
    threads = thread_count(options.threads)
    if not stopped:
        check_free(options.out, options.overwrite)
    origin = find_origin(options.weights)
    loaded = _load(options, origin)
    fraction = options.validation_fraction
    dataset = loaded.validating(fraction, options.split_seed) if fraction else loaded
    setup = set_up(options, dataset, threads, origin)
    say(loaded.summary(), options.progress)
    if fraction:
        say(f"{len(dataset.test_images)} of the training images decide which weights are kept", options.progress)
    if options.class_weights is None and (line := imbalance(dataset.train_labels, dataset.class_names)):
        say(line, options.progress)
    if not has_compiled_kernels():
        say("compiling kernels for this machine, once: some seconds", options.progress)
    test_every = options.test_every or 1
    if options.minutes is not None:
        setup, fits = fit_minutes(options, start, setup, len(loaded.test_images) if fraction else 0)
        test_every = options.test_every or fits.test_every
    if stopped:
        setup = setup.extended(stopped.epochs)
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
    folder: RunFolder = Unsaved()
    if stopped:
        folder = stopped.folder
    elif options.save:
        config = _config(options, loaded, recipe, batches, model, trainer, settings, test_every)
        config["reasons"] = reasons(options, dataset, recipe, origin, trainer.precision.name)
        config["arguments"]["weights"] = str(origin.file.resolve()) if origin else None
        folder = RunFolder.create(options.out, f"{_slug(model.name)}-{_slug(dataset.name)}", config, options.overwrite)
        say(f"run folder {folder.path}", options.progress)
    pace = Pace(options.checkpoint_minutes, at_once=(isinstance(options.model, Module) or bool(origin)) and not (stopped and stopped.about))
    final = loaded if fraction else None
    loop = Loop(
        setup.phases,
        classifier,
        dataset,
        recipe,
        folder,
        test_every,
        final,
        at_end=setup.thaw,
        pace=pace,
        keep_checkpoint=options.keep_checkpoint,
        frozen=setup.frozen,
    )
    if stopped:
        stopped.begin(loop)
    if options.on_step or options.on_epoch:
        loop.watchers.append(Functions(options.on_step, options.on_epoch))
    if options.tensorboard:
        loop.watchers.append(TensorBoard(folder.path, loop.steps))
    return loop


def _load(options: TrainOptions, origin: Origin | None) -> Dataset:
    """The dataset at the requested image size, or that of a Model instance, or for a folder of images the default size of the
    model or of that whose weights are taken, or one that suits the images."""
    model, image_size, in_channels, fit = options.model, options.image_size, options.in_channels, options.fit
    if isinstance(model, Module):
        config = unwrapped(model).config
        image_size, in_channels = image_size or config.image_size, in_channels or config.in_channels
        if isinstance(model, Classifier) and not isinstance(options.data, Dataset):
            fit = fit or model.preprocessing.fit
    elif image_size is None:
        preferred = _preferred_size(model) if model else origin and origin.image_size  # also rejects an unknown name before data is decoded
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
        "data": repeatable(options.data),
        "freeze": options.frozen,
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


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"
