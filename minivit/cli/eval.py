"""`minivit eval`: test accuracy of a trained model."""

from __future__ import annotations

import argparse

from ..inference.classifier import load
from ..inference.evaluate import evaluate
from .options import add_test_options, test_data
from .output import by_exit, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name below runs/, or a .safetensors file of minivit")
    parser.add_argument("--data", metavar="STR", help="test images: a name, folder or .npz file (default: those of the run)")
    add_test_options(parser)


def run(options: argparse.Namespace) -> int:
    classifier = load(options.run, options.precision, options.device)
    dataset = test_data(options, classifier)
    preprocessing = classifier.preprocessing
    loss, accuracies = evaluate(
        classifier.predictor, dataset.test_images, dataset.test_labels, preprocessing.mean, preprocessing.std, dataset.num_classes
    )
    if options.json:
        print_json(
            {
                "test_accuracy": accuracies[-1],
                "exit_accuracies": accuracies,
                "test_loss": loss,
                "images": len(dataset.test_images),
                "part": "all" if dataset.is_whole else "test",
                "data": dataset.name,
            }
        )
    else:
        print(f"test accuracy {100 * accuracies[-1]:.1f} %{by_exit(accuracies)} · test loss {loss:.4f} · {dataset.test_part()}")
    return 0
