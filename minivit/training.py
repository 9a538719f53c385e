"""`train`: from a model's name and data to a trained model in a run folder. The loop, its history, its progress."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from . import __version__
from .checkpoint import CURVES, MODEL, RunFolder, check_free, writing
from .data import Batches, Dataset, load_data
from .data.cifar import recognise
from .data.idx import holds_idx
from .data.load import KNOWN
from .data.train_test_overlap import hash_sample
from .devices import check_device
from .errors import UserError, nearest
from .kernels.cpu.compile import has_compiled_kernels
from .kernels.cpu.run import threads_set
from .models import DVT, Model, create_model
from .models.base import FAMILIES, PRESETS
from .module import Module
from .optim import SCHEDULES
from .plots import save_learning_curves
from .precision import fastest, precision_for
from .predict import Classifier, Preprocessing, evaluate, unwrapped
from .profiling import profile as profile_step
from .recipes import OTHERS, Recipe, recipe_for
from .threads import thread_count
from .trainer import Trainer, TrainingError

__all__ = ["Interrupted", "Run", "Trainer", "TrainingError", "train"]


class Interrupted(KeyboardInterrupt):
    """An interrupt that left a usable run folder; the message says where."""


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


def train(
    model: str | Module | None = None,
    data: Any = "digits",
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    min_lr: float | None = None,
    warmup: float | None = None,
    schedule: str = "cosine",
    weight_decay: float | None = None,
    clip_norm: float | None = None,
    label_smoothing: float | None = None,
    augmentation: str | None = None,
    mixup: float | None = None,
    cutmix: float | None = None,
    drop_path: float | None = None,
    ema: float | None = None,
    optimizer: str = "adamw",
    momentum: float = 0.9,
    accumulate: int | None = None,
    seed: int = 0,
    precision: str = "auto",
    device: str = "cpu",
    image_size: int | None = None,
    in_channels: int | None = None,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    skip_bad_images: bool = False,
    limit: int | None = None,
    model_options: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    threads: int | None = None,
    profile: bool = False,
) -> Run:
    """Train a model on images, and write a run folder.

    What is None follows the recipe of the data (`minivit.recipes`); the model is made to fit the data's classes, channels and image size.

    model: name of a model; in Python also a Model, which is trained further
    data: digits, cifar10, cifar100, a folder of images, an .npz file or an archive; in Python also arrays or a Dataset (`load_data`)
    epochs: passes over the training images
    batch_size: images of an optimizer step
    lr: highest learning rate
    min_lr: learning rate at the end of the cosine schedule
    warmup: epochs in which the learning rate rises
    schedule: what follows the warmup, cosine or constant
    weight_decay: decoupled weight decay, not of biases, scales and position embeddings
    clip_norm: largest norm of the whole gradient; 0 is off
    label_smoothing: share of the target that all classes divide
    augmentation: none, flip, crop-flip or affine, by default what the data bears; in Python also a policy of one's own
    mixup: alpha of mixup; 0 is off
    cutmix: alpha of CutMix; 0 is off
    drop_path: stochastic depth of the last block
    ema: decay of a running average of the weights, which is then what is tested and kept; 0 is off
    optimizer: adamw or sgd
    momentum: of sgd, 0 ... below 1
    accumulate: parts that a batch is computed in, one after the other, for less memory; by default as many as cost hardly any time
    seed: of weights, order, augmentation and dropout; the same seed gives the same run bit for bit on the same machine
    precision: of training and of the model's predictions afterwards: float32, bf16x3, bfloat16, float64, or auto, the fastest here that
        trains as well as float32
    device: where it is done, cpu or cuda
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
    threads: how many compute, by default as many as there are cores; the run is the same bit for bit
    profile: before training, print on standard error what a step's time goes to, by op, with floors

    Raises UserError, one line, for all that is wrong with these; TrainingError where the loss is not finite; Interrupted. In either of the
    last two the run folder holds the weights of the last finished epoch.
    """
    check_device(device)
    precision_for(precision, np.dtype(np.float32))  # raises
    threads = thread_count(threads)
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {schedule!r}{nearest(schedule, SCHEDULES)}: choose {', '.join(SCHEDULES)}")
    check_free(out, overwrite)
    announce = _say if progress else _say_nothing
    dataset = _load(
        data,
        model,
        image_size,
        in_channels,
        limit,
        test_fraction=test_fraction,
        split_seed=split_seed,
        skip_bad_images=skip_bad_images,
        progress=progress,
    )
    recipe = recipe_for(
        dataset.name,
        len(dataset.train_images),
        model=model if isinstance(model, str) else None,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        min_lr=min_lr,
        warmup=warmup,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        drop_path=drop_path,
        ema=ema,
    )
    batches = Batches(
        dataset.train_images,
        dataset.train_labels,
        batch_size=recipe.batch_size,
        num_classes=dataset.num_classes,
        mean=dataset.mean,
        std=dataset.std,
        seed=seed,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        augmentation=dataset.augmentation if augmentation is None else augmentation,
        device=device,
    )
    options = dict(model_options or {})
    if isinstance(model, Module):
        trained = _adapt(model, dataset, recipe, seed, options, announce)
    else:
        trained = _create(dataset, recipe, precision, seed, options)
    settings: dict[str, Any] = dict(
        precision=precision,
        device=device,
        optimizer=optimizer,
        lr=recipe.lr,
        momentum=momentum,
        weight_decay=recipe.weight_decay,
        clip_norm=recipe.clip_norm,
        label_smoothing=recipe.label_smoothing,
        accumulate=accumulate,
        ema=recipe.ema,
        threads=threads,
    )
    trainer = Trainer(trained, **settings)
    accumulate = trainer.parts(recipe.batch_size)
    folder = RunFolder.create(out, f"{_slug(trained.name)}-{_slug(dataset.name)}", overwrite)
    arguments = {
        **asdict(recipe),
        "model": trained.name,
        "data": _repeatable(data),
        "schedule": schedule,
        "augmentation": batches.policy,
        "optimizer": optimizer,
        "momentum": momentum,
        "accumulate": accumulate,
        "seed": seed,
        "precision": trainer.precision.name,
        "device": device,
        "image_size": dataset.image_size,
        "in_channels": dataset.in_channels,
        "test_fraction": test_fraction,
        "split_seed": split_seed,
        "skip_bad_images": skip_bad_images,
        "limit": limit,
        "model_options": options,
    }
    folder.write_config(
        {
            "arguments": arguments,
            "model_given": isinstance(model, Module),
            "model_config": asdict(trained.config),
            "dataset": dataset.summary(),
            "class_names": dataset.class_names,
            "parameters": trainer.flat.size,
            **_versions(),
        }
    )
    announce(f"{dataset.summary()}\n{trained.name}: {trainer.flat.size:,} parameters to train; run folder {folder.path}")
    if precision == "auto":
        name, reason = fastest(device)
        announce(f"precision {trainer.precision.name}: {reason if trainer.precision.name == name else 'that of the model'}")
    if progress and not has_compiled_kernels():
        announce("compiling kernels for this machine, once: some seconds")
    if profile:
        _say(f"{profile_step(trained, recipe.batch_size, **settings)}\n")
    known = hash_sample(dataset.train_images) if isinstance(trained, DVT) else ()  # only thresholds ask for it
    classifier = Classifier(trained, dataset.class_names, Preprocessing.of(dataset), known, trainer.precision.name)
    loop = Loop(trainer, classifier, dataset, batches, recipe, schedule, folder)
    with threads_set(threads):
        loop.run(progress)
    return Run(loop.classifier, folder.history, folder.path)


# ------------------------------------------------------------------------------------------------------------- model and data
def _load(
    data: Any, model: str | Module | None, image_size: int | None, in_channels: int | None, limit: int | None, **options: Any
) -> Dataset:
    """The dataset at the size that is asked for, or a given Model's, or for a folder of images the size that the model is named for."""
    if isinstance(model, Module):
        config = _unwrapped(model).config
        image_size, in_channels = image_size or config.image_size, in_channels or config.in_channels
    elif image_size is None:
        preferred = _preferred_size(model or OTHERS.model)  # also tells an unknown name before any data is decoded
        image_size = preferred if _is_image_folder(data) else None
    return load_data(data, image_size=image_size, in_channels=in_channels, **options).limited(limit)


