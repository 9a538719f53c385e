"""python -m benchmarks.cascade: what stopping early saves a cascade, in multiply-adds and in measured time.

A cascade is trained (or taken from --run), and calibrated for 20 budgets on half of the test images, by the exact solver and by the
authors' sweep. All else is told of the other half, which neither training nor calibration has seen:

    exits      each exit alone: accuracy, multiply-adds, milliseconds an image
    budgets    accuracy and mean cost under each budget; whether the budget is kept to 5 %
    time       `Predictor.predict(images, budget)` against the same model's last exit for all images, `Predictor(images)`, in turns, at
               batch 64 and at batch 1: the median over rounds, each over the same images

Time is measured at the smallest budget whose accuracy is within 0.2 points of the last exit's own: as a user would choose it, by the
accuracies of the calibration, and by those of the unseen half. Before that, early answers are held against the logits of all exits.

With --ablation, instead, cascades are trained with both kinds of reuse, either and none, over --seeds, and the accuracy of each exit on all
test images is told. With --json or --save every run is written as it ends, and one that the file already holds is not repeated.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import minivit
from minivit import UserError
from minivit.cli.options import assignment
from minivit.inference.calibrate import calibrate, halves, measured_exits, stage_milliseconds
from minivit.inference.classifier import Classifier
from minivit.inference.predictor import Predictor
from minivit.inference.run_data import data_of_run
from minivit.models.cascade.calibration import CONFIDENCES, Calibration, confidence
from minivit.models.cascade.thresholds import exits_of, outcome, sweep

from .measure import earlier_runs, machine, machine_line, option_parser, percent, table, write_result

MODELS, OTHER_MODEL = {"digits": "dvt_nano_8"}, "dvt_nano_32"  # by data
TINY = {"limit": 240, "epochs": 1, "model_options": {"dim": 16, "depth": 1, "heads": 2}}
BUDGETS = 20
BATCHES = (64, 1)
CHECKED = 256  # images
NEAR = 0.002  # accuracy that may be lost
KEPT = 1.05  # of the budget may be spent on unseen images
COST_LIMIT, TIME_LIMIT = 0.5, 0.6  # of the last exit's multiply-adds, and of its time at batch 64
TOLERANCE = 1e-4  # of probabilities and confidences, in float32
REUSES = {"both": (True, True), "feature": (True, False), "relationship": (False, True), "none": (False, False)}


class Disagreement(RuntimeError):
    """Stopping early gives other answers than the exits themselves."""


class Half(NamedTuple):
    """Half of the test images, as all exits see them."""

    images: np.ndarray  # (n, C, S, S) float32, normalised
    sure: np.ndarray  # (n, K): each exit's confidence
    correct: np.ndarray  # (n, K): whether it is right

    @classmethod
    def of(cls, classifier: Classifier, pixels: np.ndarray, labels: np.ndarray, kind: str) -> Half:
        images = np.concatenate([*classifier.preprocessing.batches(pixels)])
        return cls(images, *measured_exits(classifier.predictor, [images], labels, kind))


# ----------------------------------------------------------------------------------------------------------------------- training
def train(options: Namespace, folder: str | Path | None, **more: Any) -> minivit.Run:
    """Train as the options say, and `more`."""
    given = dict(assignment(text, "--train") for text in options.train) | {"data": options.data, "seed": options.seed}
    given |= {name: value for name, value in (("epochs", options.epochs),) if value is not None}
    given |= TINY if options.tiny else {}
    given |= {name: value for name, value in more.items() if name != "model_options"}
    given["model_options"] = given.get("model_options", {}) | more.get("model_options", {})
    return minivit.train(options.model or MODELS.get(options.data, OTHER_MODEL), **given, out=folder, overwrite=folder is not None)


# -------------------------------------------------------------------------------------------------------------- accuracy and cost
def check(predictor: Predictor, images: np.ndarray, calibration: Calibration) -> None:
    """Raises Disagreement where an image stops elsewhere, or gets other probabilities, than the logits of all exits tell."""
    logits = predictor.logits(images).astype(np.float64)  # (K, n, classes)
    sure = confidence(logits, calibration.confidence).T  # (n, K)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    for budget in calibration.budgets:
        thresholds = calibration.for_budget(budget)
        answer = predictor.predict(images, budget)
        near = (np.abs(sure[:, :-1] - thresholds) < TOLERANCE).any(1)  # where rounding decides
        expected = exits_of(sure, thresholds)
        wrong = (answer.exits != expected) & ~near
        error = np.abs(answer.probabilities - probabilities[answer.exits, np.arange(len(images))]).max()
        if wrong.any() or not error < TOLERANCE:
            raise Disagreement(
                f"at a budget of {percent(budget)} {wrong.sum()} of {len(images)} images stop at another exit than their "
                f"logits tell, and probabilities differ by {error:.1g}"
            )


def compare(calibration: Calibration, swept: Sequence[Sequence[float]], seen: Half, unseen: Half) -> list[dict[str, Any]]:
    """An entry a budget: both solvers on the calibration half, the exact one's thresholds on the other."""
    entries = []
    for budget, exact, released in zip(calibration.budgets, calibration.thresholds, swept):
        found = {
            name: outcome(thresholds, half.sure, half.correct, calibration.costs)._asdict()
            for name, thresholds, half in (
                ("exact", exact, seen),
                ("sweep", released, seen),
                ("unseen", exact, unseen),
                ("sweep_unseen", released, unseen),
            )
        }
        entries.append(
            {
                "budget": budget,
                "thresholds": exact,
                "sweep_thresholds": released,
                **found,
                "of_budget": found["unseen"]["mean_cost"] / budget,
            }
        )
    return entries


