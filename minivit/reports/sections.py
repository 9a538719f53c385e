"""The sections of a report, each as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from ..data import Dataset
from ..errors import UserError
from ..inference.calibrate import halves
from ..inference.classifier import Classifier
from ..inference.evaluate import Evaluation
from ..inference.metrics import class_scores, confusion_matrix, fit_temperature, probabilities, reliability
from ..kernels.cpu.run import threads
from ..models.cascade.calibration import check, confidence, describe_cost
from ..models.cascade.thresholds import outcome
from ..nn.module import device_of
from ..plots.curves import accuracy_cost_curve, learning_curves
from ..plots.judgement import confusion_picture, reliability_diagram
from ..runtime.machine import cpu_name
from ..sides import times
from .page import heading, key_figures, paragraph, picture, sheet, table

SHOWN = 18  # images of a sheet
CONFUSIONS = 10  # of the most frequent ones
BATCH = 64  # images that are predicted together where the speed is measured
ROUNDS, SECONDS = 7, 0.3  # of a measurement: how many at most, and when no further one begins
OWN_ROWS = {"model", "epochs", "augmentation", "precision", "class_weights"}  # arguments that stand apart from the recipe
NOT_TOLD = {"data", "device", "skip_bad_images", "max_pixels", "model_options", "weights"}  # and those that are no part of it


@dataclass(frozen=True)
class Subject:
    """What a report is about.

    tested: of the test images of `dataset`. held_out: (logits (m, K), labels (m,)) of the validation part, if there is one. own: whether
    the dataset is that of the training.
    """

    classifier: Classifier
    dataset: Dataset
    tested: Evaluation
    held_out: tuple[np.ndarray, np.ndarray] | None
    config: Mapping[str, Any]
    history: list[dict[str, Any]]
    own: bool

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Those of the last exit, (n, K)."""
        return probabilities(self.tested.logits[-1])

    @property
    def labels(self) -> np.ndarray:
        return self.dataset.test_labels

    @cached_property
    def correct(self) -> np.ndarray:
        """Whether the last exit is right, (n,) bool."""
        return self.probabilities.argmax(1) == self.labels

    @cached_property
    def speeds(self) -> dict[int, float]:
        """Images a second by the number of images that are predicted together, measured now."""
        return {batch: _speed(self.classifier, self.dataset.test_images, batch) for batch in (1, BATCH)}

    @cached_property
    def machine(self) -> str:
        device = device_of(self.classifier.model)
        count = threads()
        return f"{cpu_name()}, {count} thread{'s' * (count > 1)}" if device == "cpu" else device


def sections(subject: Subject) -> Iterator[str]:
    """All sections, from the title on."""
    yield from _summary(subject)
    if subject.history:
        yield heading("Learning curves")
        yield picture(learning_curves(subject.history), "losses and accuracy by epoch")
    if len(subject.tested.accuracies) > 1:
        yield from _exits(subject)
    yield from _classes(subject)
    yield from _images(subject)
    yield from _confidence(subject)
    yield from _choices(subject)
    yield from _cost(subject)


def percent(share: float, digits: int = 1) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.{digits}f} %"


def _summary(subject: Subject) -> Iterator[str]:
    model, tested, count = subject.classifier.model, subject.tested, len(subject.labels)
    accuracy = tested.accuracies[-1]
    error = (accuracy * (1 - accuracy) / count) ** 0.5
    yield heading(f"{model.name} on {subject.dataset.name}", 1)
    predictor = subject.classifier.predictor
    mirrored = ", each with its mirror image" if predictor.tta else ""
    yield paragraph(
        f"{subject.dataset.test_part()}, {times(subject.dataset.test_images.shape[1:])}, {subject.dataset.num_classes} classes; "
        f"predicted in {predictor.precision.name}{mirrored}. "
        f"By chance of which images these are, the accuracy has a standard error of {percent(error)}."
    )
    yield key_figures(
        [
            (percent(accuracy), "test accuracy"),
            (percent(tested.balanced_accuracy), "balanced accuracy"),
            (f"{tested.loss:.4f}", "test loss"),
            (f"{_parameters(subject.classifier):,}", "parameters"),
            (_short(model.cost().total), "multiply-adds an image"),
            (f"{subject.speeds[BATCH]:,.0f}", "images a second"),
        ]
    )


def _parameters(classifier: Classifier) -> int:
    return sum(p.size for p in classifier.model.distinct_parameters())


def _short(number: float) -> str:
    factor, unit = next(((f, u) for f, u in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if number >= f), (1, ""))
    return f"{number / factor:.3g}{unit}"