def _preferred_size(name: str) -> int:
    family = FAMILIES.get(name) or PRESETS.get(name) or type(create_model(name))  # which raises, naming the nearest
    return family.Config(**family.presets.get(name, {})).image_size


def _is_image_folder(data: Any) -> bool:
    path = Path(data).expanduser() if isinstance(data, (str, Path)) and data not in KNOWN else None
    return path is not None and path.is_dir() and not recognise(path) and not holds_idx(path)


def _create(dataset: Dataset, recipe: Recipe, precision: str, seed: int, options: Mapping[str, Any]) -> Model:
    implied: dict[str, Any] = {"dtype": "float64"} if precision == "float64" else {}
    if recipe.drop_path:
        implied["drop_path_rate"] = recipe.drop_path
    decided = {"num_classes": dataset.num_classes, "image_size": dataset.image_size, "in_channels": dataset.in_channels, "seed": seed}
    clash = next((name for name in options if name in decided), None)
    if clash:
        raise UserError(f"{clash} is not for model_options: the data, or image_size, in_channels and seed themselves, decide it")
    return create_model(recipe.model, **decided, **implied | dict(options))


def _unwrapped(model: Module) -> Model:
    model = unwrapped(model)
    if not isinstance(model, Model):
        raise UserError(f"train() takes a model of create_model, not {type(model).__name__}: train other modules with a Trainer")
    return model