def nearest_to_last(entries: Sequence[Mapping[str, Any]], part: str, last: float) -> Mapping[str, Any]:
    """The entry of the smallest budget that loses at most NEAR of the accuracy `last`; the most accurate where there is none."""
    near = [e for e in entries if e[part]["accuracy"] >= last - NEAR]
    return near[0] if near else max(entries, key=lambda e: e[part]["accuracy"])


# --------------------------------------------------------------------------------------------------------------------------- time
def measure(predictor: Predictor, images: np.ndarray, batch: int, budget: float, options: Namespace) -> dict[str, Any]:
    """Seconds an image at the budget and at the last exit, and their ratio: medians over rounds that take both in turns."""
    predictor(images[:batch])  # records its plan
    start = perf_counter()
    predictor(images[:batch])
    batches = max(1, min(len(images) // batch, round(options.seconds / (perf_counter() - start))))
    parts = np.array_split(images[: batches * batch], batches)
    sides = {"budget": lambda part: predictor.predict(part, budget), "last": predictor}
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in tqdm(range(1 + options.rounds), desc=f"batch {batch}", disable=None, leave=False, unit="round"):
        spent = dict.fromkeys(sides, 0.0)
        for part in parts:
            for name, side in sides.items():
                start = perf_counter()
                side(part)
                spent[name] += perf_counter() - start
        for name, seconds in spent.items():
            rounds[name].append(seconds / sum(map(len, parts)))
    early, full = (rounds[name][1:] for name in ("budget", "last"))  # the first round records plans
    macs = predictor.predict(np.concatenate(parts), budget).macs.mean()
    return {
        "batch": batch,
        "budget": budget,
        "images": sum(map(len, parts)),
        "seconds": median(early),
        "last_seconds": median(full),
        "of_time": median(a / b for a, b in zip(early, full)),
        "of_macs": float(macs) / predictor.model.cost().total,
        "rounds": {"budget": early, "last": full},
    }


# ------------------------------------------------------------------------------------------------------------------------- output
def show(result: Mapping[str, Any]) -> None:
    """Print the tables of a result."""
    print(
        table(
            {"exit": "<", "M multiply-adds": ">", "share": ">", "accuracy, %": ">", **{f"ms at batch {b}": ">" for b in BATCHES}},
            [
                [
                    str(k),
                    f"{e['macs'] / 1e6:.3f}",
                    percent(e["share"]),
                    f"{100 * e['accuracy']:.2f}",
                    *(f"{e['milliseconds'][str(b)]:.3f}" for b in BATCHES),
                ]
                for k, e in enumerate(result["exits"], 1)
            ],
        )
        + "\n"
    )
    print(
        table(
            {
                "budget": ">",
                "sweep, %": ">",
                "exact, %": ">",
                "its cost": ">",
                "unseen, %": ">",
                "its cost ": ">",
                "of budget": ">",
                "": "<",
            },
            [
                [
                    f"{100 * e['budget']:.1f} %",
                    f"{100 * e['sweep']['accuracy']:.2f}",
                    f"{100 * e['exact']['accuracy']:.2f}",
                    f"{100 * e['exact']['mean_cost']:.1f} %",
                    f"{100 * e['unseen']['accuracy']:.2f}",
                    f"{100 * e['unseen']['mean_cost']:.1f} %",
                    f"{100 * e['of_budget']:.1f} %",
                    "kept" if e["of_budget"] <= KEPT else "EXCEEDED",
                ]
                for e in result["budgets"]
            ],
        )
        + "\n"
    )
    last = result["exits"][-1]["accuracy"]
    for by, e in result["near"].items():
        print(
            f"within {100 * NEAR:g} points of the last exit, by the {by} half: budget {percent(e['budget'])}, unseen accuracy "
            f"{100 * e['unseen']['accuracy']:.2f} % (last exit {100 * last:.2f} %), mean cost {percent(e['unseen']['mean_cost'])} of "
            f"its multiply-adds, stated limit {percent(COST_LIMIT)}"
        )
    columns = {"batch": "<", "budget": ">", "ms an image": ">", "last exit": ">", "of its time": ">", "of multiply-adds": ">"}
    print(
        "\n"
        + table(
            columns,
            [
                [
                    str(t["batch"]),
                    f"{100 * t['budget']:.1f} %",
                    f"{1e3 * t['seconds']:.3f}",
                    f"{1e3 * t['last_seconds']:.3f}",
                    percent(t["of_time"]),
                    percent(t["of_macs"]),
                ]
                for t in result["times"]
            ],
        )
    )
    print(f"stated limit at batch {BATCHES[0]}: {percent(TIME_LIMIT)} of the time")


# ------------------------------------------------------------------------------------------------------------------------ ablation
def ablation(options: Namespace, found: Mapping[str, Any]) -> None:
    """A table of exit accuracies by what is reused, in the mean over seeds; each run is written as it ends."""
    name = f"cascade-ablation {Path(options.data).name}"
    settings = {
        "data": Path(options.data).name,
        "model": options.model or MODELS.get(options.data, OTHER_MODEL),
        "epochs": options.epochs,
        "train": options.train,
    }
    runs = earlier_runs(options, name, found, settings)
    done = {(r["reuse"], r["seed"]) for r in runs}
    for seed in range(options.seed, options.seed + options.seeds):
        for reuse, (feature, relationship) in REUSES.items():
            if (reuse, seed) in done:
                continue
            with TemporaryDirectory() as folder:
                start = perf_counter()
                run = train(options, folder, seed=seed, model_options={"feature_reuse": feature, "relationship_reuse": relationship})
            runs.append(
                {
                    "reuse": reuse,
                    "seed": seed,
                    "exit_accuracies": run.history[-1]["exit_accuracies"],
                    "macs": run.model.cost().exits,
                    "seconds": perf_counter() - start,
                }
            )
            write_result(options, name, found, settings=settings, results=runs)
    exits = range(len(runs[0]["exit_accuracies"]))
    print(
        table(
            {"reuse": "<", "seeds": ">", **{f"exit {k + 1}, %": ">" for k in exits}, "M multiply-adds": ">"},
            [
                [
                    reuse,
                    str(len(chosen)),
                    *(f"{100 * fmean(r['exit_accuracies'][k] for r in chosen):.2f}" for k in exits),
                    " ".join(f"{m / 1e6:.2f}" for m in chosen[0]["macs"]),
                ]
                for reuse in REUSES
                for chosen in [[r for r in runs if r["reuse"] == reuse]]
                if chosen
            ],
        )
    )


# ---------------------------------------------------------------------------------------------------------------------------- main
def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = option_parser("cascade", "What stopping early saves a cascade, in multiply-adds and in time.")
    parser.add_argument("--data", default="digits", help="as minivit train takes it (default: %(default)s)")
    parser.add_argument("--model", help=f"a cascade (default: {MODELS['digits']} for the digits, else {OTHER_MODEL})")
    parser.add_argument("--epochs", type=int, help="of training (default: the recipe's)")
    parser.add_argument(
        "--train", action="append", default=[], metavar="NAME=VALUE", help="another keyword of minivit.train; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="of training (default: %(default)s)")
    parser.add_argument("--run", help="a trained cascade's run folder, in place of training")
    parser.add_argument("--out", type=Path, help="the run folder of training (default: runs/<model>-<data>-<number>)")
    parser.add_argument("--confidence", default="max", choices=CONFIDENCES, help="what makes an image stop (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of timing (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long a round takes a side (default: %(default)s)")
    parser.add_argument("--ablation", action="store_true", help="train with both kinds of reuse, either and none instead")
    parser.add_argument("--seeds", type=int, default=3, help="of the ablation, from --seed on (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.rounds, options.seconds, options.seeds = 1, 0.0, 1
    return options


def evaluate(options: Namespace, classifier: Classifier, dataset: minivit.Dataset) -> dict[str, Any]:
    """All that is told of one trained cascade."""
    half, rest = halves(dataset.test_labels)
    seen, unseen = (Half.of(classifier, dataset.test_images[i], dataset.test_labels[i], options.confidence) for i in (half, rest))
    macs = np.array(classifier.cost().exits)
    budgets = np.linspace(macs[0] / macs[-1], 1, BUDGETS).tolist()
    calibration = calibrate(
        classifier, dataset.test_images[half], dataset.test_labels[half], budgets, unit="share", confidence=options.confidence
    )
    swept = sweep(seen.sure, seen.correct, calibration.costs, calibration.budgets)
    predictor = classifier.predictor
    check(predictor, unseen.images[:CHECKED], calibration)
    entries = compare(calibration, swept, seen, unseen)
    accuracies = {"calibration": seen.correct.mean(0), "unseen": unseen.correct.mean(0)}
    near = {by: nearest_to_last(entries, part, accuracies[by][-1]) for by, part in (("calibration", "exact"), ("unseen", "unseen"))}
    times = {b: stage_milliseconds(predictor.model, unseen.images, b) for b in BATCHES}
    exits = [
        {
            "macs": int(m),
            "share": m / macs[-1],
            "accuracy": float(accuracies["unseen"][k]),
            "calibration_accuracy": float(accuracies["calibration"][k]),
            "milliseconds": {str(b): times[b][k] for b in BATCHES},
        }
        for k, m in enumerate(macs)
    ]
    timed = [
        measure(predictor, unseen.images, batch, budget, options)
        for batch in BATCHES
        for budget in sorted({entry["budget"] for entry in near.values()})
    ]
    return {
        "data": dataset.name,
        "confidence": options.confidence,
        "images": {"calibration": len(half), "unseen": len(rest)},
        "exits": exits,
        "budgets": entries,
        "near": near,
        "times": timed,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    found = machine()
    print(machine_line(found))
    try:
        if options.ablation:
            ablation(options, found)
            return 0
        with TemporaryDirectory() as temporary:
            seconds, folder = None, options.run
            if folder is None:
                start = perf_counter()
                folder = train(options, temporary if options.tiny else options.out).folder
                seconds = perf_counter() - start
            classifier = minivit.load(folder)
            result = evaluate(options, classifier, data_of_run(folder, classifier))
    except UserError as error:
        print(error)
        return 2
    result |= {"model": classifier.model.name, "run": Path(folder).name, "training_seconds": seconds}
    show(result)
    write_result(options, f"cascade {result['model']} {result['data']}", found, **result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
