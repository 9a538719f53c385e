"""The same problem for all sides, and whether they give the same answers: nobody is timed who computes something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from minivit import create_model
from minivit.training.profiling import PRODUCT, TINY_PRODUCT

from .measure import percent
from .sides import REFERENCE, Side
from .worker import Problem, Worker

ADAMW = {"lr": 1e-4, "weight_decay": 0.05, "eps": 1e-8}
# For the check, a weight decay that shows, and an eps that keeps the update smooth: with the usual one, where a gradient is zero but for
# rounding (the bias of k, or of the last layer of a token-mixing MLP), AdamW makes a whole step of the rounding error.
CHECKED_ADAMW = {"lr": 1e-3, "weight_decay": 1.0, "eps": 1e-5}
CHECKED_STEPS = 2
CHAIN = 4  # products one after the other, whose rate counts as the machine's


@dataclass(frozen=True)
class Tolerance:
    """How far answers may lie from those in float32."""

    loss: float  # relative
    logits: float  # relative to the largest
    weights: float  # in the norm: of a parameter, relative to the change of all of them in two steps
    order: float  # of that norm: infinity for the largest element, 2 for the root of squares


# AdamW's first steps are nearly lr·sign(gradient): where a gradient drowns in bfloat16's rounding, a single element may err by a whole
# step, so elements are not held there one by one.
TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-3, 1e-2, np.inf),
    "bf16x3": Tolerance(2e-5, 2e-4, 1e-3, 2),
    "bfloat16": Tolerance(2e-2, 5e-2, 0.1, 2),
    "int8": Tolerance(0, 0.1, 0, 2),  # of predictions alone
}
RESOLUTION = 2.0**-8  # by how much storing a weight in bfloat16 changes it at most, relative to it


class Disagreement(RuntimeError):
    """The sides do not compute the same."""


# ----------------------------------------------------------------------------------------------------------------------- problem
def make_problem(name: str, batch: int, **options: Any) -> Problem:
    """A preset, without dropout, with random weights about those it begins with, so that no gradient is zero because a head is."""
    rates = [field for field in asdict(create_model(name, **options).config) if field.endswith("_rate")]
    model = create_model(name, **dict.fromkeys(rates, 0.0) | options)
    rng = np.random.default_rng(0)
    weights = {n: (w + 0.02 * rng.standard_normal(w.shape)).astype(np.float32) for n, w in model.state_dict().items()}
    return Problem(model.family, asdict(model.config), weights, batch, ADAMW)


def product_problem(tiny: bool) -> Problem:
    """A chain of square products with nothing in between: inference of linear layers without biases."""
    size = TINY_PRODUCT if tiny else PRODUCT
    rng = np.random.default_rng(0)
    weights = {f"layers.{i}.weight": rng.standard_normal((size, size), np.float32) / np.float32(size**0.5) for i in range(CHAIN)}
    config = {"image_size": 1, "in_channels": size, "num_classes": size, "depth": CHAIN, "activation": "gelu"}
    return Problem("product", config, weights, size, ADAMW)


# ------------------------------------------------------------------------------------------------------------------------- check
@dataclass(frozen=True)
class Answers:
    losses: list[float] = field(default_factory=list)  # of two training steps
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # after them
    logits: np.ndarray | None = None  # (B, K), of inference

    @classmethod
    def of(cls, worker: Worker, workload: str) -> Answers:
        if workload == "infer":
            return cls(logits=worker.call("infer"))
        losses = [worker.call("train") for _ in range(CHECKED_STEPS)]
        return cls(losses, worker.call("weights"))


def reference_answers(
    problem: Problem, workload: str, precisions: Sequence[str], threads: int
) -> tuple[Answers, dict[str, tuple[int, int]]]:
    """(what the other sides must answer; by precision, floating-point operations and least bytes of a step)."""
    with Worker(REFERENCE, replace(problem, adamw=CHECKED_ADAMW), threads) as worker:
        answers = Answers.of(worker, workload)
        return answers, {precision: worker.call("work", workload, precision) for precision in precisions}


@contextmanager
def checked(problem: Problem, side: Side, workload: str, reference: Answers, threads: int) -> Iterator[Worker]:
    """A side at work in a process of its own, which has given the right answers. Raises Disagreement; RuntimeError for what fails there."""
    with Worker(side, replace(problem, adamw=CHECKED_ADAMW), threads) as worker:
        compare(problem.weights, side, Answers.of(worker, workload), reference)
        yield worker


def compare(before: Mapping[str, np.ndarray], side: Side, given: Answers, reference: Answers) -> None:
    """Raises Disagreement that lists what differs by more than a side's precision explains. before: the weights that all began with."""
    tolerance = TOLERANCES[side.precision]
    wrong = [f"loss {a:.7g} for {b:.7g}" for a, b in zip(given.losses, reference.losses) if not abs(a - b) <= tolerance.loss * abs(b)]
    if reference.weights:
        change = _norm([reference.weights[name] - start for name, start in before.items()], tolerance.order)
        for name, start in before.items():
            error = _norm([given.weights[name] - reference.weights[name]], tolerance.order) / change
            stored = CHECKED_STEPS * RESOLUTION * _norm([start], tolerance.order) / change if "pure" in side.words else 0.0
            if not error <= tolerance.weights + stored:
                wrong.append(f"{name} differs by {percent(error)} of what two steps change")
    if reference.logits is not None:
        error = np.inf if given.logits is None else np.abs(given.logits - reference.logits).max() / np.abs(reference.logits).max()
        if not error <= tolerance.logits:
            wrong.append(f"logits differ by {percent(error)} of the largest")
    if wrong:
        raise Disagreement(f"{side.name} does not compute what minivit does in float32: {'; '.join(wrong)}")


def _norm(arrays: list[np.ndarray], order: float) -> float:
    return float(np.linalg.norm([np.linalg.norm(a.ravel(), order) for a in arrays], order))
