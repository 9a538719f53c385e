"""The options of `train`: one dataclass that defines its keywords, its docstring, the command-line options and validation."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, get_type_hints

from ..data.augmentation import POLICIES
from ..data.image_file import MAX_PIXELS
from ..data.load import KNOWN
from ..errors import UserError
from ..files import user_path
from ..nn.module import Module
from ..optim import SCHEDULES
from ..schema import Checked
from .recipes import Recipe

# The options that a run does not have by itself: they may be others for a process that resumes it.
OF_A_PROCESS = (
    *("resume", "checkpoint_minutes", "keep_checkpoint", "on_epoch", "on_step", "tensorboard", "save", "progress", "threads", "profile"),
)


@dataclass(frozen=True)
class TrainOptions(Checked):
    """The arguments of `train`. None selects the value of the recipe for the data (`minivit.training.recipes`). Raises UserError."""

    model: Annotated[str | Module | None, "name of a model; in Python also a Model, which is trained further"] = None
    data: Annotated[
        Any,
        "digits, cifar10, cifar100, a folder of images, an .npz file or an archive; in Python also arrays or a Dataset (`load_data`)",
    ] = "digits"
    weights: Annotated[
        str | os.PathLike[str] | None,
        "weights that the training begins with: a run, a model file, a folder of transformers with a ViT or DeiT, or a .safetensors or "
        ".npz file of others, for which model must be given; positions are resized, and the head is new unless it is for the same classes",
    ] = None
    freeze: Annotated[
        int | str | None,
        "layers that keep their weights: backbone, which is all but the head, or a number of blocks from the first on, with all that "
        "comes before them",
    ] = None
    epochs: Annotated[int | None, "passes over the training images"] = None
    minutes: Annotated[
        float | None,
        "how long all of it may take, from reading the data to the last test: as many epochs are trained as this machine has time for, and "
        "the size of the model is chosen for that, if no model is given; in place of epochs",
    ] = None
    test_every: Annotated[int | None, "epochs from one test to the next; by default 1, with minutes as many as leave time to learn"] = None
    batch_size: Annotated[int | None, "images of an optimizer step"] = None
    lr: Annotated[float | None, "highest learning rate"] = None
    min_lr: Annotated[float | None, "learning rate at the end of the schedule"] = None
    warmup: Annotated[float | None, "epochs in which the learning rate rises"] = None
    schedule: Annotated[str | None, f"what follows the warmup: {', '.join(SCHEDULES)}"] = None
    weight_decay: Annotated[float | None, "decoupled weight decay, not of biases, scales and position embeddings"] = None
    clip_norm: Annotated[float | None, "maximum norm of the whole gradient; 0 is off"] = None
    label_smoothing: Annotated[float | None, "fraction of the target that is spread evenly over all classes"] = None
    class_weights: Annotated[
        str | Mapping[str, float] | Sequence[float] | None,
        "weights of the classes in the loss: balanced, by which each class weighs as much in all, or a table, as cat=2,dog=1, in which "
        "other classes weigh 1; in Python also a dict of these, or a number for each class",
    ] = None
    augmentation: Annotated[
        str | Sequence[Any] | None,
        f"{', '.join(POLICIES)}; by default the policy of the dataset; in Python also a custom policy",
    ] = None
    mixup: Annotated[float | None, "alpha of mixup; 0 is off"] = None
    cutmix: Annotated[float | None, "alpha of CutMix; 0 is off"] = None
    repeats: Annotated[
        int | None,
        "how many times an image that is chosen stands in a batch, changed anew each time; an epoch shows as many times fewer images",
    ] = None
    progressive_resizing: Annotated[
        float | None,
        "share of the epochs, at the beginning, in which images have half of their side and then three quarters, so that more are seen; "
        "0 is off",
    ] = None
    layer_decay: Annotated[
        float | None, "factor of the learning rate from each block to the block before it; 0.75 suits fine-tuning; 1 is off"
    ] = None
    drop_path: Annotated[float | None, "stochastic depth of the last block"] = None
    ema: Annotated[float | None, "decay of a running average of the weights, which is then tested and saved; 0 is off"] = None
    optimizer: Annotated[str | None, "adamw, sgd, or muon, which is adamw but for the matrices between hidden layers"] = None
    momentum: Annotated[float | None, "momentum of sgd, by default 0.9, or of muon, 0.95; at least 0 and below 1"] = None
    tta: Annotated[bool, "test with the mean of the predictions for an image and its mirror image"] = False
    accumulate: Annotated[
        int | None,
        "number of parts of a batch that are computed one after the other, to save memory; by default as many as hardly cost time",
    ] = None
    seed: Annotated[
        int,
        "seed of weights, order, augmentation and dropout; the same seed gives the same run bit for bit on the same machine",
    ] = 0
    precision: Annotated[
        str,
        "of training and of the model's predictions afterwards: float32, bf16x3, bfloat16, float64, or auto, the "
        "fastest here that trains as well as float32",
    ] = "auto"
    device: Annotated[str, "device for training, cpu or cuda"] = "cpu"
    image_size: Annotated[
        int | tuple[int, int] | None, "pixels that images are resized to: one number for squares, or rows and columns, as 64x96"
    ] = None
    in_channels: Annotated[int | None, "1 for gray, 3 for RGB"] = None
    fit: Annotated[
        str | None,
        "how images of other proportions become this size: crop, the centre; pad, the whole image with borders of its mean colour; "
        "stretch, the whole image without its proportions; by default crop, or as a given Dataset or trained model has it; predict and "
        "eval do the same",
    ] = None
    test_fraction: Annotated[float, "fraction of each class that is used for testing, if the data has no split"] = 0.2
    validation_fraction: Annotated[
        float,
        "fraction of each class of the training images that is tested after epochs in place of the test images: the weights that do best "
        "on it are kept, and the test images are looked at once, at the end; 0 is off, and the last weights are kept",
    ] = 0.0
    split_seed: Annotated[int, "seed of these splits"] = 0
    skip_bad_images: Annotated[bool, "leave out images that cannot be read, and name them"] = False
    max_pixels: Annotated[int, "largest number of pixels of an image file; decoding takes up to 15 bytes a pixel"] = MAX_PIXELS
    limit: Annotated[int | None, "maximum number of training images and of test images, selected at even intervals"] = None
    model_options: Annotated[Mapping[str, Any] | None, "further options of the model, such as depth or pool"] = None
    resume: Annotated[
        str | os.PathLike[str] | None,
        "the folder of a run that was stopped, or its name in runs/: it goes on where its last checkpoint was written, with the arguments "
        "that it was begun with, and ends with the same bits as if it had not been stopped; more epochs extend it; data is needed only for "
        "a run on arrays",
    ] = None
    checkpoint_minutes: Annotated[
        float,
        "minutes from one checkpoint to the next inside an epoch; at the end of an epoch one is written after 5 seconds; they take 2 % of "
        "the time at most; 0: only when the run is interrupted",
    ] = 5.0
    keep_checkpoint: Annotated[
        bool,
        "keep the last checkpoint when the run is complete, two to five times the size of the model, so that resume can extend the run",
    ] = False
    on_epoch: Annotated[
        Callable[[dict[str, Any]], Any] | None,
        "a function that is called after each test, when the run folder is written, with the line of metrics as a dict",
    ] = None
    on_step: Annotated[
        Callable[[dict[str, Any]], Any] | None,
        "a function that is called for each optimizer step with a dict of step and epoch, both from 1, loss and learning_rate",
    ] = None
    tensorboard: Annotated[bool, "write events for TensorBoard into the run folder; this needs minivit[tensorboard]"] = False
    out: Annotated[str | os.PathLike[str] | None, "the run folder; by default runs/<model>-<data>-<number>"] = None
    save: Annotated[bool, "write a run folder; without one, the model is in the result alone"] = True
    overwrite: Annotated[bool, "replace an existing run in that folder"] = False
    progress: Annotated[bool, "show a progress bar on a terminal, or otherwise one line per epoch, on standard error"] = True
    threads: Annotated[int | None, "number of compute threads, by default the number of cores; it does not affect results"] = None
    profile: Annotated[bool, "before training, print the time of a step by op, with lower bounds, on standard error"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minutes is not None and not 0 < self.minutes < inf:
            raise UserError(f"minutes must be above 0 and finite, got {self.minutes}")
        if self.weights is not None and isinstance(self.model, Module):
            raise UserError("give weights or a model that has them, not both")
        if self.minutes is not None and self.epochs is not None:
            raise UserError("give minutes or epochs, not both: minutes decide the epochs")
        if not self.save and (self.out is not None or self.overwrite or self.resume is not None or self.tensorboard):
            raise UserError("save=False writes no run folder: leave out, overwrite, resume and tensorboard out")
        if not 0 <= self.checkpoint_minutes < inf:
            raise UserError(f"checkpoint_minutes must be 0 (off) or above, and finite, got {self.checkpoint_minutes}")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction must be 0 (off) or below 1, got {self.validation_fraction}: 0.1 holds out a tenth")
        if self.test_every is not None and self.test_every < 1:
            raise UserError(f"test_every must be 1 or more, got {self.test_every}")

    @property
    def frozen(self) -> int | str | None:
        """`freeze`, with a number that is given as text as a number."""
        return int(self.freeze) if isinstance(self.freeze, str) and self.freeze.isdecimal() else self.freeze

    def of_recipe(self) -> dict[str, Any]:
        """The values that override those of the recipe: the recipe's fields that are not None."""
        values = {item.name: getattr(self, item.name) for item in fields(Recipe)}
        return {name: value for name, value in values.items() if value is not None and not isinstance(value, Module)}


def repeatable(data: Any) -> str | None:
    """The data as an argument that can be used again: a name, an absolute path, or None for arrays."""
    if isinstance(data, (str, Path)):
        return str(data) if data in KNOWN else str(user_path(data).resolve())
    return None


def help_of_options() -> dict[str, str]:
    """The help text of each option by name."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(TrainOptions, include_extras=True).items()}


def takes_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that adds the fields of TrainOptions to the signature and docstring of `function`; the first two may be positional."""
    texts, hints = help_of_options(), get_type_hints(TrainOptions)
    parameters, lines = [], []
    for position, item in enumerate(fields(TrainOptions)):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if position < 2 else inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(item.name, kind, default=item.default, annotation=hints[item.name]))
        lines.append(fill(f"{item.name}: {texts[item.name]}", 140, subsequent_indent="    "))
    first, _, last = inspect.cleandoc(function.__doc__ or "").rpartition("\n\n")
    function.__doc__ = "\n".join([first, "", *lines, "", last])
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function