def _adapt(
    model: Module, dataset: Dataset, recipe: Recipe, seed: int, options: Mapping[str, Any], announce: Callable[[str], None]
) -> Model:
    """A given Model made to fit the data: a new head where the number of classes differs."""
    model = _unwrapped(model)
    if options or recipe.drop_path:
        raise UserError("model_options and drop_path are for a model given by name: give them to create_model (drop_path_rate)")
    size, channels = model.config.image_size, model.config.in_channels
    if (dataset.image_size, dataset.in_channels) != (size, channels):
        raise UserError(
            f"the model takes {size}×{size}×{channels} images, but image_size and in_channels ask for "
            f"{dataset.image_size}×{dataset.image_size}×{dataset.in_channels}: leave them out"
        )
    model.to("cpu")
    model.random.state[...] = seed, 0
    if isinstance(model, DVT):
        model.calibration = None  # other weights will want other thresholds
    if model.config.num_classes != dataset.num_classes:
        announce(f"a new head for {dataset.num_classes} classes, in place of {model.config.num_classes}")
        model.reset_head(dataset.num_classes)
    return model


def _repeatable(data: Any) -> str | None:
    """What finds the data again: a name, an absolute path, or None for arrays."""
    if isinstance(data, (str, Path)):
        return str(data) if data in KNOWN else str(Path(data).expanduser().resolve())
    return None


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


def _versions() -> dict[str, str]:
    return {"minivit": __version__, "python": platform.python_version(), "numpy": np.__version__, "numba": metadata.version("numba")}


