"""`minivit predict`: label images."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from ..data.image_file import Unreadable
from ..errors import printable
from ..inference.classifier import Classifier, load
from ..progress import say
from .options import add_image_options, add_precision, add_threads, add_tta
from .output import print_json_list


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name below runs/, or a .safetensors file of minivit")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, and folders, whose images are labelled in sorted order")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="FLOAT",
        help="of a calibrated cascade: largest mean cost of an image, in the unit "
        "of its calibration; without it every image goes to the last exit",
    )
    add_image_options(parser)
    add_precision(parser)
    add_threads(parser)
    add_tta(parser)


def run(options: argparse.Namespace) -> int:
    classifier = load(options.run, options.precision, options.device, options.tta)
    skipped: list[Unreadable] = []
    bad = skipped if options.skip_bad_images else None
    rows = _rows(classifier, options.images, options.budget, bad, options.json, options.max_pixels)
    if options.json:
        print_json_list(rows)
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
    if skipped:
        say(f"skipped {len(skipped)} unreadable images:")
        for line in skipped:
            say(f"  {line}")
    return 0


def _rows(
    classifier: Classifier,
    paths: Sequence[str],
    budget: float | None,
    skipped: list[Unreadable] | None,
    probabilities: bool,
    max_pixels: int,
) -> Iterator[dict[str, Any]]:
    """For each image what is printed of it, with the probability of every class if `probabilities`."""
    for prediction in classifier.predict_in_batches(paths, budget, skipped, max_pixels=max_pixels):
        columns = (
            prediction.sources,
            prediction.names,
            prediction.probabilities.tolist(),
            prediction.exits.tolist(),
            prediction.macs.tolist(),
        )
        for path, name, of_classes, exit, macs in zip(*columns):
            row = {"path": path, "label": name, "probability": max(of_classes)}
            if classifier.predictor.stages > 1:
                row |= {"exit": exit + 1, "macs": macs}
            yield {**row, "probabilities": dict(zip(prediction.class_names, of_classes))} if probabilities else row
