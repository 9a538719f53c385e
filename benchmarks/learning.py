"""python -m benchmarks.learning: what accuracy minivit and its rivals in PyTorch reach in the same minutes on the same images.

Each learner (`learners.py`) trains in a process of its own, which ends when its minutes are over; the test of all test images is part of
them, reading the data is not. minivit chooses everything by `minivit.train(data, minutes=...)`; the rivals have fixed models and recipes,
whose schedules end when the time does. With --json or --save every run is written as it ends, and one that the file already holds is not
repeated. --picture draws accuracy against minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from minivit.plots.figure import BLUE, RED, new_figure

from .learners import RIVALS
from .measure import earlier_runs, machine, machine_line, option_parser, table, write_result

LEARNERS = {
    "minivit": ("minivit",),
    "cnn": ("torch",),
    "vit": ("torch",),
    "cct": ("torch",),
}  # and the packages they take
LABELS = {"minivit": "minivit", "cnn": "small CNN", "vit": "ViT, as in timm", "cct": "compact transformer"}
COLUMNS = {"learner": "<", "minutes": ">", "accuracy, %": ">", "balanced, %": ">", "seeds": ">", "epochs": ">", "M parameters": ">"}
TINY = {"limit": 64, "minutes": 0.05}
assert {*LEARNERS} == {"minivit", *RIVALS}


def measure(options: Namespace, learner: str, minutes: float, seed: int) -> dict[str, Any]:
    """One run, in a process of its own, which ends if this one does: its standard input is then at an end."""
    given = {name: getattr(options, name) for name in ("data", "image_size", "limit", "train", "tiny")}
    command = [sys.executable, "-c", "from benchmarks.learners import serve; serve()"]
    command.append(json.dumps({"learner": learner, "minutes": minutes, "seed": seed, **given}))
    reader, writer = os.pipe()
    with open(reader), open(writer, "w"):
        finished = subprocess.run(command, stdin=reader, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table's lines: the mean over the seeds of each learner, the most accurate first, by minutes."""
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for entry in results:
        groups.setdefault((entry["minutes"], entry["learner"]), []).append(entry)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -fmean(r["test_accuracy"] for r in item[1])))
    return [
        [
            LABELS[learner],
            f"{minutes:g}",
            f"{100 * fmean(r['test_accuracy'] for r in runs):.1f}",
            f"{100 * fmean(r['balanced_accuracy'] for r in runs):.1f}",
            str(len(runs)),
            f"{fmean(r['epochs'] for r in runs):.1f}",
            f"{runs[0]['parameters'] / 1e6:.2f}",
        ]
        for (minutes, learner), runs in ordered
    ]


def draw(results: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Accuracy against minutes, a line a learner through the means over the seeds, and a point a run."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    colours = dict(zip(LEARNERS, (BLUE, RED, "0.45", "0.7")))
    for learner in dict.fromkeys(entry["learner"] for entry in results):
        runs = [entry for entry in results if entry["learner"] == learner]
        minutes = sorted({entry["minutes"] for entry in runs})
        means = [100 * fmean(r["test_accuracy"] for r in runs if r["minutes"] == each) for each in minutes]
        axes.plot(minutes, means, color=colours[learner], label=LABELS[learner])
        points = [(r["minutes"], 100 * r["test_accuracy"]) for r in runs]
        axes.plot(*zip(*points), color=colours[learner], marker="o", markersize=4, linestyle="none")
    axes.set(xlabel="minutes of training", ylabel="test accuracy, %", title=title, xlim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = option_parser("learning", "Accuracy in the same minutes.")
    parser.add_argument("--data", default="digits", help="as minivit train takes it (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="of all learners (default: that of the data)")
    parser.add_argument("--limit", type=int, help="the most training and test images (default: all)")
    parser.add_argument("--minutes", type=float, nargs="+", default=[10.0], help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="from 0 on (default: %(default)s)")
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, help=f"(default: {' '.join(LEARNERS)})")
    parser.add_argument(
        "--train", action="append", default=[], metavar="NAME=VALUE", help="another keyword of minivit.train; may be repeated"
    )
    parser.add_argument("--picture", type=Path, metavar="PATH", help="draw accuracy against minutes")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or min(options.minutes) <= 0:
        parser.error("--seeds must be 1 or more, and --minutes above 0")
    if options.tiny:
        options.minutes, options.limit, options.seeds = [TINY["minutes"]], TINY["limit"], 1
    options.learners = options.learners or list(LEARNERS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    found = machine()
    print(machine_line(found), end="\n\n")
    name = " ".join(["learning", Path(options.data).name, *([str(options.limit)] if options.limit else [])])
    settings = {"data": Path(options.data).name, **{key: getattr(options, key) for key in ("image_size", "limit", "train")}}
    results = earlier_runs(options, name, found, settings)
    done = {(entry["learner"], entry["minutes"], entry["seed"]) for entry in results}
    missing = {each: [package for package in LEARNERS[each] if not find_spec(package)] for each in options.learners}
    able = [learner for learner, packages in missing.items() if not packages]
    for learner in missing.keys() - able:
        print(f"left out: {LABELS[learner]}: {', '.join(missing[learner])} not installed")
    for minutes, seed, learner in ((m, s, each) for m in options.minutes for s in range(options.seeds) for each in able):
        if (learner, minutes, seed) in done:
            continue
        results.append(measure(options, learner, minutes, seed))
        write_result(options, name, found, tell=False, settings=settings, results=results)
        print(f"{LABELS[learner]}, {minutes:g} minutes, seed {seed}: {100 * results[-1]['test_accuracy']:.1f} %", flush=True)
    print("\n" + table(COLUMNS, rows_of(results)))
    if options.picture:
        draw(results, f"{settings['data']}, {options.limit or 'all'} training images", options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
