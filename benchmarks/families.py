"""python -m benchmarks.families: every family of the survey at equal training time, on the same data with the same recipe.

First all speeds are measured, while nothing else should compute: each model trains for a few epochs on a small part of the data, which
tells how many images a second it processes, and predicts. Then each trains on as many images as that makes in --minutes: on all of them
several times, or if time is too short on a part of them once. The table has the accuracy on the test images, parameters, multiply-adds and
images/s in training, and the milliseconds of a prediction at batch 64 and 1.

--picture draws accuracy against multiply-adds. With --json or --save every run is written as it ends, with its history, and one that the
file already holds is not repeated.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

import minivit
from minivit.cli.options import assignment
from minivit.inference.predictor import Predictor
from minivit.plots.figure import BLUE, new_figure

from .measure import earlier_runs, machine, machine_line, milliseconds, option_parser, table, write_result

MODELS = (
    "vit_tiny_patch4_32",
    "mixer_tiny_patch4_32",
    "ff_only_nano_patch4_32",
    "t2t_vit_tiny_32",
    "deepvit_tiny_patch4_32",
    "localvit_tiny_patch4_32",
    "crossvit_tiny_32",
    "dvt_tiny_32",
    "dvt_t2t_tiny_32",
)
TINY_MODELS = ("vit_nano_patch2_8", "localvit_nano_patch2_8")
BATCHES = (64, 1)
RATE_BATCHES, RATE_EPOCHS = 8, 3  # of the first training, whose last epoch tells the rate
LINE = 2.0  # points of accuracy that a line of text takes in the picture
ROUNDS, SECONDS = 5, 1.0  # of timing predictions
TINY = {"limit": 64}


def train(options: Namespace, dataset: minivit.Dataset, model: str, seed: int, **more: Any) -> minivit.Run:
    """Train as the options say, and `more`."""
    given = dict(assignment(text, "--train") for text in options.train)
    with TemporaryDirectory() as folder:
        return minivit.train(model, dataset, seed=seed, out=folder, overwrite=True, progress=False, **given | more)


def speed(options: Namespace, dataset: minivit.Dataset, model: str) -> dict[str, Any]:
    """Images a second in training, once all is compiled and recorded, and the seconds of a prediction by batch size."""
    limit = min(len(dataset.train_images), RATE_BATCHES * 64)
    run = train(options, dataset, model, 0, limit=limit, epochs=RATE_EPOCHS)
    images = next(run.model.preprocessing.batches(dataset.test_images[: BATCHES[0]]))
    seconds = {str(n): prediction_seconds(run.model.predictor, images[:n], 0.0 if options.tiny else SECONDS) for n in BATCHES}
    return {"images_per_second": run.history[-1]["images_per_second"], "prediction": seconds}


def share_of(images: float, available: int) -> dict[str, int]:
    """The epochs, and the number of training images in each, that make so many images in all."""
    epochs = max(1, ceil(images / available))
    return {"epochs": epochs, "limit": max(1, min(available, round(images / epochs)))}


def prediction_seconds(predictor: Predictor, images: np.ndarray, seconds: float) -> float:
    """The median time of a call, over rounds of about so many seconds."""
    predictor(images)
    rounds = []
    for _ in range(ROUNDS):
        calls, start = 0, perf_counter()
        while not calls or perf_counter() - start < seconds:
            predictor(images)
            calls += 1
        rounds.append((perf_counter() - start) / calls)
    return median(rounds)


def measure(options: Namespace, dataset: minivit.Dataset, model: str, seed: int, speed: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of the table, of a model with this speed."""
    share = share_of(60 * options.minutes * speed["images_per_second"], len(dataset.train_images))
    start = perf_counter()
    run = train(options, dataset, model, seed, **share)
    seconds = perf_counter() - start
    return {
        "model": model,
        "seed": seed,
        **share,
        "seconds": seconds,
        "test_accuracy": run.test_accuracy,
        "parameters": sum(p.size for p in run.model.parameters()),
        "macs": run.model.cost().exits,
        **speed,
        "history": run.history,
    }


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table's lines: the mean over the seeds of each model, the most accurate first."""
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for entry in results:
        by_model.setdefault(entry["model"], []).append(entry)
    rows = sorted(by_model.values(), key=lambda runs: -fmean(r["test_accuracy"] for r in runs))
    return [
        [
            runs[0]["model"],
            f"{100 * fmean(r['test_accuracy'] for r in runs):.1f}",
            str(len(runs)),
            f"{fmean(r['epochs'] * r['limit'] for r in runs):,.0f}",
            f"{runs[0]['parameters'] / 1e6:.2f}",
            f"{runs[0]['macs'][-1] / 1e6:.1f}",
            f"{fmean(r['images_per_second'] for r in runs):.0f}",
            *(milliseconds(fmean(r["prediction"][str(n)] for r in runs)) for n in BATCHES),
        ]
        for runs in rows
    ]