# ------------------------------------------------------------------------------------------------------------------------ exits
def _exits(subject: Subject) -> Iterator[str]:
    model, accuracies = subject.classifier.model, subject.tested.accuracies
    costs = model.cost().exits
    yield heading("Exits")
    rows = [(k, f"{macs:,}", percent(macs / costs[-1]), percent(a)) for k, (macs, a) in enumerate(zip(costs, accuracies), 1)]
    yield table(["exit", "multiply-adds", "share of all", "accuracy"], rows)
    calibration = model.calibration
    if calibration is None:
        yield paragraph("No image stops early yet: minivit calibrate finds the thresholds for that.", note=True)
        return
    try:
        check(calibration, model)
        _, unseen = halves(subject.labels)
    except UserError as error:
        yield paragraph(f"Its thresholds are not judged: {error}.", note=True)
        return
    logits, labels = subject.tested.logits[:, unseen], subject.labels[unseen]
    confidences, correct = confidence(logits, calibration.confidence).T, (logits.argmax(-1) == labels).T  # (m, exits) both
    outcomes = [outcome(thresholds, confidences, correct, calibration.macs) for thresholds in calibration.thresholds]
    yield table(
        ["budget", "accuracy", "multiply-adds an image", "share of all", "images by exit"],
        [
            (
                describe_cost(budget, calibration.unit),
                percent(result.accuracy),
                f"{result.mean_cost:,.0f}",
                percent(result.mean_cost / costs[-1]),
                ", ".join(percent(share, 0) for share in result.shares),
            )
            for budget, result in zip(calibration.budgets, outcomes)
        ],
    )
    yield paragraph(f"On {len(unseen)} of the images, the half that minivit calibrate leaves for testing.", note=True)
    alone = [*zip(calibration.macs, correct.mean(0))]
    yield picture(
        accuracy_cost_curve([(result.mean_cost, result.accuracy) for result in outcomes], alone), "accuracy against multiply-adds"
    )


# ---------------------------------------------------------------------------------------------------------------------- classes
def _classes(subject: Subject) -> Iterator[str]:
    names, classes = subject.classifier.class_names, subject.dataset.num_classes
    confusion = confusion_matrix(subject.labels, subject.probabilities.argmax(1), classes)
    scores = class_scores(confusion)
    trained = np.bincount(subject.dataset.train_labels, minlength=classes) if subject.own else None
    if subject.held_out is not None and trained is not None:
        trained -= np.bincount(subject.held_out[1], minlength=classes)
    yield heading("Classes")
    yield picture(confusion_picture(confusion, names), "confusion matrix")
    wrong = confusion * ~np.eye(classes, dtype=bool)
    often = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]]
    rows = [(names[t], names[p], wrong[t, p], percent(wrong[t, p] / scores.support[t])) for t, p in often if wrong[t, p]]
    if rows:
        yield heading("Most frequent mistakes", 3)
        yield table(["truth", "taken for", "images", "share of the class"], rows)
    yield heading("Scores of each class", 3)
    yield table(
        ["class", "precision", "recall", "F1", "support", *(["training images"] if trained is not None else [])],
        [
            (name, *(percent(score[k]) for score in scores[:3]), scores.support[k], *([trained[k]] if trained is not None else []))
            for k, name in enumerate(names)
        ],
    )
    yield paragraph(
        "Precision: of the images that were taken for the class, how many are of it. Recall: of the images of the class, how many were "
        "taken for it; its mean over the classes is the balanced accuracy. F1: the harmonic mean of both. "
        "Support: test images of the class.",
        note=True,
    )


# ----------------------------------------------------------------------------------------------------------------------- images
def _images(subject: Subject) -> Iterator[str]:
    confidences = subject.probabilities.max(1)
    wrong = np.flatnonzero(~subject.correct)
    worst = wrong[np.argsort(-confidences[wrong], kind="stable")][:SHOWN]
    yield heading("Worst mistakes")
    if len(worst):
        yield paragraph(f"{len(worst)} of {len(wrong)} wrong answers, the surest first. Some may be wrong labels.", note=True)
        yield _sheet(subject, worst)
    else:
        yield paragraph("There is none: all images were recognised.")
    unsure = np.argsort(confidences, kind="stable")[:SHOWN]
    yield heading("Least certain")
    yield paragraph("The images whose answer has the lowest probability, right or wrong.", note=True)
    yield _sheet(subject, unsure)


def _sheet(subject: Subject, chosen: np.ndarray) -> str:
    names, files, captions = subject.classifier.class_names, subject.dataset.test_files, []
    for i in chosen:
        answer = subject.probabilities[i].argmax()
        right = bool(subject.correct[i])
        captions.append([(f"{names[answer]} · {percent(subject.probabilities[i, answer])}", not right)])
        captions[-1] += [(f"truth: {names[subject.labels[i]]}", False)] * (not right) + [(files[i] if files else f"image {i}", False)]
    return sheet(subject.dataset.test_images[chosen], captions)


