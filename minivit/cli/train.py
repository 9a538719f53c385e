"""`minivit train`: one command-line option for each field of `TrainOptions`."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ..errors import UserError
from ..training.options import TrainOptions, help_of_options
from ..training.train import train
from .options import add_fields, assignment
from .output import by_exit, print_json

NOT_OPTIONS = {"model_options", "progress", "save", "on_epoch", "on_step"}  # --model-option, --quiet, and what is for Python alone


def configure(parser: argparse.ArgumentParser) -> None:
    add_fields(parser, TrainOptions, NOT_OPTIONS)
    text = help_of_options()["model_options"]
    parser.add_argument("--model-option", action="append", default=[], metavar="NAME=VALUE", help=f"{text}; may be repeated")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


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
