"""`minivit train`: one command-line option for each field of `TrainOptions`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..training.options import TrainOptions, help_of_options
from ..training.train import train
from .options import assignment
from .output import by_exit, print_json

NOT_OPTIONS = {"model_options", "progress", "on_epoch", "on_step"}  # --model-option, --quiet, and functions


def configure(parser: argparse.ArgumentParser) -> None:
    texts = {name: text.replace("%", "%%") for name, text in help_of_options().items()}
    hints = get_type_hints(TrainOptions)
    for item in fields(TrainOptions):
        if item.name in NOT_OPTIONS:
            continue
        flag, kind = "--" + item.name.replace("_", "-"), _simplest(hints[item.name])
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=texts[item.name])
        else:
            default = "" if item.default is None else f" (default: {item.default})"
            parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=texts[item.name] + default)
    parser.add_argument(
        "--model-option", action="append", default=[], metavar="NAME=VALUE", help=texts["model_options"] + "; may be repeated"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


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


def _weights(text: str) -> dict[str, float]:
    """{"cat": 2.0, "dog": 1.0} from "cat=2,dog=1". Raises UserError."""
    weights = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise UserError(f"--class-weights takes balanced or CLASS=NUMBER,..., as cat=2,dog=1, got {part!r} in {text!r}") from None
        if name in weights:
            raise UserError(f"--class-weights names {name!r} twice, in {text!r}: give each class once")
        weights[name] = value
    return weights


def run(options: argparse.Namespace) -> int:
    values = vars(options)
    keywords = {item.name: values[item.name] for item in fields(TrainOptions) if item.name in values}
    if "=" in keywords.get("class_weights", ""):
        keywords["class_weights"] = _weights(options.class_weights)
    run = train(**keywords, model_options=dict(map(assignment, options.model_option)), progress=not options.quiet)
    if options.json:
        print_json({"test_accuracy": run.test_accuracy, "folder": str(run.folder), "history": run.history})
    else:
        print(f"test accuracy {100 * run.test_accuracy:.1f} %{by_exit(run.history[-1].get('exit_accuracies', []))} · {run.folder}")
    return 0