# ------------------------------------------------------------------------------------------------------------------- confidence
def _confidence(subject: Subject) -> Iterator[str]:
    yield heading("Can its probabilities be believed?")
    if subject.held_out is not None:
        (logits, labels), judged = subject.held_out, np.arange(len(subject.labels))
        which = f"the {len(labels)} images of the validation part, and judged on the test images"
    else:
        try:
            fitting, judged = halves(subject.labels)
        except UserError as error:
            yield paragraph(f"That takes images to fit a temperature on, and others to judge it: {error}.")
            return
        logits, labels = subject.tested.logits[-1][fitting], subject.labels[fitting]
        which = f"{len(fitting)} of the test images, half of each class, and judged on the other {len(judged)}"
    temperature = fit_temperature(logits, labels)
    answers, correct = subject.probabilities[judged], subject.correct[judged]
    before = reliability(answers.max(1), correct)
    parts = {f"as predicted: error {percent(before.error)}": before}
    told = f"no temperature was found on {which}: "
    if temperature is None:
        told += "all of these are recognised, or chance would do as well" if len(labels) else "there are none"
    else:
        after = reliability(probabilities(subject.tested.logits[-1][judged], temperature).max(1), correct)
        parts[f"with temperature {temperature:.2f}: error {percent(after.error)}"] = after
        too = "too sure" if temperature > 1 else "not sure enough"
        told = (
            f"the temperature {temperature:.3f} was fitted on {which}: the model is {too}, and softmax(logits / {temperature:.3f}) has the "
            f"lowest cross-entropy. The expected calibration error is {percent(before.error, 2)} before and {percent(after.error, 2)} after"
        )
    yield paragraph(f"{told[0].upper()}{told[1:]}.")
    yield picture(reliability_diagram(parts), "accuracy against confidence")
    yield paragraph(
        "Where answers with a confidence of 80 % are right 80 times in 100, bars end at the dashed line. The temperature changes no "
        "answer; predict does not use it. Method: Guo et al., arXiv 1706.04599, section 4, with "
        f"{len(before.counts)} bins of confidence.",
        note=True,
    )


# ------------------------------------------------------------------------------------------------------------- choices and cost
def _choices(subject: Subject) -> Iterator[str]:
    arguments, reasons = subject.config.get("arguments"), subject.config.get("reasons")
    if not isinstance(arguments, Mapping):
        return
    reasons = reasons if isinstance(reasons, Mapping) else {}
    values = {
        "model": arguments.get("model"),
        "epochs": arguments.get("epochs"),
        "recipe": ", ".join(
            f"{k} {_shown(v)}" for k, v in arguments.items() if k not in OWN_ROWS | NOT_TOLD and v not in (None, False, {})
        ),
        "augmentation": _policy(arguments.get("augmentation")),
        "precision": arguments.get("precision"),
        "class_weights": "none" if arguments.get("class_weights") is None else _shown(arguments["class_weights"]),
    }
    labels = {"class_weights": "weights of classes"}
    yield heading("What was chosen, and why")
    rows = [(labels.get(name, name), _shown(value), *([reasons.get(name, "–")] if reasons else [])) for name, value in values.items()]
    yield table(["", "chosen", *(["because"] if reasons else [])], rows, True)
    versions = ", ".join(f"{name} {subject.config[name]}" for name in ("minivit", "python", "numpy", "numba") if name in subject.config)
    yield paragraph(f"{subject.config.get('dataset', '')} · {versions}", note=True)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_shown, value)) if isinstance(value, (list, tuple)) else str(value)


def _policy(policy: Any) -> str:
    """A policy of augmentation in one line: "flip (probability 0.5), crop (padding 0.125)"."""
    if not isinstance(policy, (list, tuple)):
        return str(policy or "none")
    parts = []
    for item in policy:
        name, values = item if isinstance(item, (list, tuple)) and len(item) == 2 else (item, {})
        shown = ", ".join(f"{k} {_shown(v)}" for k, v in values.items()) if isinstance(values, Mapping) else _shown(values)
        parts.append(f"{name} ({shown})" if shown else str(name))
    return ", ".join(parts) or "none"


def _cost(subject: Subject) -> Iterator[str]:
    cost, speeds = subject.classifier.model.cost(), subject.speeds
    rows = [
        ("parameters", f"{_parameters(subject.classifier):,}"),
        ("multiply-adds an image", f"{cost.total:,}"),
        ("activations an image", f"{cost.activations:,}"),
        ("one image alone", f"{1e3 / speeds[1]:.2f} ms"),
        (f"{BATCH} images together", f"{speeds[BATCH]:,.0f} images/s"),
    ]
    trained = [line["images_per_second"] for line in subject.history if isinstance(line.get("images_per_second"), (int, float))]
    if trained:
        seconds = sum(line["seconds"] for line in subject.history if isinstance(line.get("seconds"), (int, float)))
        rows += [("training", f"{median(trained):,.0f} images/s"), ("training, tests included", f"{seconds / 60:.1f} min")]
    yield heading("Cost and speed")
    yield table(["", ""], rows)
    yield paragraph(
        f"Predictions measured on {subject.machine}, in {subject.classifier.predictor.precision.name}, "
        "while other programs may have run; those of training by itself, the median of epochs.",
        note=True,
    )


def _speed(classifier: Classifier, images: np.ndarray, batch: int) -> float:
    """Images a second: the median of rounds."""
    (inputs,) = classifier.preprocessing.batches(images[np.arange(batch) % len(images)], batch)
    classifier.predictor(inputs)  # records the plan
    rounds: list[float] = []
    start = perf_counter()
    while not rounds or (len(rounds) < ROUNDS and perf_counter() - start < SECONDS):
        before = perf_counter()
        classifier.predictor(inputs)
        rounds.append(perf_counter() - before)
    return batch / median(rounds)
