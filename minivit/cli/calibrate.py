"""`minivit calibrate`: optimise the thresholds of a cascade."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..inference.calibrate import calibrate, halves, measured_exits
from ..inference.classifier import load
from ..io.run_folder import find_model
from ..models.cascade.calibration import Calibration
from ..models.cascade.thresholds import Outcome, outcome
from .options import add_test_options, test_data
from .output import print_json, table


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder of a cascade, its name below runs/, or a .safetensors file of minivit")
    parser.add_argument(
        "--data",
        metavar="STR",
        help="test images: a name, folder or .npz file (default: those of the run); half of each class calibrates, the other half tests",
    )
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        metavar="FLOAT",
        help="largest mean costs of an image (default: 8, from all images at the first exit to all at the last)",
    )
    parser.add_argument(
        "--unit",
        default="share",
        metavar="STR",
        help="of the budgets: share of the multiply-adds of all exits together, "
        "macs (multiply-adds), or ms (milliseconds an image on this machine) (default: share)",
    )
    parser.add_argument("--method", default="exact", metavar="STR", help="exact, or sweep: the authors' rule (default: exact)")
    parser.add_argument(
        "--confidence",
        default="max",
        metavar="STR",
        help="what makes an image stop: max, the largest probability, entropy or margin (default: max)",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="INT", help="images that are measured together for ms (default: 64)")
    add_test_options(parser)


def run(options: argparse.Namespace) -> int:
    classifier = load(options.run, options.precision, options.device)
    dataset = test_data(options, classifier)
    images, labels = dataset.test_images, dataset.test_labels
    calibrating, testing = halves(labels)
    calibration = calibrate(
        classifier,
        images[calibrating],
        labels[calibrating],
        options.budgets,
        options.unit,
        options.method,
        options.confidence,
        options.batch_size,
    )
    confidences, correct = measured_exits(
        classifier.predictor, classifier.preprocessing.batches(images[testing]), labels[testing], calibration.confidence
    )
    outcomes = [outcome(thresholds, confidences, correct, calibration.costs) for thresholds in calibration.thresholds]
    file = find_model(Path(options.run))
    classifier.save(file)
    if options.json:
        print_json(
            {
                "file": str(file),
                "data": dataset.name,
                "calibration": calibration.to_json(),
                "unseen": {
                    "images": len(testing),
                    "exit_accuracies": correct.mean(0).tolist(),
                    "outcomes": [result._asdict() for result in outcomes],
                },
            }
        )
        return 0
    parts = f"{calibration.images} for calibration, {len(testing)} others for testing"
    print(f"of {dataset.test_part()}, {parts}; accuracies and shares in %\n")
    _print_calibration(calibration, correct.mean(0), outcomes)
    print(
        f"\nsaved with the model: {file}\nuse: minivit predict {options.run} IMAGE ... --budget {calibration.budgets[0]:.6g}   (any of "
        f"these: {', '.join(f'{budget:.6g}' for budget in calibration.budgets)})"
    )
    return 0


def _print_calibration(calibration: Calibration, exit_accuracies: np.ndarray, outcomes: Sequence[Outcome]) -> None:
    """Print the tables. exit_accuracies, outcomes: on other images, by exit and by budget."""
    scale, unit = {"macs": (1e-6, "M"), "ms": (1, "ms"), "share": (100, "%")}[calibration.unit]
    exit_rows = zip(calibration.macs, calibration.costs, calibration.exit_accuracies, exit_accuracies)
    print(
        table(
            ["exit alone", "M multiply-adds", f"cost, {unit}", "calibration: accuracy", "testing: accuracy"],
            [
                [str(k), f"{macs / 1e6:.3f}", f"{scale * cost:.3f}", f"{100 * calibrated:.2f}", f"{100 * unseen:.2f}"]
                for k, (macs, cost, calibrated, unseen) in enumerate(exit_rows, 1)
            ],
        )
        + "\n"
    )

    def cells(accuracy: float, cost: float, shares: Sequence[float]) -> list[str]:
        return [f"{100 * accuracy:.2f}", f"{scale * cost:.3f}", " ".join(f"{100 * share:4.1f}" for share in shares)]

    columns = ("accuracy", f"cost, {unit}", "by exit")
    calibrated = map(cells, calibration.accuracies, calibration.mean_costs, calibration.exit_shares)
    print(
        table(
            [f"budget, {unit}", "thresholds", f"calibration: {columns[0]}", *columns[1:], f"testing: {columns[0]}", *columns[1:]],
            [
                [f"{scale * budget:.3f}", " ".join(map(_threshold, thresholds)), *calibration_cells, *cells(*unseen)]
                for budget, thresholds, calibration_cells, unseen in zip(calibration.budgets, calibration.thresholds, calibrated, outcomes)
            ],
        )
    )


def _threshold(value: float) -> str:
    return "all" if value <= 0 else "none" if value > 1 else f"{value:.4f}"
