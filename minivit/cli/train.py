"""`minivit train`: an option for each of `train`'s, as `TrainOptions` declares them."""

from __future__ import annotations

import argparse
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..training.options import TrainOptions, help_of_options
from ..training.train import train
from .options import assignment
from .output import by_exit, print_json

NOT_OPTIONS = {"model_options", "progress"}  # the first is --model-option, the second depends on --quiet


def configure(parser: argparse.ArgumentParser) -> None:
    told = {name: text.replace("%", "%%") for name, text in help_of_options().items()}
    hints = get_type_hints(TrainOptions)
    for each in fields(TrainOptions):
        if each.name in NOT_OPTIONS:
            continue
        flag, kind = "--" + each.name.replace("_", "-"), _simplest(hints[each.name])
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=told[each.name])
        else:
            shown = "" if each.default is None else f" (default: {each.default})"
            parser.add_argument(flag, type=kind, default=each.default, metavar=kind.__name__.upper(), help=told[each.name] + shown)
    parser.add_argument(
        "--model-option", action="append", default=[], metavar="NAME=VALUE", help=told["model_options"] + "; may be repeated"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _simplest(hint: Any) -> Any:
    """The type that a word of the command line is turned into: the first of int, float, bool and str that the annotation allows."""
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)  # Python 3.10 makes a Union of a default None
    return next((t for t in (bool, int, float) if t in allowed), str)


def run(options: argparse.Namespace) -> int:
    given = vars(options)
    keywords = {each.name: given[each.name] for each in fields(TrainOptions) if each.name in given}
    run = train(**keywords, model_options=dict(map(assignment, options.model_option)), progress=not options.quiet)
    if options.json:
        print_json({"test_accuracy": run.test_accuracy, "folder": str(run.folder), "history": run.history})
    else:
        print(f"test accuracy {100 * run.test_accuracy:.1f} %{by_exit(run.history[-1].get('exit_accuracies', []))} · {run.folder}")
    return 0
