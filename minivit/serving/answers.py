"""The answers to a batch of images: labels, probabilities, exits, and where the model looked."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from math import prod
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..inference.classifier import Classifier
from ..inference.predictor import ELEMENTS
from ..models.base import Backbone
from ..plots.attention import attention_probabilities, attention_rollout, to_patches

Answer = dict[str, Any]


def has_attention(classifier: Classifier) -> bool:
    """Whether `answers` can tell where the model looked."""
    backbones: list[Backbone] = classifier.model.backbones()
    return backbones[0].attends


def plan_sizes(classifier: Classifier, batch_size: int) -> list[int]:
    """The numbers of images for which plans are recorded, at most 4: powers of 4, and the largest batch."""
    largest = min(batch_size, max(1, ELEMENTS // prod(classifier.config.image_shape)))
    return [4**k for k in range(3) if 4**k < largest] + [largest]


def fitting(waiting: int, sizes: Sequence[int]) -> tuple[int, int]:
    """(how many of the images that wait are computed now, by a plan for how many), so that at most half of a plan is wasted."""
    above = next((size for size in sizes if size >= waiting), sizes[-1])
    if above <= 2 * waiting:
        return min(waiting, above), above
    below = max(size for size in sizes if size <= waiting)
    return below, below


def answers(classifier: Classifier, pixels: np.ndarray, budget: float | None, attention: Sequence[bool], size: int) -> list[Answer]:
    """One answer for each image of (n, H, W, C) uint8, computed by a plan for `size` images.

    attention: for which images it is told where the model looked. Raises UserError for a budget that the model has not, and for logits that
    are not finite.
    """
    n = len(pixels)
    prediction = classifier.predict(pixels[np.arange(size) % n], budget)
    if not np.isfinite(prediction.probabilities[:n]).all():
        raise UserError("the model's logits are not finite: train it again with a smaller lr")
    columns = zip(prediction.names[:n], prediction.probabilities.tolist(), prediction.exits.tolist(), prediction.macs.tolist())
    found = []
    for label, probabilities, exit, macs in columns:
        answer = {"label": label, "probability": max(probabilities), "probabilities": dict(zip(classifier.class_names, probabilities))}
        found.append(answer | ({"exit": exit + 1, "macs": macs} if classifier.num_exits > 1 else {}))
    wanted = np.flatnonzero(attention)
    for exit in np.unique(prediction.exits[wanted]):
        places = wanted[prediction.exits[wanted] == exit]
        for place, maps in zip(places, _attention_maps(classifier, pixels[places], int(exit))):
            found[place]["attention"] = {"picture": _data_url(pixels[place]), "maps": maps}
    return found


def _attention_maps(classifier: Classifier, pixels: np.ndarray, exit: int) -> list[list[Any]]:
    """For each image the maps (rows, columns) of its attention rollout in 0..1: one at its exit, or one for each branch of a CrossViT.

    The smallest value of each map, a baseline due to the residual connections, is subtracted.
    """
    model = classifier.model
    backbones = model.backbones()
    (inputs,) = classifier.preprocessing.batches(pixels, len(pixels))
    maps = []
    for k in [exit] if model.num_exits > 1 else range(len(backbones)):
        rollout = attention_rollout(attention_probabilities(model, inputs, k))
        heat = to_patches(rollout, backbones[k].grid, bool(backbones[0].prefix))  # (n, rows, columns)
        heat = heat - heat.min((1, 2), keepdims=True)
        maps.append(np.round(heat / np.maximum(heat.max((1, 2), keepdims=True), 1e-30), 4).tolist())
    return [list(of_image) for of_image in zip(*maps)]


def _data_url(pixels: np.ndarray) -> str:
    """What the model sees of an image, (H, W, C) uint8, as a PNG in a data: URL."""
    file = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
