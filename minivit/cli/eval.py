"""`minivit eval`: test accuracy of a trained model."""

from __future__ import annotations

import argparse

from ..inference.classifier import load
from ..inference.evaluate import evaluate_on
from .options import add_test_options, add_tta, test_data
from .output import by_exit, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name below runs/, or a .safetensors file of minivit")
    parser.add_argument("--data", metavar="STR", help="test images: a name, folder or .npz file (default: those of the run)")
    add_test_options(parser)
    add_tta(parser)


def run(options: argparse.Namespace) -> int:
    classifier = load(options.run, options.precision, options.device, options.tta)
    dataset = test_data(options, classifier)
    result = evaluate_on(classifier, dataset)
    if options.json:
        print_json(
            {
                "test_accuracy": result.accuracies[-1],
                "exit_accuracies": result.accuracies,
                "balanced_accuracy": result.balanced_accuracy,
                "test_loss": result.loss,
                "images": len(dataset.test_images),
                "part": "all" if dataset.is_whole else "test",
                "data": dataset.name,
            }
        )
    else:
        print(
            f"test accuracy {100 * result.accuracies[-1]:.1f} %{by_exit(result.accuracies)} · "
            f"balanced {100 * result.balanced_accuracy:.1f} % · test loss {result.loss:.4f} · {dataset.test_part()}"
        )
    return 0
