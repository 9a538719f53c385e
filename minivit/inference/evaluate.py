"""Loss and accuracy of a model on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..data import Batches, Dataset
from .classifier import Classifier
from .predictor import LARGEST_BATCH, Predictor


class Evaluation(NamedTuple):
    """How well a model does on labelled images."""

    loss: float  # mean cross-entropy of the last exit
    accuracies: list[float]  # of every exit, in 0..1
    balanced_accuracy: float  # of the last exit: the mean over the classes of the accuracy on the images of each
    logits: np.ndarray  # (exits, n, K) float32


def evaluate(
    predictor: Predictor,
    images: np.ndarray,
    labels: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int,
    batch_size: int = LARGEST_BATCH,
) -> Evaluation:
    """The loss and accuracy of a predictor.

    images: (n, H, W, C), uint8 or float32 in 0..1. labels: (n,).
    """
    batches = Batches(
        images, labels, batch_size=min(batch_size, len(images)), num_classes=num_classes, mean=mean, std=std, shuffle=False, drop_last=False
    )
    loss, right, all_logits = 0.0, [], []
    for inputs, targets in batches.epoch(0):
        all_logits.append(predictor.logits(inputs))  # (exits, B, K)
        logits = all_logits[-1].astype(np.float64)
        right.append(logits.argmax(2) == targets)  # (exits, B)
        last_logits = logits[-1] - logits[-1].max(1, keepdims=True)
        loss += float((np.log(np.exp(last_logits).sum(1)) - last_logits[np.arange(len(targets)), targets]).sum())
    correct = np.concatenate(right, axis=1)
    counts = np.bincount(labels, minlength=num_classes)
    recalls = np.bincount(labels, correct[-1], num_classes)[counts > 0] / counts[counts > 0]
    return Evaluation(loss / len(images), correct.mean(1).tolist(), float(recalls.mean()), np.concatenate(all_logits, axis=1))


def evaluate_on(classifier: Classifier, dataset: Dataset) -> Evaluation:
    """The loss and accuracy of a classifier on the test images of a dataset, normalised as the classifier's own images were."""
    how = classifier.preprocessing
    return evaluate(classifier.predictor, dataset.test_images, dataset.test_labels, how.mean, how.std, dataset.num_classes)
