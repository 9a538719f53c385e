"""Labels in any form as the numbers of classes: integers, names, columns of these, and one-hot rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError, nearest


def check_labels(labels: Any, count: int, what: str = "labels", class_names: Sequence[str] | None = None) -> np.ndarray:
    """`labels` as int64 (count,), 0 or more.

    labels: (count,) or (count, 1) whole numbers, or names, which are looked up in `class_names`; or one-hot rows (count, classes) of exact
    0 and 1. Raises UserError for another shape or kind, negative numbers, and unknown names.
    """
    names = _names_in(labels, what)
    array = _array(labels, what) if names is None else names
    if array.ndim == 2 and array.shape == (count, 1):
        array = array[:, 0]
    elif names is None and array.ndim == 2 and len(array) == count and array.dtype.kind in "biuf":
        array = _from_one_hot(array, what)
    if array.shape != (count,):
        raise UserError(f"{what} must have the shape ({count},), one for each image, got {array.shape}")
    if names is not None:
        return _looked_up(array, what, class_names)
    if array.dtype.kind == "f":
        whole = np.isfinite(array) & (array == np.rint(array))
        if not whole.all():
            raise UserError(f"{what}[{np.argmin(whole)}] is {array[np.argmin(whole)]}: labels must be whole numbers, or names")
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise UserError(f"{what} must be integers or names, got {array.dtype}: number the classes 0, 1, 2, ...")
    if count and array.min() < 0:
        first = int(np.argmax(array < 0))
        raise UserError(f"{what}[{first}] is {array[first]}: labels must be 0 or more")
    return array.astype(np.int64)


def implied_names(labels: Any, what: str = "labels") -> tuple[str, ...] | None:
    """The class names that labels imply: names in sorted order, of one-hot rows "0", "1", ...; None for integers. Raises UserError."""
    names = _names_in(labels, what)
    if names is not None:
        return tuple(sorted(set(names.ravel().tolist())))
    array = _array(labels, what)
    return tuple(map(str, range(array.shape[1]))) if array.ndim == 2 and array.shape[1] > 1 else None


def _array(labels: Any, what: str) -> np.ndarray:
    try:
        return np.asarray(labels)
    except ValueError:  # rows of different lengths
        raise UserError(f"{what} must be one array, one label for each image: their rows have different lengths") from None


def _names_in(labels: Any, what: str) -> np.ndarray | None:
    """Labels that are names, as an array of str; None for numbers. Raises UserError for a mixture."""
    if _array(labels, what).dtype.kind not in "USTO":
        return None
    given = np.asarray(labels, object)
    for i, name in enumerate(given.ravel()):
        if not isinstance(name, (str, bytes)):
            raise UserError(f"{what}[{i}] is {str(name)[:50]!r}, no name: labels must be all names, or all whole numbers")
    names = np.empty(given.shape, object)
    names.ravel()[...] = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in given.ravel()]
    return names


def _looked_up(names: np.ndarray, what: str, class_names: Sequence[str] | None) -> np.ndarray:
    if class_names is None:
        raise UserError(f"{what} are names, as {names[0][:50]!r}, but no class names are known here: number the classes 0, 1, 2, ...")
    numbers = {name: k for k, name in enumerate(class_names)}
    unknown = next((i for i, name in enumerate(names) if name not in numbers), None)
    if unknown is not None:
        raise UserError(
            f"{what}[{unknown}] is {names[unknown][:50]!r}, no class{nearest(names[unknown], numbers)} of {len(numbers)} known ones"
        )
    return np.array([numbers[name] for name in names], np.int64)


def _from_one_hot(rows: np.ndarray, what: str) -> np.ndarray:
    """The position of the 1 in each row (n, classes). Raises UserError for rows that are not one-hot."""
    good = ((rows == 0) | (rows == 1)).all(1) & (rows.sum(1) == 1)
    if not good.all():
        raise UserError(
            f"{what}[{np.argmin(good)}] is no row of one 1 and zeros, which stands for a class: give one class for each image "
            "(probabilities are for Trainer.step)"
        )
    return rows.argmax(1)


def check_printable(names: tuple[str, ...]) -> tuple[str, ...]:
    """The class names themselves. Raises UserError if one has control characters, which a terminal would obey."""
    for name in names:
        if not name.isprintable():
            raise UserError(f"the class name {name[:40]!r} has characters that cannot be shown: rename the class")
    return names


def check_class_names(class_names: Sequence[str] | None, labels: np.ndarray) -> tuple[str, ...]:
    """The class names; by default "0", "1", ..., each of which must occur in the training labels. Raises UserError."""
    largest = int(labels.max())
    if class_names is None:
        counts = np.bincount(labels) if largest < 10 * len(labels) + 1000 else np.zeros(1, np.int64)
        missing = int(np.argmin(counts > 0)) if not counts.all() else None
        if missing is not None:
            raise UserError(
                f"labels run to {largest}, but no training image has label {missing}: number the classes 0, 1, 2, ... "
                "(numpy.unique with return_inverse=True does), or give class_names"
            )
        class_names = [str(k) for k in range(largest + 1)]
    names = check_printable(tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in class_names))
    if len(names) < 2:
        raise UserError(f"training needs two classes or more, got {len(names)}")
    if largest >= len(names):
        raise UserError(f"a training label is {largest}, out of range for {len(names)} classes: labels must be 0..{len(names) - 1}")
    return names
