"""The command line: minivit train | eval | predict | calibrate | plot | gradcheck | info.

Results go to standard output, progress and errors to standard error. Exit status: 0; 1 where a gradient check fails; 2 for a mistake of
the user's, told in one line; 130 for an interrupt. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, NoReturn, Union, get_args, get_origin, get_type_hints

from . import __version__
from .errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np

    from .calibration import Calibration
    from .checking import Report
    from .data import Dataset
    from .module import Module
    from .predict import Classifier
    from .thresholds import Outcome


class Parser(argparse.ArgumentParser):
    """Tells a mistake as a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help tells more")


@dataclass(frozen=True)
class Command:
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's; returns the exit status."""
    try:
        options = _parse(sys.argv[1:] if arguments is None else list(arguments))
        with _on_threads(getattr(options, "threads", None)):
            return COMMANDS[options.command].run(options)
    except UserError as error:
        print(f"minivit: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from .kernels.core.errors import DeviceError

        if not isinstance(error, DeviceError):
            raise
        print(f"minivit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"minivit: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minivit ... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextmanager
def _on_threads(number: int | None) -> Iterator[None]:
    """Inside, so many threads compute; None changes nothing. Raises UserError."""
    if number is None:
        yield
        return
    from .kernels.cpu.run import threads_set
    from .threads import thread_count

    with threads_set(thread_count(number)):
        yield


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="STR", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--precision", metavar="STR", help="float32, bf16x3, bfloat16, or auto, the fastest here (default: float32)")


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="INT", help="how many compute (default: as many as there are cores)")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser("minivit", description="Train and run small vision transformers and mixers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"minivit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    name = arguments[0] if arguments else "--help"
    if not name.startswith("-") and name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}: choose {', '.join(COMMANDS)}")
    subparsers = {n: commands.add_parser(n, help=c.help, description=c.help, allow_abbrev=False) for n, c in COMMANDS.items()}
    if name in COMMANDS:  # the others' options need not be known, nor what they import
        COMMANDS[name].configure(subparsers[name])
        subparsers[name].add_argument("--json", action="store_true", help="print the result as JSON")
    options, unknown = parser.parse_known_args(arguments or ["--help"])
    if unknown:
        known = [option for action in subparsers[name]._actions for option in action.option_strings]
        raise UserError(f"unknown option {unknown[0]}{nearest(unknown[0], known)}; minivit {name} --help lists them")
    return options


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


# ------------------------------------------------------------------------------------------------------------------------ train
NOT_OPTIONS = {"model_options", "progress"}  # of train(): the first is --model-option, the second depends on --quiet


def _configure_train(parser: argparse.ArgumentParser) -> None:
    """An option for each keyword of `train`, told by its docstring."""
    from .training import train

    hints, told = get_type_hints(train), dict(_arguments_told(train))
    for name, parameter in inspect.signature(train).parameters.items():
        if name in NOT_OPTIONS:
            continue
        flag, kind, default = "--" + name.replace("_", "-"), _simplest(hints[name]), parameter.default
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=told[name])
        else:
            shown = "" if default is None else f" (default: {default})"
            parser.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=told[name] + shown)
    parser.add_argument(
        "--model-option", action="append", default=[], metavar="NAME=VALUE", help=told["model_options"] + "; may be repeated"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _simplest(hint: Any) -> Any:
    """The type that a word of the command line is turned into: the first of int, float, bool and str that the annotation allows."""
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)  # Python 3.10 makes a Union of a default None
    return next((t for t in (bool, int, float) if t in allowed), str)


def _arguments_told(function: Callable) -> Iterator[tuple[str, str]]:
    """(name, text) of each "name: text" line of a docstring, and the lines indented below it."""
    for match in re.finditer(r"^( *)(\w+): (.*(?:\n\1 +.*)*)", inspect.getdoc(function) or "", re.MULTILINE):
        yield match[2], " ".join(match[3].split()).replace("%", "%%")


def _run_train(options: argparse.Namespace) -> int:
    from .training import train

    given = vars(options)
    keywords = {name: given[name] for name in inspect.signature(train).parameters if name in given}
    run = train(**keywords, model_options=dict(map(assignment, options.model_option)), progress=not options.quiet)
    if options.json:
        _print_json({"test_accuracy": run.test_accuracy, "folder": str(run.folder), "history": run.history})
    else:
        print(f"test accuracy {100 * run.test_accuracy:.1f} %{_by_exit(run.history[-1].get('exit_accuracies', []))} · {run.folder}")
    return 0


def _by_exit(accuracies: Sequence[float]) -> str:
    return f" ({', '.join(f'{100 * accuracy:.1f}' for accuracy in accuracies)} by exit)" if len(accuracies) > 1 else ""


