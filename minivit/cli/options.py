"""Options common to several commands, and the data that they specify."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..data import Dataset
from ..data.image_file import MAX_PIXELS
from ..errors import UserError
from ..inference.classifier import Classifier
from ..inference.run_data import data_of_run
from ..runtime.precision import OF_PREDICTIONS
from ..schema import parse_json


def add_fields(parser: argparse.ArgumentParser, kind: Any, left_out: Collection[str] = ()) -> None:
    """Add an option for each field of a dataclass whose annotations begin with their help. What is not given is not in the result."""
    hints = get_type_hints(kind, include_extras=True)
    for item in fields(kind):
        if item.name in left_out:
            continue
        flag, (hint, text) = "--" + item.name.replace("_", "-"), get_args(hints[item.name])[:2]
        text, simplest = text.replace("%", "%%"), _simplest(hint)
        if simplest is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            default = "" if item.default is None else f" (default: {item.default})"
            parser.add_argument(flag, type=simplest, default=argparse.SUPPRESS, metavar=simplest.__name__.upper(), help=text + default)


def _simplest(hint: Any) -> Any:
    """What converts a command-line argument: `size`, or the first of the types bool, int, float and str that the annotation allows;
    of a number or a name, str."""
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)  # Python 3.10 adds a Union for a default of None
    if tuple[int, int] in allowed:
        return size
    if {int, str} <= set(allowed):
        return str
    return next((t for t in (bool, int, float) if t in allowed), str)


def size(text: str) -> int | tuple[int, int]:
    """64 from "64", and (64, 96) from "64x96". Raises ValueError."""
    numbers = [int(number) for number in text.split("x")]
    if len(numbers) > 2:
        raise ValueError(text)
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add --device and --precision."""
    parser.add_argument("--device", metavar="STR", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--precision",
        metavar="STR",
        help=f"{', '.join(OF_PREDICTIONS)}, or auto, the fastest that is as good as float32 (default: float32)",
    )


def add_tta(parser: argparse.ArgumentParser) -> None:
    """Add --tta."""
    parser.add_argument("--tta", action="store_true", help="average the predictions for an image and its mirror image, in twice the time")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --threads."""
    parser.add_argument("--threads", type=int, metavar="INT", help="how many compute (default: as many as there are cores)")


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Add --max-pixels."""
    parser.add_argument(
        "--max-pixels", type=int, metavar="INT", default=MAX_PIXELS, help="largest number of pixels of an image file (default: %(default)s)"
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for a dataset of image files."""
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out images that cannot be read, and name them")
    add_max_pixels(parser)


def add_test_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that test a model on `test_data`."""
    add_image_options(parser)
    add_precision(parser)
    add_threads(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def assignment(text: str, option: str = "--model-option") -> tuple[str, Any]:
    """("depth", 4) from "depth=4"; a value that is not JSON is a string. Raises UserError, naming the option, for invalid text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UserError(f"{option} takes NAME=VALUE, as depth=4, got {text!r}")
    try:
        return name, parse_json(value, name)
    except ValueError:
        return name, value


def test_data(options: argparse.Namespace, classifier: Classifier) -> Dataset:
    """The data that the options specify, otherwise the run's, at the model's image size and with its classes. Raises UserError."""
    return data_of_run(
        options.run,
        classifier,
        options.data,
        skip_bad_images=options.skip_bad_images,
        max_pixels=options.max_pixels,
        progress=not options.quiet,
    )
