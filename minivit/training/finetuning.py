"""Fine-tuning: the weights that a training begins with, and layers that do not learn."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data import Batches, Dataset
from ..errors import UserError, shown
from ..files import user_path
from ..grad_mode import no_grad
from ..io import hugging_face
from ..io.model_file import load_model
from ..io.run_folder import find_model
from ..io.weights import load_weights, read_safetensors
from ..models import FAMILIES, PRESETS, Model
from ..nn.module import Module, evaluating
from ..progress import say
from ..tensor import Tensor

BACKBONE = "backbone"
OF_DATA = ("num_classes", "image_size", "in_channels", "dtype")  # fields of a configuration that the new training decides


class Origin(NamedTuple):
    """The weights that a training begins with.

    file: where they are. name, options: the model that they are of, as for `create_model`; None for a file that does not say.
    image_size: that of this model. class_names: what its head tells apart.
    """

    file: Path
    name: str | None = None
    options: dict[str, Any] | None = None
    image_size: Any = None
    class_names: tuple[str, ...] = ()


def find_origin(weights: str | os.PathLike[str] | None) -> Origin | None:
    """What there is to know of weights: of a run folder, its name in runs/, a file of minivit's, a folder of transformers, or a file of
    others. Raises UserError."""
    if weights is None:
        return None
    path = user_path(weights)
    if path.suffix == ".npz" and path.is_file():
        return Origin(path)
    if hugging_face.is_folder(path):
        config, class_names = hugging_face.describe(path)
        return Origin(path, "vit", _without_data(config), config["image_size"], class_names)
    file = find_model(path)
    if "model" not in read_safetensors(file)[1]:
        return Origin(file)
    model, about = load_model(file)
    name = model.name if model.name in PRESETS or model.name in FAMILIES else model.family
    return Origin(file, name, _without_data(asdict(model.config)), model.config.image_size, tuple(about.get("class_names", ())))


def _without_data(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in OF_DATA}


def begin_with(model: Model, origin: Origin, dataset: Dataset, progress: bool) -> None:
    """Load the weights into a model for the dataset; its head stays new if the weights' head is for other classes. Raises UserError."""
    same_classes = origin.class_names == tuple(dataset.class_names)
    for line in load_weights(model, origin.file, head=same_classes):
        say(line, progress)
    say(f"weights of {origin.file}{'' if same_classes else f', and a new head for {dataset.num_classes} classes'}", progress)


def freeze(model: Model, what: int | str | None) -> Callable[[], None]:
    """Keep weights as they are: those of the backbone, which is all but the head, or what comes before the blocks and the first n blocks.

    What is frozen is in evaluation mode: without dropout, and with the statistics that it has. The result undoes it. Raises UserError.
    """
    if what is None:
        return lambda: None
    if what == BACKBONE:
        chosen = {id(p) for name, p in model.named_parameters() if "head" not in name.split(".")[:-1]}
    elif isinstance(what, int):
        layers = model.layer_numbers()
        blocks = max((layer + after for layer, after in layers.values()), default=1) - 1
        if not 0 <= what <= blocks:
            raise UserError(f"freeze={what}: {model.name} has {blocks} blocks; {BACKBONE} freezes all but the head")
        chosen = {key for key, (layer, _) in layers.items() if layer <= what}
    else:
        raise UserError(f"freeze must be {BACKBONE} or a number of blocks, not {shown(what)}")
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) in chosen]
    owners = [m for m in model.modules() if (own := m.parameters()) and all(id(p) in chosen for p in own)]
    modules = [module for owner in owners for module in owner.modules() if not module.frozen]

    def set_frozen(frozen: bool) -> None:
        for parameter in parameters:
            parameter.requires_grad = not frozen
        for module in modules:
            module.frozen = frozen

    set_frozen(True)
    return lambda: set_frozen(False)


def frozen_names(model: Model) -> tuple[str, ...]:
    """The names of the parameters that are not trained, and of the modules that stay in evaluation mode."""
    parameters = (name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return (*parameters, *(name for name, module in model.named_modules() if module.frozen))


def freeze_names(model: Model, names: Collection[str]) -> None:
    """Let just these parameters and modules be frozen, as `frozen_names` tells them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name not in names
    for name, module in model.named_modules():
        module.frozen = name in names


class HeadAlone(Module):
    """The head of a model, on its features (B, dim, 1, 1) in place of images."""

    no_muon = ("head",)
    separable = True

    def __init__(self, model: Model) -> None:
        self.head, self.head_drop = model.head, model.head_drop

    def forward(self, features: Any) -> Tensor:
        return self.head(self.head_drop(Tensor(features).reshape(*features.shape[:2])), precise=True)


def learns_from_features(model: Model, batches: Batches) -> bool:
    """Whether an image's input of the head is the same in all epochs, so that it needs to be computed once."""
    changing = batches.policy or batches.mixup or batches.cutmix
    heads = isinstance(model.head, Module) and model.num_exits == 1
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    return not changing and heads and all(name.startswith("head.") for name in learning)


def features_of(model: Model, batches: Iterable[Any]) -> np.ndarray:
    """The inputs of the head, (n, 1, 1, dim) float32, for batches of images."""
    with evaluating(model), no_grad():
        found = [model.features(images).numpy() for images in batches]
    return np.concatenate(found).astype(np.float32)[:, None, None, :]
