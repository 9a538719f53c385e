"""Values held against annotations: what is accepted, and the line for what is not."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from minivit import UserError
from minivit.schema import LONGEST_LIST, Checked, Limits, Positive, Rate, Size, checked, parse_json, record


@dataclass(frozen=True)
class Inner(Checked):
    mean: tuple[float, ...]
    size: Size = 3


@dataclass(frozen=True)
class Outer(Checked):
    inner: Inner
    name: str
    extra: Mapping[str, Any] | None = None


@pytest.mark.parametrize(
    "value, hint, expected",
    [
        (np.int64(3), int, 3),
        (np.float32(0.5), float, 0.5),
        (2, float, 2.0),
        (np.True_, bool, True),
        (None, Size | None, None),
        (4, Size | None, 4),
        ([[1, 2], [3, 4]], Sequence[tuple[int, int]], ((1, 2), (3, 4))),
        ([1, 2], Size | Sequence[Size], (1, 2)),
        (1, Size | Sequence[Size], 1),
        ("b", Literal["a", "b"], "b"),
        ({"a": 1}, Mapping[str, float], {"a": 1.0}),
        ({"mean": [1]}, Inner, Inner((1.0,), 3)),
        (Path("x"), str | os.PathLike[str] | None, Path("x")),
        (object, Any, object),
    ],
)
def test_values_that_fit(value, hint, expected):
    found = checked("it", value, hint)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "value, hint, message",
    [
        (2.5, int, "it must be a whole number, not 2.5"),
        (True, int, "it must be a whole number, not True"),
        ("3", float, "it must be a number, not '3'"),
        (float("nan"), float, "it must be a number, not nan"),
        (float("inf"), float, "it must be a number, not inf"),
        (10**400, float, "it must be a number, not 1000"),
        (0, Size, "it must be a whole number of at least 1, not 0"),
        (2**21, Size, "it must be a whole number of at most 1,048,576, not 2097152"),
        pytest.param(10**5000, Size, "it must be a whole number of at most 1,048,576, not a number of more than 4096 digits", id="digits"),
        (0.0, Positive, "it must be a number above 0, not 0.0"),
        (1, Rate, "it must be a number of at least 0 and below 1, not 1"),
        (1, bool, "it must be true or false, not 1"),
        (b"a", str, "it must be text, not b'a'"),
        ("\ud800", str, r"it must be text, not '\\ud800'"),
        ("abc", Annotated[str, Limits(most=2)], "it must be text of at most 2 characters, not 'abc'"),
        ("c", Literal["abc", "b"], r"it must be 'abc' or 'b', not 'c'"),
        ([], Literal["a", "b"], r"it must be 'a' or 'b', not \[\]"),
        ("ab", Sequence[str], "it must be a list, not 'ab'"),
        ([1, "x"], tuple[int, ...], r"it\[1\] must be a whole number, not 'x'"),
        ([1, 0], Size | Sequence[Size], r"it\[1\] must be a whole number of at least 1, not 0"),
        ("x", Size | Sequence[Size], "it must be a whole number of at least 1, not 'x'"),
        ([1], tuple[int, int], r"it must hold 2 values, not 1: \[1\]"),
        ([0] * (LONGEST_LIST + 1), tuple[int, ...], "it must hold at most 65,536 values, not 65,537"),
        ([0] * 9, Annotated[Sequence[int], Limits(most=8)], "it must hold at most 8 values, not 9"),
        ([], Mapping[str, int], r"it must be a mapping of names to values, not \[\]"),
        ({1: 2}, Mapping[str, int], "it must be a mapping of names to values"),
        ({"a": "b"}, Mapping[str, int], "it.a must be a whole number, not 'b'"),
        ({}, Inner, "it.mean is missing"),
        ({"mean": [1, None]}, Inner, r"it.mean\[1\] must be a number, not None"),
        (3, os.PathLike[str], "it must be a PathLike, not 3"),
    ],
)
def test_values_that_do_not(value, hint, message):
    with pytest.raises(UserError, match=f"^{message}"):
        checked("it", value, hint)


def test_a_record_ignores_what_it_does_not_know_and_names_what_is_wrong_inside():
    content = {"inner": {"mean": [1], "size": 2, "more": 1}, "name": "n", "other": []}
    assert record(Outer, content) == Outer(Inner((1.0,), 2), "n", None)
    with pytest.raises(UserError, match=r"^inner\.size must be a whole number of at least 1, not 0$"):
        record(Outer, content | {"inner": {"mean": [], "size": 0}})
    with pytest.raises(UserError, match=r"^line 3\.name is missing$"):
        record(Outer, {"inner": content["inner"]}, "line 3")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "Expecting property name"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("9" * 5000, "a number of 5000 digits"),
        ("[" * 100_000, "its brackets are nested too deeply"),
        ('{"a":' * 100_000, "its brackets are nested too deeply"),
    ],
)
def test_text_that_is_no_json(text, reason):
    with pytest.raises(UserError, match=f"^config is no JSON: {reason}"):
        parse_json(text, "config")


def test_json_comes_back():
    assert parse_json('{"a": [1, 2.5, null, "ü"]}', "it") == {"a": [1, 2.5, None, "ü"]}
