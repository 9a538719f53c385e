"""What the logits of labelled images tell: confusions, scores of classes, and whether probabilities can be believed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BINS = 15  # of confidences, as in the tables of 1706.04599
SHARPEST, FLATTEST = 1e-2, 1e2  # temperatures between which one is looked for


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of each class (rows) were taken for each class (columns): (K, K) int64. labels, predicted: (n,)."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


class ClassScores(NamedTuple):
    """Scores of K classes, each (K,); NaN where a score is not defined."""

    precision: np.ndarray  # of the images that were taken for the class, the share that is of it
    recall: np.ndarray  # of the images of the class, the share that was taken for it
    f1: np.ndarray  # the harmonic mean of both
    support: np.ndarray  # images of the class


def class_scores(confusion: np.ndarray) -> ClassScores:
    """The scores of each class from a `confusion_matrix`; NaN without an image of the class, and a precision without a prediction of it."""
    right, support, taken = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        return ClassScores(right / taken, right / support, np.where(support > 0, 2 * right / (support + taken), np.nan), support)


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature) in float64: (n, K)."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


class Reliability(NamedTuple):
    """Confidences and accuracies by bins of confidence (1706.04599, section 2)."""

    counts: np.ndarray  # (bins,) images
    confidences: np.ndarray  # (bins,) their mean confidence; NaN without images
    accuracies: np.ndarray  # (bins,) the share of them that is right; NaN without images

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over images of |accuracy - confidence| of their bin (equation 3)."""
        there = self.counts > 0
        return float((self.counts * np.abs(self.accuracies - self.confidences))[there].sum() / self.counts.sum())


def reliability(confidences: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """confidences: (n,) in 0..1, of the predictions. correct: (n,) bool. Bins are equally wide, ((m - 1) / bins, m / bins]."""
    bin_of = np.clip(np.ceil(confidences * bins).astype(np.int64) - 1, 0, bins - 1)  # (n,)
    counts = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(counts, *(np.bincount(bin_of, values, bins) / counts for values in (confidences, correct)))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """The temperature T for which softmax(logits / T) has the lowest mean cross-entropy (1706.04599, section 4.2).

    logits: (n, K), of images that the model was not trained on. labels: (n,). The cross-entropy is convex in 1/T, so its slope is halved
    until it is 0. None if there is no lowest one between T = 0.01 and 100, as where all images are right.
    """
    values = logits.astype(np.float64)
    of_truth = values[np.arange(len(labels)), labels]  # (n,)

    def slope(inverse: float) -> float:
        return float(((probabilities(values, 1 / inverse) * values).sum(1) - of_truth).mean())

    low, high = 1 / FLATTEST, 1 / SHARPEST
    if slope(low) >= 0 or slope(high) <= 0:
        return None
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5
