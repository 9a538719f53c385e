"""`VisionClassifier`: `train` as a classifier of scikit-learn."""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import fields, replace
from math import isqrt, prod
from numbers import Integral
from textwrap import fill
from typing import Any

import numpy as np

from ..data import Dataset
from ..data.dataset import from_arrays
from ..errors import MissingPackage, UserError, nearest, printable, shown
from ..inference.classifier import Classifier
from ..inference.predictor import LARGEST_BATCH
from ..sides import times
from .options import TrainOptions, help_of_options
from .train import train

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state, column_or_1d, compute_class_weight
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise MissingPackage(f"VisionClassifier needs scikit-learn 1.6 or later: pip install 'minivit[sklearn]' ({error})") from error

OWN = {  # the parameters that `train` does not have, or not under these names: default, description
    "image_shape": (
        None,
        "of the images in the rows of a table: (rows, columns) or (rows, columns, channels), one of them -1 if need be; None: gray squares",
    ),
    "class_weight": (None, "None, 'balanced', or {label: weight}, as in scikit-learn"),
    "random_state": (None, "as in scikit-learn; a whole number is the seed of `train`, and gives the same model bit for bit"),
    "verbose": (False, "whether progress is shown on standard error"),
}
NOT_PARAMETERS = {  # options of `train` that an estimator names otherwise, and those that are for data from files
    *("data", "class_weights", "seed", "progress", "save", "overwrite", "profile", "in_channels", "fit"),
    *("resume", "checkpoint_minutes", "keep_checkpoint", "tensorboard"),
    *("test_fraction", "split_seed", "skip_bad_images", "max_pixels", "limit"),
}
OPTIONS = {item.name: item.default for item in fields(TrainOptions) if item.name not in NOT_PARAMETERS}
PARAMETERS = OPTIONS | {name: default for name, (default, _) in OWN.items()}
SEEN = 256  # training images, at even intervals, whose accuracy the history tells
CHUNK = 4096  # rows that are converted at once


class VisionClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of images with scikit-learn's methods, trained by `minivit.train`.

    X is images (N, H, W) or (N, H, W, C), or a table (N, features) with an image in each row (`image_shape`). Bytes (uint8) are pixels from
    0 to 255. Of other numbers, the smallest and the largest of the training images become 0 and 1, and later ones beyond them count as
    these. y is labels of any kind that scikit-learn takes.

    Parameters, all of them keywords. None selects the value of the recipe for the data, as in `train`:

    Attributes after `fit`:

    classes_: the labels in sorted order, (K,).
    n_features_in_: the numbers of an image, rows · columns · channels.
    image_shape_: (rows, columns, channels).
    pixel_range_: the numbers that are 0 and 1 for the model.
    classifier_: the trained `Classifier`, whose `save` writes a file for `minivit.load` and `minivit predict`.
    history_: a dict for each tested epoch: epoch, train_loss, train_accuracy (of up to 256 of the training images), learning_rate, seconds,
        images_per_second; with `validation_fraction` also validation_loss and validation_accuracy.
    """

    classifier_: Classifier

    def __init__(self, **parameters: Any) -> None:
        for name in parameters:
            if name not in PARAMETERS:
                raise TypeError(f"VisionClassifier has no parameter {name!r}{nearest(name, PARAMETERS)}")
        for name, value in (PARAMETERS | parameters).items():
            setattr(self, name, value)

    def fit(self, X: Any, y: Any) -> VisionClassifier:
        """Train a new model on images and their labels, (N,).

        Nothing is written, unless `out` names a run folder. Raises ValueError (a UserError, where the reason is minivit's) for data or
        parameters that do not fit, TrainingError if the loss is not finite.
        """
        rows, y = self._validated(X, y, reset=True)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        self._train(rows, numbers, model=deepcopy(self.model), validation_fraction=self.validation_fraction)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> VisionClassifier:
        """Train further for one pass over these images, with a constant learning rate and no warmup; the first call makes the model.

        classes: all labels that will come, needed at the first call. How pixels are scaled is decided then, by the images of that call. The
        optimizer begins anew with each call, so give hundreds of images at once. Raises ValueError like `fit`.
        """
        is_first = not hasattr(self, "classifier_")
        if is_first and classes is None:
            raise UserError("classes must be passed on the first call to partial_fit: all labels that will come")
        rows, y = self._validated(X, y, reset=is_first)
        given = self.classes_ if classes is None else np.unique(classes)
        if not is_first and not np.array_equal(given, self.classes_):
            raise UserError(f"classes={printable(str(given))} are not those of the first call to partial_fit: leave them out")
        unknown = np.setdiff1d(y, given)
        if len(unknown):
            raise UserError(f"y has the label {unknown.tolist()[0]!r}, which is none of the classes {printable(str(given))}")
        self.classes_ = given
        schedule: dict[str, Any] = dict(epochs=1, minutes=None, test_every=None, warmup=0, schedule="constant", progressive_resizing=0)
        if is_first:
            schedule["model"] = deepcopy(self.model)
        else:
            model_has_them = dict.fromkeys(("model_options", "drop_path", "image_size", "weights"))
            schedule |= {"model": deepcopy(self.classifier_), **model_has_them}
        self._train(rows, np.searchsorted(given, y), validation_fraction=0.0, is_first=is_first, **schedule)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label of each image, (N,), of the type that y had."""
        best = self.predict_proba(X).argmax(1)  # (N,)
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the labels `classes_`, (N, K) float32; each row sums to 1."""
        check_is_fitted(self)
        rows, _ = self._validated(X, reset=False)
        starts = range(0, len(rows), LARGEST_BATCH)
        return np.concatenate([self.classifier_.predict(self._pixels(rows[i : i + LARGEST_BATCH])).probabilities for i in starts])

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classifier_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _validated(self, X: Any, y: Any = "no_validation", *, reset: bool) -> tuple[np.ndarray, Any]:
        """X as (N, features), and y, both as scikit-learn checks them. Raises ValueError. reset: whether `image_shape_` is decided."""
        table, images = _as_table(X)
        checked = validate_data(self, table, y, reset=reset)
        rows, y = checked if isinstance(checked, tuple) else (checked, None)
        if y is not None:
            check_classification_targets(y)
            y = column_or_1d(y, warn=True)
        if reset:
            self.image_shape_ = _image_shape(self.image_shape, rows.shape[1], images)
            self.pixel_range_ = (0.0, 255.0) if rows.dtype == np.uint8 else _range(rows)
        elif images not in (None, self.image_shape_):
            raise UserError(f"X has images of {times(images)}, but the classifier was fitted with {times(self.image_shape_)}")
        return rows, y

    def _pixels(self, rows: np.ndarray) -> np.ndarray:
        """Images (N, rows, columns, channels), uint8 or float32 in 0..1."""
        low, high = self.pixel_range_
        if rows.dtype == np.uint8 and (low, high) == (0, 255):
            return np.ascontiguousarray(rows).reshape(-1, *self.image_shape_)
        pixels = np.empty(rows.shape, np.float32)
        for start in range(0, len(rows), CHUNK):
            part = np.subtract(rows[start : start + CHUNK], low, dtype=np.float64) / (high - low)
            pixels[start : start + CHUNK] = part.clip(0, 1)
        return pixels.reshape(-1, *self.image_shape_)

    def _train(self, rows: np.ndarray, numbers: np.ndarray, is_first: bool = True, **changes: Any) -> None:
        """numbers: the places of the labels in `classes_`. is_first: whether how pixels are normalised is decided. changes: of options."""
        if len(self.classes_) < 2:
            raise UserError("y has one class: training needs two or more")
        options = {name: getattr(self, name) for name in OPTIONS} | changes
        if options["batch_size"] is not None:
            options["batch_size"] = min(options["batch_size"], len(rows))
        weights = None
        if self.class_weight is not None:
            labels = self.classes_[numbers]
            weights = compute_class_weight(self.class_weight, classes=self.classes_, y=labels).tolist()
        images, seen = self._pixels(rows), np.linspace(0, len(rows), min(SEEN, len(rows)), endpoint=False).astype(np.int64)
        names = [printable(str(label)) for label in self.classes_.tolist()]
        dataset: Dataset = from_arrays("arrays", (images, numbers), (images[seen], numbers[seen]), names)
        if not is_first:
            dataset = replace(dataset, mean=self.classifier_.preprocessing.mean, std=self.classifier_.preprocessing.std)
        seed = self._seed()
        how = dict(seed=seed, split_seed=seed, class_weights=weights, progress=bool(self.verbose), save=options["out"] is not None)
        run = train(data=dataset, **options, **how)
        self.classifier_ = run.model
        self.history_ = [{SHOWN[name]: value for name, value in line.items() if name in SHOWN} for line in run.history]

    def _seed(self) -> int:
        generator = check_random_state(self.random_state)
        return int(self.random_state) if isinstance(self.random_state, Integral) else int(generator.randint(2**31 - 1))


SHOWN = {  # what `history_` tells, by the name in the history of `train`, whose test images are training images here
    "test_accuracy": "train_accuracy",
    **{
        name: name
        for name in ("epoch", "train_loss", "validation_loss", "validation_accuracy", "learning_rate", "seconds", "images_per_second")
    },
}


def _as_table(X: Any) -> tuple[Any, tuple[int, ...] | None]:
    """(X with a row for each image, their shape (rows, columns, channels)); X itself and None if it is no images. Raises UserError."""
    if isinstance(X, (list, tuple)):
        try:
            X = np.asarray(X)
        except ValueError:  # rows of different lengths
            raise UserError("X must be one array of images of equal sizes: resize them first") from None
    if getattr(X, "ndim", 2) < 3:
        return X, None
    X = np.asarray(X)
    if X.ndim > 4 or 0 in X.shape[1:]:
        raise UserError(f"X must be a table (N, features), or images (N, H, W) or (N, H, W, C), got {X.shape}")
    return X.reshape(len(X), prod(X.shape[1:])), (*X.shape[1:], 1)[:3]


def _image_shape(given: Any, features: int, images: tuple[int, ...] | None) -> tuple[int, ...]:
    """(rows, columns, channels) of an image of so many features. given: the parameter. images: the shape that X has itself, or None.

    Raises UserError.
    """
    if given is None:
        side = isqrt(features)
        if images is None and side * side != features:
            raise UserError(f"X has {features} features, no square image: give image_shape, (rows, columns) or (rows, columns, channels)")
        return images or (side, side, 1)
    sides = tuple(given) if isinstance(given, (tuple, list)) else ()
    are_sides = all(isinstance(side, (int, np.integer)) and (side > 0 or side == -1) for side in sides)
    if not (len(sides) in (2, 3) and are_sides and sides.count(-1) <= 1):
        raise UserError(f"image_shape must be (rows, columns) or (rows, columns, channels), got {shown(given)}")
    shape = (*map(int, sides), 1)[:3]
    known = prod(side for side in shape if side != -1)
    shape = tuple(features // known if side == -1 else side for side in shape)
    if prod(shape) != features or images not in (None, shape):
        raise UserError(f"image_shape={given!r} does not fit X, which has {times(images) if images else features} features")
    return shape


def _range(rows: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest number; of numbers that are all the same also that number plus 1."""
    low, high = float(rows.min()), float(rows.max())
    return low, high if high > low else low + 1


def _describe() -> None:
    """Give `VisionClassifier.__init__` its signature, which scikit-learn reads, and the docstring the parameters."""
    texts = {name: text for name, (_, text) in OWN.items()} | help_of_options()
    lines = [fill(f"{name}: {texts[name]}", 140, subsequent_indent="    ") for name in PARAMETERS]
    first, heading, rest = inspect.cleandoc(VisionClassifier.__doc__ or "").partition("as in `train`:\n")
    VisionClassifier.__doc__ = "\n".join([first + heading, *lines]) + "\n" + rest
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default) for name, default in PARAMETERS.items()]
    VisionClassifier.__init__.__signature__ = inspect.Signature([own, *keywords])  # type: ignore[attr-defined]


_describe()
