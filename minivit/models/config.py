"""The configuration of a family: a frozen dataclass, whose fields are checked against their annotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from ..errors import UserError, nearest


@dataclass(frozen=True)
class Config:
    """The base of each family's configuration: the fields every family has, and the check of all fields against their annotations.

    An int is at least 1 (or the `least` of its metadata), a rate at least 0 and below 1, any other float finite and above 0, a Literal one
    of its values. Raises UserError.
    """

    image_size: int = 224  # pixels, both sides
    in_channels: int = 3  # colours
    num_classes: int = 1000  # outputs of the head
    dtype: Literal["float32", "float64"] = "float32"  # of parameters and activations

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            value = _checked(entry.name, getattr(self, entry.name), hints[entry.name], entry.metadata.get("least", 1))
            object.__setattr__(self, entry.name, value)


@dataclass(frozen=True)
class BackboneConfig(Config):
    """The fields of a family that cuts images into patches, and whose blocks can be a stage of a cascade (`models/cascade/dynamic.py`)."""

    patch_size: int = 16  # pixels, both sides; divides image_size where there is no patch_stride
    patch_stride: int | None = None  # pixels from one patch to the next; None: patch_size
    patch_padding: int = field(default=0, metadata={"least": 0})  # pixels of zeros around the image
    extra_channels: int = field(default=0, metadata={"least": 0})  # that a cascade appends to the input of each block's channel MLP

    @classmethod
    def stage_defaults(cls, decided: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of a cascade's stage that follow from those the cascade decides, unless its options say otherwise."""
        return {}


def _checked(name: str, value: Any, hint: Any, least: int) -> Any:
    """`value` as plain int, float, bool, str or None."""
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        if value not in choices:
            raise UserError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}{nearest(str(value), choices)}")
    elif type(None) in choices:
        return None if value is None else _checked(name, value, choices[0], least)
    elif hint is bool:
        if not isinstance(value, (bool, np.bool_)):
            raise UserError(f"{name} must be true or false, not {value!r}")
        return bool(value)
    elif hint is int:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")
        return int(value)
    elif hint is float:
        rate = name.endswith("rate")
        number = isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
        if not number or not (0 <= value < 1 if rate else value > 0):
            raise UserError(f"{name} must be a number {'of at least 0 and below 1' if rate else 'above 0'}, not {value!r}")
        return float(value)
    return value
