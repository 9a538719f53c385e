"""`minivit export`: a trained model for other programs."""

from __future__ import annotations

import argparse
import json

from ..files import user_path
from ..inference.classifier import load
from ..inference.export import PRECISIONS, export
from ..io.weights import read_safetensors
from .output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="a run folder, its name below runs/, a .safetensors file of minivit, or a folder of transformers"
    )
    parser.add_argument("file", metavar="FILE", help="what to write: .onnx, or .safetensors for weights by timm's names")
    parser.add_argument(
        "--preprocessing", action="store_true", help="the ONNX model takes pixels, uint8 (B, H, W, C), and normalises them itself"
    )
    parser.add_argument(
        "--precision", metavar="STR", help=f"{' or '.join(PRECISIONS)}: how an ONNX file stores the weights (default: float32)"
    )


def run(options: argparse.Namespace) -> int:
    classifier = load(options.run)
    paths = export(classifier, user_path(options.file), preprocessing=options.preprocessing, precision=options.precision)
    call = "" if paths[0].suffix == ".onnx" else json.loads(read_safetensors(paths[0])[1]["timm"])
    if options.json:
        print_json({"files": [str(path) for path in paths]} | ({"timm": call} if call else {}))
    else:
        print(*paths, *([call] if call else []), sep="\n")
    return 0
