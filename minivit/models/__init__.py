"""The model families. A new family is one file, with `@register` on its class, and an import here."""

from __future__ import annotations

from dataclasses import fields
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

from ..errors import UserError, nearest
from .base import Model
from .cascade.dynamic import DVT, DVTConfig
from .config import Config
from .ff_only import FFOnly, FFOnlyConfig
from .localvit import LocalViT, LocalViTConfig
from .mixer import Mixer, MixerConfig
from .registry import FAMILIES, PRESETS, register
from .vit import ViT, ViTConfig

__all__ = [
    "DVT",
    "Config",
    "DVTConfig",
    "FFOnly",
    "FFOnlyConfig",
    "LocalViT",
    "LocalViTConfig",
    "Mixer",
    "MixerConfig",
    "Model",
    "ViT",
    "ViTConfig",
    "create_model",
    "list_models",
    "register",
]


def list_models(pattern: str = "*") -> list[str]:
    """The names of all presets that match a shell pattern such as "vit_*_224", in alphabetical order."""
    return sorted(name for name in PRESETS if fnmatchcase(name, pattern))


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    in_channels: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """Create a model, in evaluation mode.

    name: a preset (`list_models()`), or a family ("vit", "mixer", "ff_only", "dvt"), which starts from the defaults of its configuration.
    num_classes, image_size, in_channels, options: fields of the configuration (ViTConfig, MixerConfig, ...) to override.
    seed: of the initial weights and of dropout, 0 or more.
    Raises UserError for an unknown name or option, naming the nearest ones, and for inconsistent values.
    """
    family = FAMILIES.get(name) or PRESETS.get(name)
    if family is None:
        raise UserError(f"unknown model {name!r}{nearest(str(name), [*PRESETS, *FAMILIES])}; list_models() names them all")
    option_names = [field.name for field in fields(family.Config)]
    for option in options:
        if option not in option_names:
            raise UserError(f"{name} has no option {option!r}{nearest(option, option_names)}; it has {', '.join(option_names)}")
    for field in fields(family.Config):
        if field.metadata.get("stage_only") and options.get(field.name, field.default) != field.default:
            raise UserError(f"{field.name} is for the stages of a cascade, which sets it: leave it out")
    if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise UserError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}")
    common = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    overrides = options | {field: value for field, value in common.items() if value is not None}
    model = family(family.Config(**(dict(family.presets.get(name, {})) | overrides)), seed)
    model.name = name
    return model
