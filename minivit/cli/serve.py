"""`minivit serve`: one command-line option for each field of `ServeOptions`."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ..inference.classifier import load
from ..serving.options import ServeOptions
from ..serving.serve import serve
from .options import add_fields, add_precision, add_threads, add_tta
from .output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name below runs/, or a .safetensors file of minivit")
    add_fields(parser, ServeOptions)
    add_precision(parser)
    add_threads(parser)
    add_tta(parser)


def run(options: argparse.Namespace) -> int:
    def tell(address: str) -> None:
        if options.json:
            print_json({"address": address, "model": classifier.model.name})
        else:
            print(f"{classifier.model.name} at {address}, until Ctrl-C", flush=True)

    values = vars(options)
    classifier = load(options.run, options.precision, options.device, options.tta)
    serve(classifier, ready=tell, **{item.name: values[item.name] for item in fields(ServeOptions) if item.name in values})
    return 0
