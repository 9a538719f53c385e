"""`draw_run`: all plots that apply to a run, as PNG files.

    curves.png            learning curves
    filters.png           principal components of the patch filters
    positions.png         ViT, FF-only: similarity of position embeddings
    token_mixing.png      Mixer, FF-only: the weights from patches to hidden units of the token-mixing MLPs
    attention.png         ViT: the attention of each head to each patch of an image
    rollout.png           ViT: attention rollout for several images
    accuracy_cost.png     calibrated cascade: accuracy on test images against mean multiply-adds
    accuracy_ms.png       calibrated cascade: accuracy on test images against milliseconds measured on this machine
    exits.png             calibrated cascade: number of test images that leave at each exit
    exit_sheet.png        calibrated cascade: examples of images that leave early and late

For a cascade, filters, positions, token_mixing and attention are drawn for each exit, filters_exit1.png and so on, and for a CrossViT for
each branch, filters_branch1.png and so on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data import Dataset
from ..data.image_file import MAX_PIXELS
from ..errors import UserError
from ..files import user_path, writing
from ..inference.calibrate import halves, measured_exits, stage_milliseconds
from ..inference.classifier import Classifier, load
from ..inference.run_data import data_of_run
from ..io.run_folder import CURVES, RunFolder, find_model
from ..models.base import Backbone, Model
from ..models.cascade.calibration import Calibration, check, describe_cost
from ..models.cascade.thresholds import outcome
from .attention import attention_maps, attention_probabilities, attention_rollout, rollout_maps
from .curves import accuracy_cost_curve, exit_histogram, learning_curves
from .figure import save_figure
from .images import exit_sheet
from .weights import patch_filters, position_similarity, token_mixing_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pictures = Iterator[tuple[str, "Figure"]]

SHOWN = 6  # default number of test images in attention plots
BLOCKS = 4  # number of blocks, from the first, in token-mixing plots
BATCH = 64  # batch size for time measurements
TIMED = 4  # batches per round of time measurements
ROUNDS, SECONDS = 9, 20.0  # maximum number of rounds, and the time after which no further round starts
AS_GOOD = 0.002  # accuracy that the default budget may lose against the last exit


def draw_run(
    run: str | os.PathLike[str],
    data: str | None = None,
    images: Sequence[Any] = (),
    out: str | os.PathLike[str] | None = None,
    budget: float | None = None,
    *,
    skip_bad_images: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
) -> list[Path]:
    """Draw all plots that apply to a run (see `minivit.plots.run`); returns the paths of the files.

    run: the folder, its name in runs/, or a .safetensors file. data: a dataset whose test images replace those of the run (`load_data`).
    images: images for the attention plots instead of test images: files or anything that `Classifier.predict` takes; attention.png shows
    the first of them. out: the output folder; None: the run folder. budget: for exits.png and exit_sheet.png of a calibrated cascade; None:
    the smallest that is as accurate as the last exit, otherwise the largest.
    Raises UserError, before anything is drawn, for a missing run, image or threshold, and if test images are needed but the run does not
    record its data.
    """
    file = find_model(Path(run))
    classifier = load(file)
    model = classifier.model
    stages: list[Backbone] = model.backbones()
    calibration: Calibration | None = model.calibration
    if calibration is not None:
        check(calibration, model)
    if budget is not None:
        if calibration is None:
            raise UserError(f"budget={budget:g} is for a cascade with thresholds: calibrate it first (minivit calibrate)")
        calibration.for_budget(budget)  # raises UserError if the budget is not available
    if len(images) and not stages[0].attends:
        raise UserError(f"images are for laying attention over them, and {model.name} has none: leave them out")
    pixels = classifier.preprocessing.pixels(images, max_pixels) if len(images) else None
    dataset, unseen = None, np.empty(0, np.int64)
    if calibration or (stages[0].attends and pixels is None):
        dataset = data_of_run(run, classifier, data, skip_bad_images=skip_bad_images, max_pixels=max_pixels, progress=progress)
        if calibration:  # `minivit calibrate` uses the other half
            _, unseen = halves(dataset.test_labels)
    history = RunFolder(file.parent).read_metrics()

    def pictures() -> Pictures:
        if history:
            yield CURVES, learning_curves(history, model.name)
        yield from _weights(stages, model)
        attention_images = _one_per_class(dataset) if pixels is None and dataset else pixels
        if stages[0].attends and attention_images is not None:
            yield from _attention(classifier, stages, attention_images)
        if calibration and dataset:
            yield from _cascade(classifier, calibration, dataset.name, dataset.test_images[unseen], dataset.test_labels[unseen], budget)

    folder, paths = file.parent if out is None else user_path(out), []
    for picture, figure in pictures():
        paths.append(folder / picture)
        with writing(paths[-1]):
            save_figure(figure, paths[-1])
    return paths


def _one_per_class(dataset: Dataset) -> np.ndarray:
    """The first test image of each of the first classes: (n, H, W, C)."""
    return dataset.test_images[np.unique(dataset.test_labels, return_index=True)[1][:SHOWN]]


def _for_each(stages: Sequence[Backbone], model: Model) -> Iterator[tuple[Any, str, str]]:
    """Yields (stage, suffix of its file names, title) for each stage, or for each branch."""
    name, part = model.name, model.part_name
    if len(stages) == 1:
        yield stages[0], "", name
    else:
        yield from ((stage, f"_{part}{k}", f"{name}, {part} {k}") for k, stage in enumerate(stages, 1))


# --------------------------------------------------------------------------------------------------------------------- weights
def _weights(stages: Sequence[Backbone], model: Model) -> Pictures:
    for stage, suffix, title in _for_each(stages, model):
        filters, positions, mixing = stage.patch_filters(), stage.position_embedding(), stage.token_mixing_weights()[:BLOCKS]
        if filters is not None:
            yield f"filters{suffix}.png", patch_filters(filters, title=title)
        if positions is not None:
            yield f"positions{suffix}.png", position_similarity(positions[0], positions[1], title=title)
        if mixing:
            yield f"token_mixing{suffix}.png", token_mixing_maps(mixing, stage.grid, title=title)


# ------------------------------------------------------------------------------------------------------------------- attention
def _attention(classifier: Classifier, stages: Sequence[Backbone], pixels: np.ndarray) -> Pictures:
    inputs = np.concatenate(list(classifier.preprocessing.batches(pixels)))  # (n, C, H, W)
    model, class_token, rollouts = classifier.model, stages[0].prefix, []
    for k, (stage, suffix, title) in enumerate(_for_each(stages, model)):
        probabilities = attention_probabilities(classifier.model, inputs, k)
        rollouts.append(attention_rollout(probabilities))  # (n, N, N)
        yield (
            f"attention{suffix}.png",
            attention_maps(pixels[0], [block[0] for block in probabilities], stage.grid, class_token, title=title),
        )
    prediction = classifier.predict(pixels)
    captions = [f"{label} · {100 * confidence:.0f} %" for label, confidence in zip(prediction.names, prediction.confidence)]
    yield (
        "rollout.png",
        rollout_maps(pixels, rollouts, [stage.grid for stage in stages], class_token, captions, model.name, model.part_name),
    )


# --------------------------------------------------------------------------------------------------------------------- cascades
def _cascade(
    classifier: Classifier, calibration: Calibration, data: str, images: np.ndarray, labels: np.ndarray, budget: float | None
) -> Pictures:
    predictor, batches = classifier.predictor, classifier.preprocessing.batches
    confidences, correct = measured_exits(predictor, batches(images), labels, calibration.confidence)  # (n, K) both
    budgets = dict(zip(reversed(calibration.thresholds), reversed(calibration.budgets)))  # the smallest of equal ones
    outcomes = [outcome(thresholds, confidences, correct, calibration.macs) for thresholds in budgets]
    exit_accuracies = correct.mean(0)  # (K,)
    title = f"{classifier.model.name}: {len(images)} test images of {data}"
    yield (
        "accuracy_cost.png",
        accuracy_cost_curve(
            [(result.mean_cost, result.accuracy) for result in outcomes], list(zip(calibration.macs, exit_accuracies)), "macs", title
        ),
    )
    timed = list(batches(images[np.arange(BATCH * TIMED) % len(images)], BATCH))
    cascade = zip(_milliseconds(classifier, timed, [*budgets.values()]), [result.accuracy for result in outcomes])
    exits = zip(stage_milliseconds(predictor.model, timed[0], BATCH), exit_accuracies)
    yield "accuracy_ms.png", accuracy_cost_curve(list(cascade), list(exits), "ms", f"{title}, batch {BATCH}")
    budget = _as_good(calibration) if budget is None else budget
    prediction = classifier.predict(images, budget)
    title = f"{title}\nbudget {describe_cost(budget, calibration.unit)}\nspent {describe_cost(prediction.macs.mean(), 'macs')} an image"
    yield "exits.png", exit_histogram(prediction.exits, len(exit_accuracies), prediction.labels == labels, title)
    yield (
        "exit_sheet.png",
        exit_sheet(images, prediction.exits, prediction.confidence, prediction.names, [classifier.class_names[k] for k in labels]),
    )


def _as_good(calibration: Calibration) -> float:
    """The smallest budget with almost the accuracy of the last exit, otherwise the largest."""
    required = calibration.exit_accuracies[-1] - AS_GOOD
    return next((b for b, accuracy in zip(calibration.budgets, calibration.accuracies) if accuracy >= required), calibration.budgets[-1])


def _milliseconds(classifier: Classifier, batches: Sequence[np.ndarray], budgets: Sequence[float]) -> np.ndarray:
    """Milliseconds per image for each budget, (budgets,): medians over rounds that measure every budget once."""
    predict = classifier.predictor.predict
    rounds: list[list[float]] = []
    for budget in budgets:
        for batch in batches:  # records the plans
            predict(batch, budget)
    first_start = perf_counter()
    while not rounds or (len(rounds) < ROUNDS and perf_counter() - first_start < SECONDS):
        rounds.append([])
        for budget in budgets:
            start = perf_counter()
            for batch in batches:
                predict(batch, budget)
            rounds[-1].append(perf_counter() - start)
    return 1e3 / sum(map(len, batches)) * np.median(rounds, axis=0)
