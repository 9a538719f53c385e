"""`train`: from a model's name and data to a trained model in a run folder."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Batches, Dataset, load_data
from ..data.cifar import recognise
from ..data.idx import holds_idx
from ..data.load import KNOWN
from ..data.train_test_overlap import hash_sample
from ..errors import UserError
from ..inference.classifier import Classifier, Preprocessing
from ..io.run_folder import RunFolder, check_free
from ..kernels.cpu.compile import has_compiled_kernels
from ..kernels.cpu.run import threads_set
from ..models import FAMILIES, PRESETS, Model, create_model
from ..nn.module import Module
from ..optim import OPTIMIZERS
from ..runtime.devices import check_device
from ..runtime.precision import fastest, precision_for
from ..runtime.threads import thread_count
from ..version import __version__
from .loop import Loop, say
from .options import TrainOptions, takes_options
from .profiling import profile as profile_step
from .recipes import OTHERS, Recipe, recipe_for
from .trainer import Trainer


@dataclass(frozen=True, eq=False)
class Run:
    """What `train` gives."""

    model: Classifier  # trained, in evaluation mode; has predict()
    history: list[dict[str, Any]]  # an entry an epoch, as in metrics.jsonl
    folder: Path  # config.json, metrics.jsonl, model.safetensors, curves.png

    @property
    def test_accuracy(self) -> float:
        """In 0..1, after the last epoch."""
        return self.history[-1]["test_accuracy"]


@takes_options
def train(model: str | Module | None = None, data: Any = "digits", **options: Any) -> Run:
    """Train a model on images, and write a run folder.

    A value that is None follows the recipe of the data (`minivit.training.recipes`); the model is made to fit the data's classes, channels
    and image size.

    Raises UserError, one line, for all that is wrong with these; TrainingError where the loss is not finite; Interrupted. In either of the
    last two the run folder holds the weights of the last finished epoch.
    """
    asked = TrainOptions(model, data, **options)
    check_device(asked.device)
    precision_for(asked.precision, np.dtype(np.float32))  # raises
    threads = thread_count(asked.threads)
    check_free(asked.out, asked.overwrite)
    announce = say if asked.progress else _say_nothing
    dataset = _load(asked)
    recipe = recipe_for(dataset.name, len(dataset.train_images), **asked.of_recipe())
    batches = _batches(asked, dataset, recipe)
    trained = _adapt(asked, dataset, recipe, announce) if isinstance(model, Module) else _create(asked, dataset, recipe)
    settings = _trainer_settings(asked, recipe, threads)
    trainer = Trainer(trained, **settings)
    folder = RunFolder.create(asked.out, f"{_slug(trained.name)}-{_slug(dataset.name)}", asked.overwrite)
    folder.write_config(_config(asked, dataset, recipe, batches, trained, trainer))
    announce(f"{dataset.summary()}\n{trained.name}: {trainer.flat.size:,} parameters to train; run folder {folder.path}")
    if asked.precision == "auto":
        name, reason = fastest(asked.device)
        announce(f"precision {trainer.precision.name}: {reason if trainer.precision.name == name else 'that of the model'}")
    if asked.progress and not has_compiled_kernels():
        announce("compiling kernels for this machine, once: some seconds")
    if asked.profile:
        say(f"{profile_step(trained, recipe.batch_size, **settings)}\n")
    known = hash_sample(dataset.train_images) if trained.num_exits > 1 else ()  # only thresholds ask for it
    classifier = Classifier(trained, dataset.class_names, Preprocessing.of(dataset), known, trainer.precision.name)
    loop = Loop(trainer, classifier, dataset, batches, recipe, asked.schedule, folder)
    with threads_set(threads):
        loop.run(asked.progress)
    return Run(loop.classifier, folder.history, folder.path)


# ------------------------------------------------------------------------------------------------------------- model and data
def _load(asked: TrainOptions) -> Dataset:
    """The dataset at the size that is asked for, or a given Model's, or for a folder of images the size that the model is named for."""
    model, image_size, in_channels = asked.model, asked.image_size, asked.in_channels
    if isinstance(model, Module):
        config = _unwrapped(model).config
        image_size, in_channels = image_size or config.image_size, in_channels or config.in_channels
    elif image_size is None:
        preferred = _preferred_size(model or OTHERS.model)  # also tells an unknown name before any data is decoded
        image_size = preferred if _is_image_folder(asked.data) else None
    dataset = load_data(
        asked.data,
        image_size=image_size,
        in_channels=in_channels,
        test_fraction=asked.test_fraction,
        split_seed=asked.split_seed,
        skip_bad_images=asked.skip_bad_images,
        progress=asked.progress,
    )
    return dataset.limited(asked.limit)


