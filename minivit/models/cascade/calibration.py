"""The calibration of a cascade, saved with the model: thresholds for several budgets, their results on the calibration images, and a
fingerprint of the weights that they are valid for. `minivit.calibrate` computes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import isfinite, log
from numbers import Real
from typing import Annotated, Any, Literal, get_args

import numpy as np

from ...errors import UserError, nearest
from ...nn.module import Module
from ...schema import Checked, Fraction, Limits, parse_json, record
from .thresholds import meets

Unit = Literal["macs", "ms", "share"]  # multiply-adds; milliseconds; fraction of the multiply-adds up to the last exit
Method = Literal["exact", "sweep"]
Confidence = Literal["max", "entropy", "margin"]
UNITS, METHODS, CONFIDENCES = map(get_args, (Unit, Method, Confidence))
Cost = Annotated[float, Limits(0, 1e30)]  # in the unit of the calibration
Threshold = Annotated[float, Limits(-1e30, 1e30)]


def check_choice(what: str, value: Any, known: Iterable[str]) -> None:
    """Raises UserError, with the nearest known values, if `value` is not in `known`."""
    if value not in known:
        raise UserError(f"unknown {what} {value!r}{nearest(str(value), known)}: choose {', '.join(known)}")


def confidence(logits: np.ndarray, kind: str = "max") -> np.ndarray:
    """The confidence of logits (..., K), in 0..1 and in their dtype: (...).

    kind: "max", the largest probability p; "entropy", 1 - entropy / log K; "margin", (p - q) / (p + q) with the second largest probability
    q, which orders images by log(p / q), independent of the other classes. Raises UserError for another kind.
    """
    check_choice("confidence", kind, CONFIDENCES)
    classes = logits.shape[-1]
    if classes == 1:
        return np.ones_like(logits[..., 0])
    shifted = logits - logits.max(-1, keepdims=True)  # (..., K), at most 0
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
    """A cost as text for users: "1.2 M multiply-adds", "0.31 ms an image", "25 % of all multiply-adds"; short: "1.2 M", ..."""
    if unit == "ms":
        text, suffix = f"{value:.3g} ms", "an image"
    elif unit == "share":
        text, suffix = f"{100 * value:.3g} %", "of all multiply-adds"
    else:
        scale, letter = (1e9, " G") if value >= 1e9 else (1e6, " M") if value >= 1e3 else (1, "")
        text, suffix = f"{value / scale:.4g}{letter}", "multiply-adds"
    return text if short else f"{text} {suffix}"


def check_feasible(budgets: Iterable[float], costs: Sequence[float], unit: str) -> None:
    """Raises UserError for a budget below the cost of the first exit, which no thresholds can meet."""
    for budget in budgets:
        if not meets(costs[0], budget):
            raise UserError(
                f"no thresholds meet a budget of {describe_cost(budget, unit)}: the cheapest, all images at exit 1, costs "
                f"{describe_cost(costs[0], unit, True)}; the dearest, all at exit {len(costs)}, "
                f"{describe_cost(costs[-1], unit, True)}"
            )


def check_budget(budget: Any, unit: str) -> float:
    """The budget as a float. Raises UserError if it is not a number above 0, or is a share above 1."""
    value = float(budget) if isinstance(budget, Real) and not isinstance(budget, bool) else 0.0
    if not (isfinite(value) and value > 0):
        raise UserError(f"a budget must be a number above 0, got {budget!r}")
    if unit == "share" and value > 1:
        raise UserError(f"a budget that is a share must be at most 1, got {budget:g}: it is of the multiply-adds of all exits together")
    return value


# ---------------------------------------------------------------------------------------------------------------------- calibration
@dataclass(frozen=True)
class Calibration(Checked):
    """Thresholds of a cascade with K exits, for each of several budgets. An image leaves at the first exit whose confidence is at least the
    exit's threshold; at a threshold above 1 none leaves. All tuples by budget are in the order of `budgets`."""

    unit: Unit  # of budgets and costs
    method: Method
    confidence: Confidence
    budgets: tuple[Cost, ...]  # maximum mean cost per image, ascending
    thresholds: tuple[tuple[Threshold, ...], ...]  # by budget: of the exits 1..K-1
    accuracies: tuple[Fraction, ...]  # by budget: accuracy (0..1) on the calibration images
    mean_costs: tuple[Cost, ...]  # by budget: mean cost of the calibration images
    exit_shares: tuple[tuple[Fraction, ...], ...]  # by budget: fraction of the calibration images that leaves at each exit
    costs: tuple[Cost, ...]  # by exit: cumulative cost of an image that leaves there
    macs: tuple[Cost, ...]  # by exit: cumulative multiply-adds of an image that leaves there
    exit_accuracies: tuple[Fraction, ...]  # by exit: accuracy if all images leave there
    images: Annotated[int, Limits(1, 2**62)]  # number of calibration images
    fingerprint: str  # of the weights that the thresholds are valid for
    measured: str = ""  # the machine and batch size for a unit of milliseconds

    def for_budget(self, budget: float) -> tuple[float, ...]:
        """The thresholds for the largest calibrated budget that does not exceed `budget`.

        Raises UserError if it is below all calibrated budgets, or not a number above 0.
        """
        requested = check_budget(budget, self.unit)
        check_feasible([requested], self.costs, self.unit)
        feasible = [thresholds for calibrated, thresholds in zip(self.budgets, self.thresholds) if meets(calibrated, requested)]
        if not feasible:
            raise UserError(
                f"there are no thresholds for a budget of {describe_cost(requested, self.unit)}: the calibration's cheapest is "
                f"{describe_cost(self.budgets[0], self.unit, True)}, its dearest "
                f"{describe_cost(self.budgets[-1], self.unit, True)}: calibrate the model for this budget too"
            )
        return feasible[-1]

    def to_json(self) -> dict[str, Any]:
        """The fields as values that JSON can represent; `from_text` reads the text."""
        return asdict(self)

    @classmethod
    def from_text(cls, text: str) -> Calibration:
        """The calibration from the JSON text of `to_json()`. Raises UserError if it is damaged."""
        try:
            calibration = record(cls, parse_json(text, "their text"))
            calibration._check_lengths()
        except ValueError as error:
            raise UserError(f"the thresholds that were saved with the model are damaged ({error})") from error
        return calibration

    def _check_lengths(self) -> None:
        budgets, exits = len(self.budgets), len(self.costs)
        if not budgets or exits < 2 or list(self.budgets) != sorted(self.budgets):
            raise ValueError(f"{budgets} budgets, which must ascend, for {exits} exits")
        by_budget = {"thresholds": budgets, "accuracies": budgets, "mean_costs": budgets, "exit_shares": budgets}
        lengths = [(name, getattr(self, name), length) for name, length in (by_budget | {"macs": exits, "exit_accuracies": exits}).items()]
        lengths += [(f"thresholds[{i}]", row, exits - 1) for i, row in enumerate(self.thresholds)]
        lengths += [(f"exit_shares[{i}]", row, exits) for i, row in enumerate(self.exit_shares)]
        for name, values, length in lengths:
            if len(values) != length:
                raise ValueError(f"{name} holds {len(values)} values, not {length}")


# ----------------------------------------------------------------------------------------------------------------- fingerprints
def fingerprint(model: Module) -> str:
    """A hash of all weights, including their names, shapes and dtypes: 32 hexadecimal digits."""
    digest = blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.shape} {parameter.dtype}\n".encode())
        digest.update(np.ascontiguousarray(parameter.numpy()).data)
    return digest.hexdigest()


def fits(calibration: Calibration, model: Module) -> bool:
    """Whether the calibration is for the weights and the number of exits of this model."""
    return (calibration.fingerprint, len(calibration.costs)) == (fingerprint(model), model.num_exits)


def check(calibration: Calibration, model: Module) -> None:
    """Raises UserError if the calibration is not for this model."""
    if not fits(calibration, model):
        model_fingerprint, exits = fingerprint(model), model.num_exits
        raise UserError(
            f"thresholds of another model: they are for {len(calibration.costs)} exits and the weights "
            f"{calibration.fingerprint[:8]}, and this one has {exits} and {model_fingerprint[:8]}: calibrate it anew"
        )