COLUMNS = {
    "model": "<",
    "accuracy, %": ">",
    "seeds": ">",
    "images seen": ">",
    "M parameters": ">",
    "M multiply-adds": ">",
    "images/s": ">",
    "ms, batch 64": ">",
    "ms, batch 1": ">",
}


def draw(results: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Accuracy against multiply-adds, a point a model."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    points = {}
    for model in dict.fromkeys(entry["model"] for entry in results):
        runs = [entry for entry in results if entry["model"] == model]
        points[model] = runs[0]["macs"][-1] / 1e6, 100 * fmean(r["test_accuracy"] for r in runs)
    for model, (macs, accuracy) in points.items():
        axes.plot(macs, accuracy, color=BLUE, marker="o", markersize=5, linestyle="none")
        crowded = any(x > macs and abs(y - accuracy) < LINE for x, y in points.values())  # the name would lie on another's
        place, side = ((-4, 4), "right") if crowded else ((4, 4), "left")
        axes.annotate(model, (macs, accuracy), place, textcoords="offset points", fontsize="x-small", ha=side)
    axes.set(xlabel="multiply-adds an image, millions", ylabel="test accuracy, %", xscale="log", title=title)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.3, y=0.15)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=160)


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = option_parser("families", "Every family at equal training time.")
    parser.add_argument("--data", default="digits", help="as minivit train takes it (default: %(default)s)")
    parser.add_argument("--models", nargs="+", help=f"presets (default: {' '.join(MODELS)})")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training for each model and seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="from 0 on (default: %(default)s)")
    parser.add_argument(
        "--train", action="append", default=[], metavar="NAME=VALUE", help="another keyword of minivit.train; may be repeated"
    )
    parser.add_argument("--picture", type=Path, metavar="PATH", help="draw accuracy against multiply-adds")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.minutes, options.seeds, options.models = 0.01, 1, options.models or TINY_MODELS
    options.models = options.models or MODELS
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    found = machine()
    print(machine_line(found), end="\n\n")
    data = Path(options.data).name
    settings = {"data": data, "minutes": options.minutes, "train": options.train}
    results = earlier_runs(options, f"families {data}", found, settings)
    done = {(entry["model"], entry["seed"]) for entry in results}
    size = minivit.create_model(options.models[0], init="zeros").config.image_size
    dataset = minivit.load_data(options.data, image_size=size)
    dataset = dataset.limited(TINY["limit"]) if options.tiny else dataset
    todo = [(model, seed) for seed in range(options.seeds) for model in options.models if (model, seed) not in done]
    speeds = {model: speed(options, dataset, model) for model in dict.fromkeys(model for model, _ in todo)}
    print("training images/s:", ", ".join(f"{model} {each['images_per_second']:.0f}" for model, each in speeds.items()), flush=True)
    for model, seed in todo:
        results.append(measure(options, dataset, model, seed, speeds[model]))
        write_result(options, f"families {data}", found, tell=False, settings=settings, results=results)
        print(f"{model}, seed {seed}: {100 * results[-1]['test_accuracy']:.1f} % in {results[-1]['seconds']:.0f} s", flush=True)
    print("\n" + table(COLUMNS, rows_of(results)))
    if options.picture:
        draw(results, f"{data}, {options.minutes:g} minutes of training", options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