def assignment(text: str, option: str = "--model-option") -> tuple[str, Any]:
    """("depth", 4) from "depth=4"; a value that is no JSON is a string. Raises UserError, naming the option, for another text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise UserError(f"{option} takes NAME=VALUE, as depth=4, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# ------------------------------------------------------------------------------------------------------------- eval and predict
def _configure_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name below runs/, or a .safetensors file of minivit")
    parser.add_argument("--data", metavar="STR", help="test images: a name, folder or .npz file (default: those of the run)")
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out images that cannot be read, and name them")
    _add_precision(parser)
    _add_threads(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _run_eval(options: argparse.Namespace) -> int:
    from .predict import evaluate, load

    classifier = load(options.run, options.precision, options.device)
    dataset = _test_data(options, classifier)
    kept = classifier.preprocessing
    loss, accuracies = evaluate(classifier.predictor, dataset.test_images, dataset.test_labels, kept.mean, kept.std, dataset.num_classes)
    number = len(dataset.test_images)
    if options.json:
        _print_json(
            {"test_accuracy": accuracies[-1], "exit_accuracies": accuracies, "test_loss": loss, "images": number, "data": dataset.name}
        )
    else:
        print(
            f"test accuracy {100 * accuracies[-1]:.1f} %{_by_exit(accuracies)} · test loss {loss:.4f} · {number} images of {dataset.name}"
        )
    return 0


def _test_data(options: argparse.Namespace, classifier: Classifier) -> Dataset:
    """The data that the options name, or else the run's, at the model's size and with its classes."""
    from .runs import data_of_run

    return data_of_run(options.run, classifier, options.data, skip_bad_images=options.skip_bad_images, progress=not options.quiet)


def _configure_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, its name below runs/, or a .safetensors file of minivit")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="FLOAT",
        help="of a calibrated cascade: largest mean cost of an image, in the unit "
        "of its calibration; without it every image goes to the last exit",
    )
    _add_precision(parser)
    _add_threads(parser)


def _run_predict(options: argparse.Namespace) -> int:
    from .predict import load

    classifier = load(options.run, options.precision, options.device)
    prediction = classifier.predict(options.images, options.budget)
    rows = [
        {"path": path, "label": name, "probability": max(probabilities)}
        for path, name, probabilities in zip(options.images, prediction.names, prediction.probabilities.tolist())
    ]
    if classifier.predictor.stages > 1:
        rows = [
            {**row, "exit": exit + 1, "macs": macs} for row, exit, macs in zip(rows, prediction.exits.tolist(), prediction.macs.tolist())
        ]
    if options.json:
        _print_json(
            [
                {**row, "probabilities": dict(zip(prediction.class_names, probabilities))}
                for row, probabilities in zip(rows, prediction.probabilities.tolist())
            ]
        )
    else:
        for row in rows:
            path, label, probability, *taken = row.values()
            print(path, label, f"{probability:.4f}", *([taken[0], f"{taken[1] / 1e6:.3f}"] if taken else []), sep="\t")
    return 0


# ------------------------------------------------------------------------------------------------------------------------ calibrate
def _configure_calibrate(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out images that cannot be read, and name them")
    _add_precision(parser)
    _add_threads(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _run_calibrate(options: argparse.Namespace) -> int:
    from .calibrating import calibrate, halves, measured_exits
    from .checkpoint import find_model
    from .predict import load
    from .thresholds import outcome

    classifier = load(options.run, options.precision, options.device)
    dataset = _test_data(options, classifier)
    images, labels = dataset.test_images, dataset.test_labels
    half, rest = halves(labels)
    found = calibrate(
        classifier, images[half], labels[half], options.budgets, options.unit, options.method, options.confidence, options.batch_size
    )
    sure, correct = measured_exits(classifier.predictor, classifier.preprocessing.batches(images[rest]), labels[rest], found.confidence)
    tested = [outcome(thresholds, sure, correct, found.costs) for thresholds in found.thresholds]
    file = find_model(Path(options.run))
    classifier.save(file)
    if options.json:
        _print_json(
            {
                "file": str(file),
                "data": dataset.name,
                "calibration": found.to_json(),
                "unseen": {
                    "images": len(rest),
                    "exit_accuracies": correct.mean(0).tolist(),
                    "outcomes": [each._asdict() for each in tested],
                },
            }
        )
        return 0
    print(f"{found.images} images of {dataset.name} for calibration, {len(rest)} others for testing; accuracies and shares in %\n")
    _print_calibration(found, correct.mean(0), tested)
    print(
        f"\nsaved with the model: {file}\nuse: minivit predict {options.run} IMAGE ... --budget {found.budgets[0]:.6g}   (any of these: "
        f"{', '.join(f'{budget:.6g}' for budget in found.budgets)})"
    )
    return 0


def _print_calibration(found: Calibration, exit_accuracies: np.ndarray, tested: Sequence[Outcome]) -> None:
    """exit_accuracies, tested: on other images, by exit and by budget."""
    scale, unit = {"macs": (1e-6, "M"), "ms": (1, "ms"), "share": (100, "%")}[found.unit]
    alone = zip(found.macs, found.costs, found.exit_accuracies, exit_accuracies)
    print(
        _table(
            ["exit alone", "M multiply-adds", f"cost, {unit}", "calibration: accuracy", "testing: accuracy"],
            [
                [str(k), f"{macs / 1e6:.3f}", f"{scale * cost:.3f}", f"{100 * calibrated:.2f}", f"{100 * unseen:.2f}"]
                for k, (macs, cost, calibrated, unseen) in enumerate(alone, 1)
            ],
        )
        + "\n"
    )

    def cells(accuracy: float, cost: float, shares: Sequence[float]) -> list[str]:
        return [f"{100 * accuracy:.2f}", f"{scale * cost:.3f}", " ".join(f"{100 * share:4.1f}" for share in shares)]

    columns = ("accuracy", f"cost, {unit}", "by exit")
    calibrated = map(cells, found.accuracies, found.mean_costs, found.exit_shares)
    print(
        _table(
            [f"budget, {unit}", "thresholds", f"calibration: {columns[0]}", *columns[1:], f"testing: {columns[0]}", *columns[1:]],
            [
                [f"{scale * budget:.3f}", " ".join(map(_threshold, thresholds)), *before, *cells(*unseen)]
                for budget, thresholds, before, unseen in zip(found.budgets, found.thresholds, calibrated, tested)
            ],
        )
    )


def _threshold(value: float) -> str:
    return "all" if value <= 0 else "none" if value > 1 else f"{value:.4f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, two spaces apart."""
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


