"""`minivit report`: a page about a run."""

from __future__ import annotations

import argparse

from ..reports.report import report
from .options import add_test_options, add_tta
from .output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name below runs/, or a .safetensors file of minivit")
    parser.add_argument("--data", metavar="STR", help="test images: a name, folder or .npz file (default: those of the run)")
    parser.add_argument("--out", metavar="FILE", help="where the page goes (default: report.html in the run folder)")
    add_test_options(parser)
    add_tta(parser)


def run(options: argparse.Namespace) -> int:
    path = report(
        options.run,
        options.data,
        options.out,
        precision=options.precision,
        device=options.device,
        tta=options.tta,
        skip_bad_images=options.skip_bad_images,
        max_pixels=options.max_pixels,
        progress=not options.quiet,
    )
    print_json(str(path)) if options.json else print(path)
    return 0
