"""The configuration of a model family: a frozen dataclass whose fields are validated against their annotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np

from ..errors import UserError, nearest


@dataclass(frozen=True)
class Config:
    """Base class of the configurations: the fields common to all families, and the validation of all fields against their annotations.

    An int must be at least 1 (or the value of "least" in its metadata), a rate at least 0 and below 1, any other float finite and above 0,
    a Literal one of its values. Raises UserError.
    """

    image_size: int = 224  # pixels, both sides
    in_channels: int = 3  # colours
    num_classes: int = 1000  # output size of the head
    dtype: Literal["float32", "float64"] = "float32"  # of parameters and activations

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = _checked(item.name, getattr(self, item.name), hints[item.name], item.metadata.get("least", 1))
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True)
class StageConfig(Config):
    """Configuration of a family that can be a stage of a cascade (`models/cascade/dynamic.py`)."""

    # Fields that the cascade's options may set although its patches decide them too: `patch_fields` receives these options.
    patch_options: ClassVar[tuple[str, ...]] = ()

    # Channels that a cascade appends to the input of each channel MLP.
    extra_channels: int = field(default=0, metadata={"least": 0, "stage_only": True})

    @classmethod
    def stage_defaults(cls, decided: Mapping[str, Any]) -> dict[str, Any]:
        """Default fields of a cascade stage, derived from the fields set by the cascade; the cascade's options override them."""
        return {}

    @classmethod
    def patch_fields(cls, patch: tuple[int, int, int], options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a stage with this patch (size, stride, padding). options: those of the cascade."""
        raise NotImplementedError


@dataclass(frozen=True)
class BackboneConfig(StageConfig):
    """Configuration of a family that splits images into patches once."""

    patch_size: int = 16  # pixels, both sides; must divide image_size if patch_stride is None
    patch_stride: int | None = None  # pixels from one patch to the next; None: patch_size
    patch_padding: int = field(default=0, metadata={"least": 0})  # pixels of zeros around the image

    @classmethod
    def patch_fields(cls, patch: tuple[int, int, int], options: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(("patch_size", "patch_stride", "patch_padding"), patch))


def checked_patches(name: str, value: Any, each: str) -> tuple[tuple[int, int, int], ...]:
    """The field's value as tuples (size, stride, padding), one for each `each`. Raises UserError if it is anything else."""
    rows = [tuple(row) if isinstance(row, (list, tuple)) else row for row in value] if isinstance(value, (list, tuple)) else []
    valid = rows and all(isinstance(r, tuple) and len(r) == 3 and all(isinstance(n, Integral) for n in r) for r in rows)
    if not valid or any(size < 1 or stride < 1 or padding < 0 for size, stride, padding in rows):
        raise UserError(f"{name} must hold (size, stride, padding) in pixels for each {each}, as ((8, 8, 0), (4, 4, 0)), not {value!r}")
    return tuple((int(size), int(stride), int(padding)) for size, stride, padding in rows)


def _checked(name: str, value: Any, hint: Any, minimum: int) -> Any:
    """`value` as a plain int, float, bool, str or None. Raises UserError if it does not match the annotation `hint`."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in choices:
            raise UserError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}{nearest(str(value), choices)}")
    elif type(None) in choices:
        return None if value is None else _checked(name, value, choices[0], minimum)
    elif get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(choices):
            raise UserError(f"{name} must hold {len(choices)} values, not {value!r}")
        return tuple(_checked(name, each, choice, minimum) for each, choice in zip(value, choices))
    elif hint is bool:
        if not isinstance(value, (bool, np.bool_)):
            raise UserError(f"{name} must be true or false, not {value!r}")
        return bool(value)
    elif hint is int:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
            raise UserError(f"{name} must be a whole number of at least {minimum}, not {value!r}")
        return int(value)
    elif hint is float:
        is_rate = name.endswith("rate")
        is_number = isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
        if not is_number or not (0 <= value < 1 if is_rate else value > 0):
            raise UserError(f"{name} must be a number {'of at least 0 and below 1' if is_rate else 'above 0'}, not {value!r}")
        return float(value)
    return value
