"""What a cascade knows of its own thresholds: for each of several budgets which, what they did on the images they were found on, and for
which weights they hold. It is saved with the model. `minivit.calibrating` finds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import isfinite, log
from numbers import Real
from typing import Any

import numpy as np

from ...errors import UserError, nearest
from ...nn.module import Module
from .thresholds import Thresholds, meets

UNITS = ("macs", "ms", "share")  # multiply-adds; milliseconds; of the multiply-adds of all exits together
METHODS = ("exact", "sweep")
CONFIDENCES = ("max", "entropy", "margin")


def check_choice(what: str, value: Any, known: Iterable[str]) -> None:
    """Raises UserError, with the nearest known value, for one that is not known."""
    if value not in known:
        raise UserError(f"unknown {what} {value!r}{nearest(str(value), known)}: choose {', '.join(known)}")


def confidence(logits: np.ndarray, kind: str = "max") -> np.ndarray:
    """How sure logits (..., K) are of a class, in 0..1 and in their dtype: (...).

    kind: "max", the largest probability p; "entropy", one less the entropy over its largest value log K; "margin", (p - q) / (p + q) with
    the second largest q, which orders images by the logarithm of p / q, whatever the other classes share. Raises UserError for another.
    """
    check_choice("confidence", kind, CONFIDENCES)
    classes = logits.shape[-1]
    if classes == 1:
        return np.ones_like(logits[..., 0])
    shifted = logits - logits.max(-1, keepdims=True)  # (..., K), 0 at most
    powers = np.exp(shifted)
    total = powers.sum(-1)  # (...), 1..K
    if kind == "max":
        return 1 / total
    if kind == "margin":
        second, first = np.moveaxis(np.partition(powers, classes - 2, -1)[..., -2:], -1, 0)
        return (first - second) / (first + second)
    entropy = np.log(total) - (powers * shifted).sum(-1) / total
    return np.clip(1 - entropy / log(classes), 0, 1)


def describe_cost(value: float, unit: str, short: bool = False) -> str:
    """A cost as a user reads it: "1.2 M multiply-adds", "0.31 ms an image", "25 % of all multiply-adds", or short "1.2 M", ..."""
    if unit == "ms":
        number, what = f"{value:.3g} ms", "an image"
    elif unit == "share":
        number, what = f"{100 * value:.3g} %", "of all multiply-adds"
    else:
        scale, letter = (1e9, " G") if value >= 1e9 else (1e6, " M") if value >= 1e3 else (1, "")
        number, what = f"{value / scale:.4g}{letter}", "multiply-adds"
    return number if short else f"{number} {what}"


def check_feasible(budgets: Iterable[float], costs: Sequence[float], unit: str) -> None:
    """Raises UserError for a budget that is below the cost of the first exit, so that no thresholds meet it."""
    for budget in budgets:
        if not meets(costs[0], budget):
            raise UserError(
                f"no thresholds meet a budget of {describe_cost(budget, unit)}: the cheapest, all images at exit 1, costs "
                f"{describe_cost(costs[0], unit, True)}; the dearest, all at exit {len(costs)}, "
                f"{describe_cost(costs[-1], unit, True)}"
            )


def check_budget(budget: Any, unit: str) -> float:
    """The budget as a float; raises UserError where it is no number above 0, or a share above 1."""
    number = float(budget) if isinstance(budget, Real) and not isinstance(budget, bool) else 0.0
    if not (isfinite(number) and number > 0):
        raise UserError(f"a budget must be a number above 0, got {budget!r}")
    if unit == "share" and number > 1:
        raise UserError(f"a budget that is a share must be at most 1, got {budget:g}: it is of the multiply-adds of all exits together")
    return number


# ---------------------------------------------------------------------------------------------------------------------- calibration
@dataclass(frozen=True)
class Calibration:
    """Thresholds of a cascade with K exits for each of several budgets. An image takes the first exit whose confidence is at least its
    threshold; a threshold above 1 lets none stop. All tuples by budget are in the order of `budgets`."""

    unit: str  # of budgets and costs: one of UNITS
    method: str  # one of METHODS
    confidence: str  # one of CONFIDENCES
    budgets: tuple[float, ...]  # largest mean cost of an image, ascending
    thresholds: tuple[Thresholds, ...]  # by budget: of the exits 1..K-1
    accuracies: tuple[float, ...]  # by budget, 0..1, on the images of the calibration; so are the next two
    mean_costs: tuple[float, ...]  # by budget
    exit_shares: tuple[tuple[float, ...], ...]  # by budget: of the images, for each exit
    costs: tuple[float, ...]  # by exit: of an image that takes it, all exits before it included
    macs: tuple[float, ...]  # by exit: the same in multiply-adds
    exit_accuracies: tuple[float, ...]  # by exit: if all images took it
    images: int  # of the calibration
    fingerprint: str  # of the weights that the thresholds belong to
    measured: str = ""  # where milliseconds were, and in which batches

    def for_budget(self, budget: float) -> Thresholds:
        """The thresholds of the largest budget that is not above this one.

        Raises UserError where that is below all budgets of the calibration, or no number above 0.
        """
        asked = check_budget(budget, self.unit)
        check_feasible([asked], self.costs, self.unit)
        met = [thresholds for listed, thresholds in zip(self.budgets, self.thresholds) if meets(listed, asked)]
        if not met:
            raise UserError(
                f"there are no thresholds for a budget of {describe_cost(asked, self.unit)}: the calibration's cheapest is "
                f"{describe_cost(self.budgets[0], self.unit, True)}, its dearest "
                f"{describe_cost(self.budgets[-1], self.unit, True)}: calibrate the model for this budget too"
            )
        return met[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_text(cls, text: str) -> Calibration:
        """Of `to_json`'s values as JSON. Raises UserError where that is damaged."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"the thresholds that were saved with the model are damaged ({error}): calibrate it again") from error
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: Any) -> Calibration:
        """Raises UserError where the content is not what `to_json` gave."""
        try:
            return cls._read(content)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"the thresholds that were saved with the model are damaged ({reason}): calibrate it again") from error

    @classmethod
    def _read(cls, content: Mapping[str, Any]) -> Calibration:
        words: dict[str, Any] = {name: content[name] for name in ("unit", "method", "confidence", "fingerprint", "measured")}
        for name, known in (("unit", UNITS), ("method", METHODS), ("confidence", CONFIDENCES)):
            check_choice(name, words[name], known)
        budgets, exits = len(content["budgets"]), len(content["costs"])
        shapes = {
            "budgets": (budgets,),
            "thresholds": (budgets, exits - 1),
            "accuracies": (budgets,),
            "mean_costs": (budgets,),
            "exit_shares": (budgets, exits),
            "costs": (exits,),
            "macs": (exits,),
            "exit_accuracies": (exits,),
        }
        numbers: dict[str, Any] = {name: _numbers(name, content[name], shape) for name, shape in shapes.items()}
        if not budgets or exits < 2 or list(numbers["budgets"]) != sorted(numbers["budgets"]):
            raise ValueError(f"{budgets} budgets, {exits} exits")
        return cls(**words, **numbers, images=int(content["images"]))


