"""`minivit predict`: label images."""

from __future__ import annotations

import argparse
import csv
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.image_file import Unreadable
from ..data.walk import count_images
from ..errors import UserError, printable
from ..inference.classifier import Classifier, load
from ..inference.predictor import Prediction
from ..progress import say, standard_error
from .options import add_image_options, add_precision, add_threads, add_tta
from .output import print_json_line, print_json_list

STANDARD_INPUT = "-"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name below runs/, or a .safetensors file of minivit")
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="image files; folders, whose images are labelled in sorted order; patterns in quotes, as 'photos/**/*.jpg'; or -, for paths "
        "from standard input, one a line",
    )
    parser.add_argument("--top", type=int, metavar="INT", help="how many labels are told of an image, the most probable first")
    parser.add_argument(
        "--format",
        choices=("text", "csv", "jsonl"),
        help="a line for each image: text, separated by tabs (the default); csv, with a line of headings; jsonl, an object with the "
        "probabilities of all classes, or with --top of so many",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="FLOAT",
        help="of a calibrated cascade: largest mean cost of an image, in the unit "
        "of its calibration; without it every image goes to the last exit",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    add_image_options(parser)
    add_precision(parser)
    add_threads(parser)
    add_tta(parser)


def run(options: argparse.Namespace) -> int:
    if options.json and options.format:
        raise UserError("give --json, for one list of all images, or --format, for a line for each")
    if options.top is not None and options.top < 1:
        raise UserError(f"--top must be 1 or more, got {options.top}")
    classifier = load(options.run, options.precision, options.device, options.tta)
    rows = (row for prediction in _predictions(classifier, options) for row in _rows(prediction, classifier, options.top))
    if options.json:
        print_json_list(rows)
    elif options.format == "jsonl":
        for row in rows:
            print_json_line(row)
    elif options.format == "csv":
        _print_csv(rows, min(options.top or 1, len(classifier.class_names)), classifier.predictor.stages > 1)
    else:
        for row in rows:
            _print_text(row, options.top or 1)
    return 0


def _predictions(classifier: Classifier, options: argparse.Namespace) -> Iterator[Prediction]:
    """The prediction of each batch. Lines name what is skipped, and a bar shows progress, where no results are printed on the terminal."""
    skipped: list[Unreadable] = []
    skipped_count = 0
    shown = not options.quiet and standard_error.isatty() and not sys.stdout.isatty()
    total = count_images(_paths(options.images)) if shown and STANDARD_INPUT not in options.images else None
    with tqdm(total=total, unit="image", dynamic_ncols=True, leave=False, disable=not shown, file=standard_error) as bar:
        batches = classifier.predict_in_batches(
            _paths(options.images), options.budget, skipped if options.skip_bad_images else None, max_pixels=options.max_pixels
        )
        try:
            for prediction in batches:
                yield prediction
                sys.stdout.flush()
                bar.update(len(prediction) + len(skipped))
                skipped_count += _tell(skipped, bar)
        except Unreadable as error:
            raise UserError(f"{error}; leave such images out with --skip-bad-images") from error
        skipped_count += _tell(skipped, bar)
    if skipped_count:
        say(f"skipped {skipped_count} unreadable images")


def _tell(skipped: list[Unreadable], bar: tqdm) -> int:
    """Say what was skipped since the last time, and forget it; returns how many these are."""
    count = len(skipped)
    with bar.external_write_mode(standard_error):
        for error in skipped:
            say(f"skipped: {error}")
    skipped.clear()
    return count


def _paths(arguments: Sequence[str]) -> Iterator[str]:
    """The paths of files and folders that arguments mean. Raises UserError for a pattern without a file."""
    for argument in arguments:
        if argument == STANDARD_INPUT:
            yield from _standard_input()
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            found = sorted(glob.iglob(argument, recursive=True))
            if "**" in argument:  # which finds folders and the files in them
                found = [path for path in found if not os.path.isdir(path)]
            if not found:
                raise UserError(f"no file matches {argument}: is the pattern right, and relative to this folder?")
            yield from found
        else:
            yield argument


def _standard_input() -> Iterator[str]:
    if sys.stdin is None:
        raise UserError("standard input is closed, and - reads paths from there: redirect it from a file")
    for line in sys.stdin.buffer:
        if path := line.rstrip(b"\r\n"):
            yield os.fsdecode(path)


def _rows(prediction: Prediction, classifier: Classifier, top: int | None) -> Iterator[dict[str, Any]]:
    """What is told of each image: JSON's keys and values, with the probabilities of all classes, or of the `top` most probable."""
    names = prediction.class_names
    for i, (path, probabilities) in enumerate(zip(prediction.sources, prediction.probabilities)):
        order = np.argsort(-probabilities, kind="stable")  # (K,), the most probable class first
        row = {"path": path, "label": names[order[0]], "probability": float(probabilities[order[0]])}
        if classifier.predictor.stages > 1:
            row |= {"exit": int(prediction.exits[i]) + 1, "macs": float(prediction.macs[i])}
        told = range(len(names)) if top is None else order[:top]
        yield row | {"probabilities": {names[k]: float(probabilities[k]) for k in told}}


def _best(row: dict[str, Any], top: int) -> list[tuple[str, float]]:
    """The `top` most probable labels of a row, with their probabilities."""
    return sorted(row["probabilities"].items(), key=lambda item: item[1], reverse=True)[:top]


def _print_text(row: dict[str, Any], top: int) -> None:
    best = (column for label, probability in _best(row, top) for column in (printable(label), f"{probability:.4f}"))
    print(printable(row["path"]), *best, *([row["exit"], f"{row['macs'] / 1e6:.3f}"] if "exit" in row else []), sep="\t")


def _print_csv(rows: Iterator[dict[str, Any]], top: int, is_cascade: bool) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ends = ["", *(f"_{place}" for place in range(2, top + 1))]
    exits = ["exit", "macs"] if is_cascade else []
    writer.writerow(["path", *(f"{heading}{end}" for end in ends for heading in ("label", "probability")), *exits])
    for row in rows:
        best = (column for label, probability in _best(row, top) for column in (label, f"{probability:.6f}"))
        writer.writerow([row["path"], *best, *(row[name] for name in exits)])
