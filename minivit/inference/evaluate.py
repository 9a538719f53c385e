"""Loss and accuracy of a model on labelled images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data import Batches
from .predictor import LARGEST_BATCH, Predictor


def evaluate(
    predictor: Predictor,
    images: np.ndarray,
    labels: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int,
    batch_size: int = LARGEST_BATCH,
) -> tuple[float, list[float]]:
    """(mean cross-entropy of the last exit, accuracy in 0..1 of every exit).

    images: (n, H, W, C), uint8 or float32 in 0..1. labels: (n,).
    """
    batches = Batches(
        images, labels, batch_size=min(batch_size, len(images)), num_classes=num_classes, mean=mean, std=std, shuffle=False, drop_last=False
    )
    loss, correct = 0.0, np.zeros(predictor.stages)
    for inputs, targets in batches.epoch(0):
        logits = predictor.logits(inputs).astype(np.float64)  # (exits, B, K)
        correct += (logits.argmax(2) == targets).sum(1)
        last_logits = logits[-1] - logits[-1].max(1, keepdims=True)
        loss += float((np.log(np.exp(last_logits).sum(1)) - last_logits[np.arange(len(targets)), targets]).sum())
    return loss / len(images), (correct / len(images)).tolist()
