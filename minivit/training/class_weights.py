"""The weights of classes in the loss of `train`, from a table or from how many images each class has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError, nearest
from ..functional import checked_class_weights

UNEQUAL = 3  # times the images of another class, from which on a user is told


def class_weights(given: Any, labels: np.ndarray, class_names: Sequence[str]) -> tuple[float, ...] | None:
    """The weight of each class, or None if `given` is.

    given: "balanced", n / (K·n_k) for n training images, of which n_k are of class k of K; or a weight for each class, in their order; or
    {class name: weight}, where a class that is not named weighs 1. labels: (n,) of the training images.
    Raises UserError for an unknown class, a wrong number of weights, a weight that is negative or not finite, and weights that are all 0.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given != "balanced":
            raise UserError(f"class_weights must be 'balanced' or a table, got {given!r}: 'balanced', [1, 2], or {{'cat': 2}}")
        return _balanced(labels, class_names)
    if isinstance(given, Mapping):
        unknown = next((name for name in given if name not in class_names), None)
        if unknown is not None:
            raise UserError(f"class_weights: there is no class {unknown!r}{nearest(str(unknown), class_names)}: see the data's class names")
        given = [given.get(name, 1.0) for name in class_names]
    return tuple(checked_class_weights(given, len(class_names)).tolist())


def imbalance(labels: np.ndarray, class_names: Sequence[str]) -> str | None:
    """A line about classes of very unequal size; None if the largest has at most UNEQUAL times the images of the smallest."""
    counts = np.bincount(labels, minlength=len(class_names))  # (K,)
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[most] <= UNEQUAL * counts[least]:
        return None
    return (
        f"classes of unequal size: {class_names[most]} has {counts[most]} training images, {class_names[least]} {counts[least]}; "
        "with class_weights='balanced' (--class-weights balanced) each class counts as much"
    )


def _balanced(labels: np.ndarray, class_names: Sequence[str]) -> tuple[float, ...]:
    counts = np.bincount(labels, minlength=len(class_names))  # (K,)
    if not counts.all():
        name = class_names[int(np.argmin(counts > 0))]
        raise UserError(f"class {name!r} has no training image to balance its weight by: give class_weights as a table")
    return tuple((len(labels) / (len(class_names) * counts)).tolist())
