"""`minivit plot`: draw all plots that apply to a run."""

from __future__ import annotations

import argparse

from ..plots import draw_run
from .options import add_image_options, add_threads
from .output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name below runs/, or a .safetensors file of minivit")
    parser.add_argument("--data", metavar="STR", help="test images: a name, folder or .npz file (default: those of the run)")
    parser.add_argument(
        "--image",
        dest="images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="images that attention is laid over, each head's over the first of them (default: some of the test images)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="where the pictures go (default: the run folder)")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="FLOAT",
        help="of a calibrated cascade, for the pictures of its exits (default: the smallest that is as accurate as the last exit)",
    )
    add_image_options(parser)
    add_threads(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def run(options: argparse.Namespace) -> int:
    paths = draw_run(
        options.run,
        options.data,
        options.images,
        options.out,
        options.budget,
        skip_bad_images=options.skip_bad_images,
        max_pixels=options.max_pixels,
        progress=not options.quiet,
    )
    if options.json:
        print_json([str(path) for path in paths])
    else:
        print(*paths, sep="\n")
    return 0
