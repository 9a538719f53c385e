"""`export`: a trained model for other programs, as ONNX, or as weights for timm."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, shown
from ..files import atomic_file, user_path, writing
from ..io.weights import description_of, save_weights
from ..kernels.core.devices import address_of
from ..models.base import Model
from ..nn.module import Module, evaluating
from ..tensor import Tensor
from ..version import __version__
from .classifier import Classifier

PRECISIONS = ("float32", "int8")
LARGEST_FILE = 2**31 - 2**24  # bytes of weights, above which ONNX wants them in a file of their own
TIMM_EPS = 1e-6  # of timm's normalisations by default
BATCHES = 2, 3  # two sizes, whose comparison tells which lengths belong to the batch


def export(model: Module, path: str | os.PathLike[str], *, preprocessing: bool = False, precision: str | None = None) -> tuple[Path, ...]:
    """Write a model for other programs. Returns the paths of the files, one for each exit of a cascade.

    model: of `load`, `train(...).model` or `create_model`. path: its ending decides the format.

    `.onnx`: ONNX (opset 17), for batches of any size. The input "images" is float32 (B, C, H, W), normalised as in training; with
    preprocessing, for which the model must be a Classifier, it is uint8 (B, H, W, C), of the model's size. The output "logits" is float32
    (B, classes). The metadata of a file holds the model's configuration, and of a Classifier class names and preprocessing, as JSON.
    precision: "int8" stores the weights of all products but the head's in 8 bits, for files of about a quarter of the size, which compute
    in float32; None: "int8" for a Classifier that predicts in it, otherwise "float32".
    The file of exit k of a cascade ends with _exit<k>.onnx. Beside "logits" its outputs are the inputs of the next one, by name, and the
    thresholds are in the metadata ("calibration").

    `.safetensors`: the weights by timm's names, for a ViT, Mixer or CrossViT. Its metadata has under "timm" the call in Python that
    makes timm's model, whose load_state_dict takes them.

    Raises UserError if the package onnx is missing, for a model that the format has no form for, and if a file cannot be written.
    """
    path = user_path(path)
    classifier = model if isinstance(model, Classifier) else None
    backbone = model.unwrapped()
    if not isinstance(backbone, Model):
        raise UserError(f"export takes a model of minivit, as load() and create_model() return, not {type(backbone).__name__}")
    if path.suffix == ".safetensors":
        if preprocessing or precision is not None:
            raise UserError("preprocessing and precision are options of .onnx files: leave them out for .safetensors")
        return (_export_weights(backbone, classifier, path),)
    if path.suffix != ".onnx":
        raise UserError(f"models are exported as .onnx or .safetensors: {path} has another ending")
    try:
        from ..io import onnx_ops
    except ImportError as error:
        raise UserError(f"ONNX files are written by the package onnx, which is missing ({error}): pip install onnx") from None
    if preprocessing and classifier is None:
        raise UserError("preprocessing=True needs to know how images are normalised: give a model of load() or train()")
    precision = precision or ("int8" if classifier and classifier.precision == "int8" else "float32")
    if precision not in PRECISIONS:
        raise UserError(f"precision={shown(precision)}: ONNX files are written in {' or '.join(PRECISIONS)}")
    copy = deepcopy(backbone).to("cpu")
    assert isinstance(copy, Model)
    names = {address_of(parameter.data): name for name, parameter in copy.named_parameters()}
    about = {"minivit": __version__, "model": description_of(copy), **_about(classifier), **copy.metadata()}
    paths = []
    with evaluating(copy):
        for k, (first, second) in enumerate(_stages(copy), 1):
            graph = onnx_ops.Graph(first, second, names, precision == "int8")
            if preprocessing and classifier:
                graph.take_pixels("images", classifier.preprocessing.mean, classifier.preprocessing.std)
            onnx_ops.translate(graph)
            several = copy.num_exits > 1
            paths.append(path.with_name(f"{path.stem}_exit{k}.onnx") if several else path)
            _write(graph.model(about | ({"exit": f"{k} of {copy.num_exits}"} if several else {})), paths[-1])
    return tuple(paths)


def timm_call(model: Model) -> str:
    """The call in Python that makes timm's form of a model. Raises UserError if timm has no such model."""
    function, arguments = model.timm_arguments()
    eps = arguments.pop("eps")
    texts = [f"{key}={value!r}" for key, value in arguments.items()]
    if eps != TIMM_EPS:
        texts.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps!r})")
    return f"{function}({', '.join(texts)})"


def _export_weights(model: Model, classifier: Classifier | None, path: Path) -> Path:
    about = {"timm": json.dumps(timm_call(model)), "format": "pt"}  # "pt" is what readers of PyTorch's weights look for
    save_weights(model, path, about | _about(classifier))
    return path


def _about(classifier: Classifier | None) -> dict[str, str]:
    """What a file says of classes and images."""
    if classifier is None:
        return {}
    names, preprocessing = classifier.class_names, asdict(classifier.preprocessing)
    return {"class_names": json.dumps(names, ensure_ascii=False), "preprocessing": json.dumps(preprocessing)}


def _stages(model: Model) -> Iterator[tuple[Any, Any]]:
    """For each exit the walks through its stage for two batches."""
    from ..io.onnx_graph import walk

    states: list[dict[str, np.ndarray]] = [{}, {}]
    present: list[str | None] = []
    for k in range(model.num_exits):
        given = present

        def stage(images: Tensor, k: int = k, given: list[str | None] = given, **state: Tensor) -> dict[str, Tensor]:
            nonlocal present
            logits, following = model.stage(k, images, tuple(None if name is None else state[name] for name in given))
            present = [None if tensor is None else f"state{k + 1}_{i}" for i, tensor in enumerate(following)]
            return {"logits": logits} | {name: tensor for name, tensor in zip(present, following) if name is not None}

        walks = []
        for i, size in enumerate(BATCHES):
            images = np.zeros((size, *model.config.image_shape), model.config.dtype)
            walks.append(walk(stage, {"images": images} | states[i]))
            states[i] = {name: array for name, array in walks[-1].results.items() if name != "logits"}
        yield walks[0], walks[1]


def _write(model: Any, path: Path) -> None:
    """Write a file, and its weights into one beside it, of the same name with .data after it, where ONNX cannot hold them."""
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data, write_external_data_tensors

    with writing(path):
        if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST_FILE:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.with_name(f"{path.name}.data")
            data.unlink(missing_ok=True)
            convert_model_to_external_data(model, location=data.name, size_threshold=1024)
            model = write_external_data_tensors(model, str(path.parent))
        with atomic_file(path) as file:
            onnx.save_model(model, file)