# --------------------------------------------------------------------------------------------------------------------- the loop
class Loop:
    """Epochs of training, each followed by a test, a line of metrics and a saved model."""

    def __init__(
        self, trainer: Trainer, classifier: Classifier, dataset: Dataset, batches: Batches, recipe: Recipe, schedule: str, folder: RunFolder
    ) -> None:
        self.trainer, self.classifier, self.dataset, self.batches, self.recipe, self.folder = (
            trainer,
            classifier,
            dataset,
            batches,
            recipe,
            folder,
        )
        self.schedule = SCHEDULES[schedule]

    def run(self, progress: bool) -> None:
        """Train to the end; the model then has the weights that were tested. Raises Interrupted, TrainingError, UserError."""
        self.classifier.save(self.folder.path / MODEL)  # so that the folder is usable from here on, and a full disk shows at once
        shown = Progress(progress, self.recipe.epochs, len(self.batches))
        try:
            for epoch in range(self.recipe.epochs):
                self.folder.add_metrics(self._epoch(epoch, shown))
                shown.epoch(self.folder.history[-1])
        except (KeyboardInterrupt, TrainingError) as stop:
            self._draw()
            kept = f"{self.folder.path} holds the model after {len(self.folder.history)} of {self.recipe.epochs} epochs"
            if isinstance(stop, TrainingError):
                raise TrainingError(f"{stop}; {kept}") from None
            raise Interrupted(f"interrupted; {kept}") from None
        finally:
            shown.close()
        self._draw()
        self.trainer.swap_average()
        self.classifier.eval()

    def _draw(self) -> None:
        if self.folder.history:
            path = self.folder.path / CURVES
            with writing(path):
                save_learning_curves(self.folder.history, path, f"{self.classifier.model.name} on {self.dataset.name}")

    def _epoch(self, epoch: int, shown: Progress) -> dict[str, Any]:
        recipe, trainer, steps = self.recipe, self.trainer, len(self.batches)
        start, losses, last = perf_counter(), [], None
        for number, (images, labels) in enumerate(self.batches.epoch(epoch), epoch * steps):
            trainer.lr = self.schedule(number, recipe.epochs * steps, recipe.lr, round(recipe.warmup * steps), recipe.min_lr)
            step = trainer.submit(images, labels)
            if last:  # asked for one step later, so that a GPU always has one to compute
                losses.append(last.value())
            last = step
            shown.step()
        if last:
            losses.append(last.value())
        trained = perf_counter() - start
        dataset = self.dataset
        with trainer.averaged():
            test_loss, accuracies = evaluate(
                self.classifier.predictor, dataset.test_images, dataset.test_labels, dataset.mean, dataset.std, dataset.num_classes
            )
            self.classifier.save(self.folder.path / MODEL)
        return {
            "epoch": epoch + 1,
            "train_loss": fmean(losses),
            "test_loss": test_loss,
            "test_accuracy": accuracies[-1],
            **({"exit_accuracies": accuracies} if len(accuracies) > 1 else {}),
            "learning_rate": trainer.lr,
            "seconds": round(perf_counter() - start, 3),
            "images_per_second": round(len(losses) * self.batches.batch_size / trained, 1),
        }


class Progress:
    """A bar on a terminal, a line an epoch elsewhere, on standard error."""

    def __init__(self, shown: bool, epochs: int, steps: int) -> None:
        self.lines, self.epochs = shown and not sys.stderr.isatty(), epochs
        self.bar = tqdm(total=epochs * steps, unit="step", dynamic_ncols=True, disable=not shown or self.lines)

    def step(self) -> None:
        self.bar.update()

    def epoch(self, line: Mapping[str, Any]) -> None:
        accuracy = f"{100 * line['test_accuracy']:.1f} %"
        if self.lines:
            _say(
                f"epoch {line['epoch']}/{self.epochs}  train loss {line['train_loss']:.4f}  test loss {line['test_loss']:.4f}  "
                f"test accuracy {accuracy}  {line['images_per_second']:.0f} images/s"
            )
        self.bar.set_postfix_str(f"epoch {line['epoch']}/{self.epochs}, train loss {line['train_loss']:.3f}, test accuracy {accuracy}")

    def close(self) -> None:
        self.bar.close()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    pass
