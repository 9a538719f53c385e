"""The model families. A new family is one file, with `@register` on its class, and an import here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Annotated, Any

from ..errors import UserError, nearest, shown
from ..nn.module import outlines
from ..schema import Limits, checked
from ..sides import Sides
from .base import Model
from .cascade.dynamic import DVT, DVTConfig
from .config import Config
from .crossvit import CrossViT, CrossViTConfig
from .deepvit import DeepViT, DeepViTConfig
from .ff_only import FFOnly, FFOnlyConfig
from .localvit import LocalViT, LocalViTConfig
from .mixer import Mixer, MixerConfig
from .registry import FAMILIES, PRESETS, register
from .t2t import T2T, T2TConfig
from .vit import ViT, ViTConfig

__all__ = [
    "DVT",
    "T2T",
    "Config",
    "CrossViT",
    "CrossViTConfig",
    "DVTConfig",
    "DeepViT",
    "DeepViTConfig",
    "FFOnly",
    "FFOnlyConfig",
    "LocalViT",
    "LocalViTConfig",
    "Mixer",
    "MixerConfig",
    "Model",
    "T2TConfig",
    "ViT",
    "ViTConfig",
    "create_model",
    "list_models",
    "outline",
    "register",
]

MOST_PARAMETERS = 2**14  # arrays of a model: those of a thousand blocks


def list_models(pattern: str = "*") -> list[str]:
    """The names of all presets that match a shell pattern such as "vit_*_224", in alphabetical order."""
    return sorted(name for name in PRESETS if fnmatchcase(name, pattern))


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: Sides | None = None,
    in_channels: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """Create a model, in evaluation mode.

    name: a preset (`list_models()`), or a family ("vit", "mixer", "ff_only", ...), which starts from the defaults of its configuration.
    num_classes, image_size, in_channels, options: fields of the configuration (ViTConfig, MixerConfig, ...) to override. Sizes of images
        and patches are numbers of pixels, or (rows, columns).
    seed: of the initial weights and of dropout, 0 or more.
    Raises UserError for an unknown name or option, naming the nearest ones, for inconsistent values, and for a model larger than the
    memory of this machine.
    """
    seed = checked("seed", seed, Annotated[int, Limits(0, 2**63 - 1)])
    common = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    options |= {field: value for field, value in common.items() if value is not None}
    planned = outline(name, options, MOST_PARAMETERS)
    needed = sum(parameter.data.nbytes for parameter in planned.parameters())
    too_large = f"{name} of this size takes {needed / 2**30:,.1f} GiB for its parameters alone, more memory than there is: make it smaller"
    if needed > _memory():
        raise UserError(too_large)
    try:
        model = type(planned)(planned.config, seed)
    except MemoryError as error:
        raise UserError(too_large) from error
    model.name = name
    return model


def outline(name: str, options: Mapping[str, Any], most: int) -> Model:
    """The model of `create_model(name, **options)` without memory for its parameters (`nn.module.outlines`), which are at most `most`.

    Raises UserError like create_model.
    """
    name = checked("the name of a model", name, str)
    family = FAMILIES.get(name) or PRESETS.get(name)
    if family is None:
        raise UserError(f"unknown model {shown(name)}{nearest(name, [*PRESETS, *FAMILIES])}; list_models() names them all")
    option_names = [field.name for field in fields(family.Config)]
    for option in options:
        if option not in option_names:
            raise UserError(f"{name} has no option {option!r}{nearest(option, option_names)}; it has {', '.join(option_names)}")
    for field in fields(family.Config):
        if field.metadata.get("stage_only") and options.get(field.name, field.default) != field.default:
            raise UserError(f"{field.name} is for the stages of a cascade, which sets it: leave it out")
    config = family.Config(**{**family.presets.get(name, {}), **options})
    with outlines(most):
        model = family(config)
    model.name = name
    return model


def _memory() -> int:
    """The bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