def _preferred_size(name: str) -> int:
    family = FAMILIES.get(name) or PRESETS.get(name) or type(create_model(name))  # which raises, naming the nearest
    return family.Config(**family.presets.get(name, {})).image_size


def _is_image_folder(data: Any) -> bool:
    path = Path(data).expanduser() if isinstance(data, (str, Path)) and data not in KNOWN else None
    return path is not None and path.is_dir() and not recognise(path) and not holds_idx(path)


def _batches(asked: TrainOptions, dataset: Dataset, recipe: Recipe) -> Batches:
    return Batches(
        dataset.train_images,
        dataset.train_labels,
        batch_size=recipe.batch_size,
        num_classes=dataset.num_classes,
        mean=dataset.mean,
        std=dataset.std,
        seed=asked.seed,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        augmentation=dataset.augmentation if asked.augmentation is None else asked.augmentation,
        device=asked.device,
    )


def _create(asked: TrainOptions, dataset: Dataset, recipe: Recipe) -> Model:
    options = dict(asked.model_options or {})
    implied: dict[str, Any] = {"dtype": "float64"} if asked.precision == "float64" else {}
    if recipe.drop_path:
        implied["drop_path_rate"] = recipe.drop_path
    decided = {"num_classes": dataset.num_classes, "image_size": dataset.image_size, "in_channels": dataset.in_channels, "seed": asked.seed}
    clash = next((name for name in options if name in decided), None)
    if clash:
        raise UserError(f"{clash} is not for model_options: the data, or image_size, in_channels and seed themselves, decide it")
    return create_model(recipe.model, **decided, **implied | options)


def _unwrapped(module: Module) -> Model:
    model = module.unwrapped()
    if not isinstance(model, Model):
        raise UserError(f"train() takes a model of create_model, not {type(model).__name__}: train other modules with a Trainer")
    return model


def _adapt(asked: TrainOptions, dataset: Dataset, recipe: Recipe, announce: Callable[[str], None]) -> Model:
    """A given Model made to fit the data: a new head where the number of classes differs."""
    assert isinstance(asked.model, Module)
    model = _unwrapped(asked.model)
    if asked.model_options or recipe.drop_path:
        raise UserError("model_options and drop_path are for a model given by name: give them to create_model (drop_path_rate)")
    size, channels = model.config.image_size, model.config.in_channels
    if (dataset.image_size, dataset.in_channels) != (size, channels):
        raise UserError(
            f"the model takes {size}×{size}×{channels} images, but image_size and in_channels ask for "
            f"{dataset.image_size}×{dataset.image_size}×{dataset.in_channels}: leave them out"
        )
    model.restart(asked.seed)
    if model.config.num_classes != dataset.num_classes:
        announce(f"a new head for {dataset.num_classes} classes, in place of {model.config.num_classes}")
        model.reset_head(dataset.num_classes)
    return model


# ------------------------------------------------------------------------------------------------------------------- the run
def _trainer_settings(asked: TrainOptions, recipe: Recipe, threads: int) -> dict[str, Any]:
    optimizer = OPTIMIZERS.get(asked.optimizer)  # Trainer raises for an unknown one
    own = {name: getattr(asked, name) for name in (optimizer.options() if optimizer else ()) if hasattr(asked, name)}
    return dict(
        precision=asked.precision,
        device=asked.device,
        optimizer=asked.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
        label_smoothing=recipe.label_smoothing,
        accumulate=asked.accumulate,
        ema=recipe.ema,
        threads=threads,
        **own,
    )


def _config(asked: TrainOptions, dataset: Dataset, recipe: Recipe, batches: Batches, model: Model, trainer: Trainer) -> dict[str, Any]:
    """Everything needed to repeat the run."""
    same = ("schedule", "optimizer", "momentum", "seed", "device", "test_fraction", "split_seed", "skip_bad_images", "limit")
    arguments = {
        **asdict(recipe),
        **{name: getattr(asked, name) for name in same},
        "model": model.name,
        "data": _repeatable(asked.data),
        "augmentation": batches.policy,
        "accumulate": trainer.parts(recipe.batch_size),
        "precision": trainer.precision.name,
        "image_size": dataset.image_size,
        "in_channels": dataset.in_channels,
        "model_options": dict(asked.model_options or {}),
    }
    return {
        "arguments": arguments,
        "model_given": isinstance(asked.model, Module),
        "model_config": asdict(model.config),
        "dataset": dataset.summary(),
        "class_names": dataset.class_names,
        "parameters": trainer.flat.size,
        "minivit": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": metadata.version("numba"),
    }


def _repeatable(data: Any) -> str | None:
    """What finds the data again: a name, an absolute path, or None for arrays."""
    if isinstance(data, (str, Path)):
        return str(data) if data in KNOWN else str(Path(data).expanduser().resolve())
    return None


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


def _say_nothing(line: str) -> None:
    pass
