"""Models in the folders of Hugging Face's transformers: ViT and DeiT for image classification.

config.json                 the sizes of the model, and its classes
preprocessor_config.json    how images become its input
model.safetensors           the weights; several files with model.safetensors.index.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import UserError, shown
from ..files import open_regular, user_path
from ..models import Model
from ..models.config import ratio_of
from ..models.names import from_hugging_face
from ..schema import Checked, Limits, Positive, Size, checked, parse_json, record
from ..sides import ImageSize, PatchSize
from .model_file import reading
from .run_folder import CONFIG
from .weights import model_of, read_shards

PREPROCESSOR = "preprocessor_config.json"
LARGEST_TEXT = 2**24  # bytes
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python": "gelu"}
REMEDY = "get it again"


@dataclass(frozen=True)
class Architecture(Checked):
    """What config.json says of the model; the defaults are those of transformers, which may leave them out."""

    model_type: Literal["vit", "deit"]
    hidden_size: Size = 768
    num_hidden_layers: Size = 12
    num_attention_heads: Size = 12
    intermediate_size: Size = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: Positive = 1e-12
    image_size: ImageSize = 224
    patch_size: PatchSize = 16
    num_channels: Size = 3
    qkv_bias: bool = True
    id2label: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Processor(Checked):
    """What preprocessor_config.json says of images."""

    image_mean: tuple[Annotated[float, Limits(-1000, 1000)], ...] = (0.5, 0.5, 0.5)
    image_std: tuple[Annotated[float, Limits(1e-6, 1000)], ...] = (0.5, 0.5, 0.5)
    do_normalize: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_center_crop: bool = False


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of transformers: its config.json names a type of model."""
    try:
        return (path / CONFIG).is_file() and "model_type" in _content(path / CONFIG)
    except (OSError, ValueError):
        return False


def load_folder(path: Path) -> tuple[Model, tuple[str, ...], dict[str, Any]]:
    """(model in evaluation mode, class names, the fields of its preprocessing). Raises UserError for what is damaged or not supported."""
    architecture = _architecture(path)
    preprocessing = _preprocessing(path, architecture)
    state = from_hugging_face(read_shards(path))
    if "head.weight" not in state:
        raise UserError(f"{path} has no classifier: create the model with create_model('vit', ...), and use load_weights(..., head=False)")
    with reading(path, REMEDY):
        model = model_of("vit", _config(architecture, state), state)
    return model, _class_names(architecture, model.config.num_classes), preprocessing


def describe(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the fields of the ViTConfig, class names) of a folder, also of one without a classifier, which has no class names then.

    Raises UserError for what is damaged or not supported.
    """
    architecture, state = _architecture(path), from_hugging_face(read_shards(path))
    with reading(path, REMEDY):
        config = _config(architecture, state)
    return config, _class_names(architecture, config["num_classes"]) if "head.weight" in state else ()


def _architecture(path: Path) -> Architecture:
    with reading(path / CONFIG, REMEDY):
        content = _content(path / CONFIG)
        if content.get("model_type") not in ("vit", "deit"):
            kind = shown(content.get("model_type"))
            raise UserError(f"model_type is {kind}, and minivit reads 'vit' and 'deit'")
        architecture = record(Architecture, content)
        if architecture.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act is {shown(architecture.hidden_act)}, and minivit has {', '.join(ACTIVATIONS)}")
    return architecture


def _content(path: Path) -> Mapping[str, Any]:
    with open_regular(user_path(path)) as file:
        return checked("its content", parse_json(file.read(LARGEST_TEXT).decode(), "its text"), Mapping[str, Any])


def _config(architecture: Architecture, state: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ViTConfig."""
    return dict(
        image_size=architecture.image_size,
        patch_size=architecture.patch_size,
        in_channels=architecture.num_channels,
        num_classes=len(state.get("head.weight", ())) or 1,
        dim=architecture.hidden_size,
        depth=architecture.num_hidden_layers,
        heads=architecture.num_attention_heads,
        mlp_ratio=ratio_of(architecture.intermediate_size, architecture.hidden_size),
        qkv_bias=architecture.qkv_bias,
        activation=ACTIVATIONS[architecture.hidden_act],
        eps=architecture.layer_norm_eps,
        distillation="head" if "head_dist.weight" in state else "token" if "dist_token" in state else "none",
    )


def _preprocessing(path: Path, architecture: Architecture) -> dict[str, Any]:
    """The fields of a `Preprocessing`. transformers resizes to the model's size without proportions, or crops after resizing."""
    if not (path / PREPROCESSOR).is_file():
        raise UserError(f"{path} has no {PREPROCESSOR}, which says how images are normalised: get it, or use create_model and load_weights")
    with reading(path / PREPROCESSOR, REMEDY):
        processor = record(Processor, _content(path / PREPROCESSOR))
        if not processor.do_rescale or abs(255 * processor.rescale_factor - 1) > 1e-3:
            raise UserError("pixels are not divided by 255, which minivit always does")
        channels = architecture.num_channels
        plain = (0.0,) * channels, (1.0,) * channels
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else plain
        found = {"image_size": architecture.image_size, "in_channels": channels, "mean": mean[:channels], "std": std[:channels]}
    return found | {"fit": "crop" if processor.do_center_crop else "stretch"}


def _class_names(architecture: Architecture, classes: int) -> tuple[str, ...]:
    """The names by number; numbers alone where they are missing or not for all classes."""
    names = architecture.id2label or {}
    return tuple(names.get(str(i), str(i)) for i in range(classes))
