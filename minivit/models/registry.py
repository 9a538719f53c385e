"""The registry of families and presets by name."""

from __future__ import annotations

from typing import TypeVar

from .base import Model

FAMILIES: dict[str, type[Model]] = {}
PRESETS: dict[str, type[Model]] = {}  # name of a preset -> its family

M = TypeVar("M", bound=type[Model])


def register(model: M) -> M:
    """Class decorator that makes a family and its presets available to `create_model`. Raises ValueError for a name in use."""
    for name in (model.family, *model.presets):
        if name in FAMILIES or name in PRESETS:
            raise ValueError(f"there is a model named {name!r} already")
    FAMILIES[model.family] = model
    PRESETS.update(dict.fromkeys(model.presets, model))
    return model
