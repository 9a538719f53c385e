"""What `train` takes: one dataclass, that its keywords, its docstring, the command line and the check of values come from."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from textwrap import fill
from typing import Annotated, Any, get_type_hints

from ..errors import UserError, nearest
from ..nn.module import Module
from ..optim import SCHEDULES
from .recipes import Recipe


@dataclass(frozen=True)
class TrainOptions:
    """The arguments of `train`. A value that is None follows the recipe of the data (`minivit.training.recipes`). Raises UserError."""

    model: Annotated[str | Module | None, "name of a model; in Python also a Model, which is trained further"] = None
    data: Annotated[
        Any,
        "digits, cifar10, cifar100, a folder of images, an .npz file or an archive; in Python also arrays or a Dataset (`load_data`)",
    ] = "digits"
    epochs: Annotated[int | None, "passes over the training images"] = None
    batch_size: Annotated[int | None, "images of an optimizer step"] = None
    lr: Annotated[float | None, "highest learning rate"] = None
    min_lr: Annotated[float | None, "learning rate at the end of the cosine schedule"] = None
    warmup: Annotated[float | None, "epochs in which the learning rate rises"] = None
    schedule: Annotated[str, "what follows the warmup, cosine or constant"] = "cosine"
    weight_decay: Annotated[float | None, "decoupled weight decay, not of biases, scales and position embeddings"] = None
    clip_norm: Annotated[float | None, "largest norm of the whole gradient; 0 is off"] = None
    label_smoothing: Annotated[float | None, "share of the target that all classes divide"] = None
    augmentation: Annotated[
        str | None,
        "none, flip, crop-flip or affine, by default what the data bears; in Python also a policy of one's own",
    ] = None
    mixup: Annotated[float | None, "alpha of mixup; 0 is off"] = None
    cutmix: Annotated[float | None, "alpha of CutMix; 0 is off"] = None
    drop_path: Annotated[float | None, "stochastic depth of the last block"] = None
    ema: Annotated[float | None, "decay of a running average of the weights, which is then what is tested and kept; 0 is off"] = None
    optimizer: Annotated[str, "adamw or sgd"] = "adamw"
    momentum: Annotated[float, "of sgd, 0 ... below 1"] = 0.9
    accumulate: Annotated[
        int | None,
        "parts that a batch is computed in, one after the other, for less memory; by default as many as cost hardly any time",
    ] = None
    seed: Annotated[
        int,
        "of weights, order, augmentation and dropout; the same seed gives the same run bit for bit on the same machine",
    ] = 0
    precision: Annotated[
        str,
        "of training and of the model's predictions afterwards: float32, bf16x3, bfloat16, float64, or auto, the "
        "fastest here that trains as well as float32",
    ] = "auto"
    device: Annotated[str, "where it is done, cpu or cuda"] = "cpu"
    image_size: Annotated[int | None, "pixels that images are resized to"] = None
    in_channels: Annotated[int | None, "1 for gray, 3 for RGB"] = None
    test_fraction: Annotated[float, "share of each class that is kept for testing, where the data has no split"] = 0.2
    split_seed: Annotated[int, "of that split"] = 0
    skip_bad_images: Annotated[bool, "leave out images that cannot be read, and name them"] = False
    limit: Annotated[int | None, "use at most so many training and so many test images, spread evenly"] = None
    model_options: Annotated[Mapping[str, Any] | None, "further options of the model, such as depth or pool"] = None
    out: Annotated[str | os.PathLike[str] | None, "the run folder; by default runs/<model>-<data>-<number>"] = None
    overwrite: Annotated[bool, "replace the run that is in that folder"] = False
    progress: Annotated[bool, "show a progress bar on a terminal, and a line an epoch elsewhere, on standard error"] = True
    threads: Annotated[int | None, "how many compute, by default as many as there are cores; the run is the same bit for bit"] = None
    profile: Annotated[bool, "before training, print on standard error what a step's time goes to, by op, with floors"] = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"unknown schedule {self.schedule!r}{nearest(self.schedule, SCHEDULES)}: choose {', '.join(SCHEDULES)}")

    def of_recipe(self) -> dict[str, Any]:
        """The values that take the place of the recipe's own: those of its fields that are not None."""
        values = {each.name: getattr(self, each.name) for each in fields(Recipe)}
        return {name: value for name, value in values.items() if value is not None and not isinstance(value, Module)}


def help_of_options() -> dict[str, str]:
    """What users are told of each option, by its name."""
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(TrainOptions, include_extras=True).items()}


def takes_options(function: Callable) -> Callable:
    """Decorator: the signature and the docstring of `function` name the fields of TrainOptions, the first two of them by position too."""
    told, hints = help_of_options(), get_type_hints(TrainOptions)
    parameters, lines = [], []
    for number, each in enumerate(fields(TrainOptions)):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if number < 2 else inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(each.name, kind, default=each.default, annotation=hints[each.name]))
        lines.append(fill(f"{each.name}: {told[each.name]}", 140, subsequent_indent="    "))
    first, _, last = inspect.cleandoc(function.__doc__ or "").rpartition("\n\n")
    function.__doc__ = "\n".join([first, "", *lines, "", last])
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function