def _numbers(name: str, value: Any, shape: tuple[int, ...]) -> tuple:
    """`value` as a tuple, or a tuple of tuples, of finite floats; raises ValueError."""
    array = np.asarray(value, np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name} has the shape {array.shape}, not {shape}, or is not finite")
    return tuple(map(tuple, array.tolist())) if array.ndim == 2 else tuple(array.tolist())


# ------------------------------------------------------------------------------------------------------------- whose thresholds
def fingerprint(model: Module) -> str:
    """A hash of all weights, with their names and shapes: 32 hexadecimal digits."""
    found = blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        found.update(f"{name} {parameter.shape} {parameter.dtype}\n".encode())
        found.update(np.ascontiguousarray(parameter.numpy()).data)
    return found.hexdigest()


def fits(calibration: Calibration, model: Module) -> bool:
    """Whether the thresholds were found for these weights, and this number of exits."""
    return (calibration.fingerprint, len(calibration.costs)) == (fingerprint(model), model.num_exits)


def check(calibration: Calibration, model: Module) -> None:
    """Raises UserError where the thresholds do not fit the model."""
    if not fits(calibration, model):
        own, exits = fingerprint(model), model.num_exits
        raise UserError(
            f"thresholds of another model: they are for {len(calibration.costs)} exits and the weights "
            f"{calibration.fingerprint[:8]}, and this one has {exits} and {own[:8]}: calibrate it anew"
        )