# ----------------------------------------------------------------------------------------------------------------------------- plot
def _configure_plot(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out test images that cannot be read, and name them")
    _add_threads(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _run_plot(options: argparse.Namespace) -> int:
    from .plots import draw_run

    paths = draw_run(
        options.run,
        options.data,
        options.images,
        options.out,
        options.budget,
        skip_bad_images=options.skip_bad_images,
        progress=not options.quiet,
    )
    if options.json:
        _print_json([str(path) for path in paths])
    else:
        print(*paths, sep="\n")
    return 0


# ----------------------------------------------------------------------------------------------------------- gradcheck and info
def _configure_gradcheck(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="OP|MODEL", nargs="*", help="what to check (default: every op, and a small model of each family)")


def _run_gradcheck(options: argparse.Namespace) -> int:
    from .checking import check
    from .models import list_models

    smallest = {name.partition("_nano_")[0]: name for name in list_models("*_nano_*8")}  # of each family
    models = {name: _model_to_check(name) for name in (list_models() if options.names else smallest.values())}
    names = [smallest.get(name, name) for name in options.names]
    reports: list[Report] = []
    header = f"{'':6} {'name':<24} {'backend':<9} {'dtype':<8} {'against':<11} {'directions':>10} {'elements':>9}  worst relative error"
    for report in check(names, models):
        if not options.json:
            if not reports:
                print(header)
            verdict = "ok" if report.passed else "FAILED"
            print(
                f"{verdict:<6} {report.name:<24} {report.backend:<9} {report.dtype:<8} {report.against:<11} {report.directions:>10} "
                f"{report.elements:>9}  {report.worst:.1e}",
                flush=True,
            )
        reports.append(report)
    failures = [report.failure for report in reports if not report.passed]
    if options.json:
        _print_json(
            [{**asdict(report), "worst": report.worst if isfinite(report.worst) else None, "passed": report.passed} for report in reports]
        )
    for failure in failures:
        print(f"minivit: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _model_to_check(name: str) -> Callable[[], tuple[Module, np.ndarray]]:
    def make() -> tuple[Module, np.ndarray]:
        import numpy as np

        from .models import create_model

        model = create_model(name, dtype="float64")
        config = model.config
        images = np.random.default_rng(0).standard_normal((2, config.in_channels, config.image_size, config.image_size))
        return model.eval(), images

    return make


def _configure_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a model's name, or a run: its parameters and multiply-adds instead")
    parser.add_argument("--layers", action="store_true", help="the multiply-adds of each layer of MODEL too")


def _run_info(options: argparse.Namespace) -> int:
    from . import info

    if options.layers and options.model is None:
        raise UserError("--layers tells of a model: minivit info MODEL --layers")
    found = info.collect() if options.model is None else info.collect_model(options.model)
    if options.json:
        _print_json(found)
    else:
        print(info.describe(found) if options.model is None else info.describe_model(found, options.layers))
    return 0


COMMANDS = {
    "train": Command("train a model; without options, a small vision transformer on handwritten digits", _configure_train, _run_train),
    "eval": Command("test accuracy of a trained model", _configure_eval, _run_eval),
    "predict": Command(
        "label images: path, label and probability, a line each; of a cascade also the exit and its million multiply-adds",
        _configure_predict,
        _run_predict,
    ),
    "calibrate": Command(
        "thresholds by which a cascade stops early, for budgets; they are saved with the model", _configure_calibrate, _run_calibrate
    ),
    "plot": Command("draw all pictures that fit a run into its folder; the path of each, a line each", _configure_plot, _run_plot),
    "gradcheck": Command("check the kernels' gradients and accuracy on this machine", _configure_gradcheck, _run_gradcheck),
    "info": Command("what minivit sees of this machine; of a model, its parameters and multiply-adds", _configure_info, _run_info),
}
