"""`minivit predict`: label images."""

from __future__ import annotations

import argparse

from ..errors import printable
from ..inference.classifier import load
from .options import add_max_pixels, add_precision, add_threads
from .output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name below runs/, or a .safetensors file of minivit")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="FLOAT",
        help="of a calibrated cascade: largest mean cost of an image, in the unit "
        "of its calibration; without it every image goes to the last exit",
    )
    add_max_pixels(parser)
    add_precision(parser)
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    classifier = load(options.run, options.precision, options.device)
    prediction = classifier.predict(options.images, options.budget, max_pixels=options.max_pixels)
    rows = [
        {"path": path, "label": name, "probability": max(probabilities)}
        for path, name, probabilities in zip(options.images, prediction.names, prediction.probabilities.tolist())
    ]
    if classifier.predictor.stages > 1:
        rows = [
            {**row, "exit": exit + 1, "macs": macs} for row, exit, macs in zip(rows, prediction.exits.tolist(), prediction.macs.tolist())
        ]
    if options.json:
        print_json(
            [
                {**row, "probabilities": dict(zip(prediction.class_names, probabilities))}
                for row, probabilities in zip(rows, prediction.probabilities.tolist())
            ]
        )
    else:
        for row in rows:
            path, label, probability, *exit_columns = row.values()
            print(
                printable(path),
                printable(label),
                f"{probability:.4f}",
                *([exit_columns[0], f"{exit_columns[1] / 1e6:.3f}"] if exit_columns else []),
                sep="\t",
            )
    return 0
