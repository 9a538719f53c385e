"""Values from outside, held against type annotations: the one check of configurations, of options and of what files say.

An annotation is bool, int, float, str, a Literal of texts, Any, `X | None` or another union, Sequence[X], tuple[X, ...] or tuple[X, Y],
Mapping[str, X], a dataclass, which is read from a mapping, or any other class, which accepts its instances. The range of a number, or
the largest length of a text or a sequence, is part of its annotation, `Annotated[int, Limits(least=1)]`; so is a function that brings a
value that holds into its final form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from math import inf
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from .errors import UserError, nearest, shown

LARGEST = 2**20  # of the sizes and factors of a model
LONGEST_LIST = 2**16  # values
DIGITS = 400  # of a number in JSON: more than those of the largest float

R = TypeVar("R")


@dataclass(frozen=True)
class Limits:
    """The range of a number. least, most: the smallest and the largest one. above, below: bounds that are excluded themselves. Of a text
    or a list, `most` is the largest length."""

    least: float = -inf
    most: float = inf
    above: float = -inf
    below: float = inf

    def __contains__(self, number: Any) -> bool:
        return bool(self.least <= number <= self.most and self.above < number < self.below)  # not NaN, not infinite

    def describe(self, value: Any) -> str:
        """The range as text, " of at least 0 and below 1"; for a number that is too large, its end."""
        if isinstance(value, (int, float)) and value > self.most:
            return f" of at most {self.most:,}"
        bounds = {"of at least": self.least, "above": self.above, "below": self.below}
        parts = [f"{words} {bound}" for words, bound in bounds.items() if abs(bound) < inf]
        return " " * bool(parts) + " and ".join(parts)


Size = Annotated[int, Limits(1, LARGEST)]  # how many there are of something
Count = Annotated[int, Limits(0, LARGEST)]  # the same, and there may be none
Positive = Annotated[float, Limits(above=0, most=LARGEST)]
Rate = Annotated[float, Limits(least=0, below=1)]
Fraction = Annotated[float, Limits(0, 1)]


@dataclass(frozen=True)
class Checked:
    """Base class of dataclasses whose fields are held against their annotations. Raises UserError."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, name, checked(name, getattr(self, name), hint))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {item.name: hints[item.name] for item in fields(kind)}


def checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as the plain Python value that the annotation `hint` describes: NumPy's numbers become Python's, and lists tuples.

    Raises UserError, which calls the value `name`, and its parts name[0], name.key.
    """
    hint, limits, finish = _parts(hint)
    found = _checked(name, value, hint, limits)
    return found if finish is None else finish(found)


def _checked(name: str, value: Any, hint: Any, limits: Limits) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and NoneType in arguments):
        return value
    if origin in (Union, UnionType):
        return _one_of(name, value, [each for each in arguments if each is not NoneType])
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            hint = nearest(value, arguments) if isinstance(value, str) else ""
            raise UserError(f"{name} must be {' or '.join(map(repr, arguments))}, not {shown(value)}{hint}")
        return str(value)
    if hint in (int, float):
        return _number(name, value, hint, limits)
    if hint is bool:
        return bool(value) if isinstance(value, (bool, np.bool_)) else _reject(name, value, "true or false")
    if hint is str:
        if not isinstance(value, str) or not _is_text(value):
            _reject(name, value, "text")
        return str(value) if len(value) <= limits.most else _reject(name, value, f"text of at most {limits.most} characters")
    kind: Any = origin or hint
    if issubclass(kind, Sequence):
        return _sequence(name, value, arguments, limits)
    if issubclass(kind, Mapping):
        _mapping(name, value)
        return {key: checked(f"{name}.{key}", item, arguments[1]) for key, item in value.items()}
    if isinstance(value, kind):
        return value
    return record(kind, value, name) if isinstance(kind, type) and is_dataclass(kind) else _reject(name, value, f"a {kind.__name__}")


@cache
def _parts(hint: Any) -> tuple[Any, Limits, Callable[[Any], Any] | None]:
    """(the annotation alone, its limits, and its function for the final form)."""
    if get_origin(hint) is not Annotated:
        return hint, Limits(), None
    limits = next((each for each in hint.__metadata__ if isinstance(each, Limits)), Limits())
    return get_args(hint)[0], limits, next((each for each in hint.__metadata__ if callable(each)), None)


def _reject(name: str, value: Any, wanted: str) -> NoReturn:
    raise UserError(f"{name} must be {wanted}, not {shown(value)}")


def _number(name: str, value: Any, kind: type, limits: Limits) -> Any:
    if isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool) and value in limits:
        try:
            return kind(value)
        except OverflowError:  # a whole number that no float can hold
            pass
    return _reject(name, value, f"a {'whole ' * (kind is int)}number{limits.describe(value)}")


def _is_text(value: str) -> bool:
    """Whether files can hold it: halves of surrogate pairs alone cannot be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_of(name: str, value: Any, hints: Sequence[Any]) -> Any:
    problems = []
    for hint in hints:
        try:
            return checked(name, value, hint)
        except UserError as error:
            problems.append(error)
    raise problems[-1 if isinstance(value, (list, tuple)) else 0]  # a sequence is the last of several


def _sequence(name: str, value: Any, hints: tuple[Any, ...], limits: Limits) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        _reject(name, value, "a list")
    if len(value) > min(limits.most, LONGEST_LIST):
        raise UserError(f"{name} must hold at most {min(limits.most, LONGEST_LIST):,} values, not {len(value):,}")
    if len(hints) == 1 or hints[-1] is ...:
        hints = (hints[0],) * len(value)
    if len(value) != len(hints):
        raise UserError(f"{name} must hold {len(hints)} values, not {len(value)}: {shown(value)}")
    return tuple(checked(f"{name}[{i}]", item, hint) for i, (item, hint) in enumerate(zip(value, hints)))


def _mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        _reject(name or "the content", value, "a mapping of names to values")


def record(kind: type[R], content: Any, name: str = "") -> R:
    """A dataclass from a mapping, such as an object of JSON; keys that it does not have are ignored.

    Raises UserError for a field that is missing or wrong; `name` is put before the field's name.
    """
    _mapping(name, content)
    prefix = f"{name}." * bool(name)
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name not in content and item.default is item.default_factory is MISSING:
            raise UserError(f"{prefix}{item.name} is missing")
    hints = _hints(kind)  # type: ignore[arg-type]
    return kind(**{key: checked(prefix + key, content[key], hint) for key, hint in hints.items() if key in content})


def parse_json(text: str, name: str) -> Any:
    """The value of JSON text. Raises UserError, which calls the text `name`; also for NaN and Infinity, for numbers of many digits, and for
    brackets in brackets that are too deep to read."""
    try:
        return json.loads(text, parse_constant=_no_number, parse_int=_whole_number)
    except RecursionError:
        reason = "its brackets are nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{name} is no JSON: {reason}")


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
