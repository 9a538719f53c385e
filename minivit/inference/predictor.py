"""Predictor: from normalised images to logits and probabilities, by plans that are recorded once for each batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import BoundedSemaphore, RLock
from typing import Any

import numpy as np

from ..errors import UserError
from ..grad_mode import no_grad
from ..kernels.core.arrays import array_on, copy_from_numpy, to_numpy
from ..kernels.cpu.changes import change_detector
from ..kernels.cpu.run import most_threads, threads_set
from ..models.base import Model
from ..models.cascade.calibration import Calibration, check, confidence
from ..nn.module import Module, Parameter, device_of, dtype_of, evaluating
from ..runtime.devices import check_device, explain_out_of_memory
from ..runtime.plan import Plan
from ..runtime.precision import precision_for
from ..runtime.threads import thread_count
from ..tensor import Tensor

FIRST_PLANS, LATER_PLANS = 4, 16  # batch sizes whose plans a Predictor keeps: of the first stage, of each other
LARGEST_BATCH = 256
Arrays = tuple[np.ndarray | None, ...]  # the state that a stage of a cascade hands to the next; () before the first
ELEMENTS = 2**22  # of all images of a batch together, at most: activations stay near the caches


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model makes of B images."""

    probabilities: np.ndarray  # (B, K) float32; each row sums to 1
    exits: np.ndarray  # (B,) int64: which exit answered, from 0; 0 of a model without others
    macs: np.ndarray  # (B,) float64: the multiply-adds up to there; NaN of a model that tells none
    class_names: tuple[str, ...] = ()  # K of them, where the model knows them

    @property
    def labels(self) -> np.ndarray:
        """(B,) int64: the likeliest class of each image."""
        return self.probabilities.argmax(1)

    @property
    def names(self) -> list[str]:
        """The likeliest class of each image, by name, or by number where there are no names."""
        return [self.class_names[k] if self.class_names else str(k) for k in self.labels]

    @property
    def confidence(self) -> np.ndarray:
        """(B,) float32: the probability of the likeliest class, whatever the thresholds go by."""
        return self.probabilities.max(1)

    def __len__(self) -> int:
        return len(self.probabilities)


class Predictor:
    """predictor(images) -> logits, in evaluation mode, by plans of the model's forward that are recorded once for each batch size.

    model: is called on (B, C, H, W) and returns (B, classes). Its weights may change between calls, as by training or loading; after a
    change of single elements, which might not be noticed, call `refresh()`. precision: of a float32 model
    "float32", "bf16x3", "bfloat16" or "auto", as `minivit.precision` says; None: the model's own. device: "cpu" or "cuda", where the model
    moves; None: where it is. batch_size: of the largest plan; larger batches are split; None fits it to the images.
    threads: how many compute; None: as many as there are cores.
    Any number of threads may call it at once; `threads` of one call and the number of cores say how many are computed side by side.
    A cascade has plans of each stage by itself: with a budget, images that exit leave the batch, and the others go on without them
    (2105.15075, section 3.1). A few plans are kept; a batch a little smaller than one of them is padded for it.
    """

    def __init__(
        self,
        model: Module,
        precision: str | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        threads: int | None = None,
    ) -> None:
        own = dtype_of(model).name
        if device is not None:
            check_device(device)
            model.to(device)
        self.precision = precision_for(precision or own, dtype_of(model), device_of(model))
        if self.precision.parameters != own:
            raise UserError(f"precision={precision!r} does not fit a model of dtype {own}: create it with dtype={precision!r}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        self.model, self.batch_size, self.threads = model.unwrapped(), batch_size, thread_count(threads)
        self.stages = self.model.num_exits
        self._begin()

    def _begin(self) -> None:
        """Without any plan yet."""
        self._lock = RLock()  # over the attributes below, and while a plan is recorded
        self._slots = BoundedSemaphore(max(1, most_threads() // self.threads))  # as many plans run at once as there are cores for
        self._plans: list[
            dict[tuple[int, ...], list[_StagePlan]]
        ] = []  # of each stage, those that are free, by input shape; last used last
        self._recorded: tuple[Any, list[Parameter], list[np.ndarray]] = None, [], []  # configuration, parameters, their arrays
        self._changed: Callable[[], bool] = lambda: False  # whether the weights have, since it was asked last
        self._version = 0  # of the weights: how often they have
        self._costs = np.full(self.stages, np.nan)  # multiply-adds by exit
        self._checked: tuple[Calibration, bytes] | None = None  # what was found to fit the weights, and a sign of these

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy holds: plans are recorded anew."""
        return {name: getattr(self, name) for name in ("precision", "model", "batch_size", "threads", "stages")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __call__(self, images: Any, budget: float | None = None) -> np.ndarray:
        """Logits (B, classes) float32 of images (B, C, H, W), normalised as in training.

        Of a cascade the last exit's, or with a budget, as `predict` takes it, those of the exit that each image takes.
        """
        return self._answers(images, budget)[0]

    def predict(self, images: Any, budget: float | None = None) -> Prediction:
        """What the model makes of images (B, C, H, W): of a cascade each at the first exit that is sure enough for the budget.

        budget: mean cost of an image, in the unit of the model's calibration (`minivit.calibrate`); None: all go to the last exit.
        Raises UserError where the model has no thresholds for it, or those of other weights.
        """
        return self._prediction(*self._answers(images, budget))

    def logits(self, images: Any) -> np.ndarray:
        """The logits of every exit: (exits, B, classes) float32."""
        return np.concatenate([np.stack([*self._logits_by_exit([part])]) for part in self._parts(images)], axis=1)

    def exits(self, images: Any) -> Iterator[Prediction]:
        """The model's answers for all images, an exit at a time, each computed when it is asked for.

        What stages hand on is kept for all images meanwhile: about 70 kB an image for dvt_nano_32, 4 MB for dvt_deit_small.
        """
        for k, logits in enumerate(self._logits_by_exit(self._parts(images))):
            yield self._prediction(logits, np.full(len(logits), k))

    def refresh(self) -> None:
        """Read all weights anew at the next call."""
        self._version += 1

    @property
    def plans(self) -> list[Plan]:
        """The recorded plans that are kept, of all stages."""
        return [stage.plan for plans in self._plans for free in plans.values() for stage in free]

    def _parts(self, images: Any) -> list[np.ndarray]:
        """The images in batches that plans take; plans of parameters that lie elsewhere by now are dropped."""
        images = images.data if isinstance(images, Tensor) else np.asarray(images)
        if images.ndim != 4 or 0 in images.shape:
            raise UserError(f"images must have the shape (B, C, H, W) and hold an image, got {images.shape}")
        with self._lock:
            self._follow()
        largest = self.batch_size or min(LARGEST_BATCH, max(1, ELEMENTS // images[0].size))
        return [images[start : start + largest] for start in range(0, len(images), largest)]

    def _follow(self) -> None:
        """Begin anew where the model has other parameters, or they lie elsewhere: a Trainer has moved them, for one."""
        self._version += self._changed()
        config, parameters, arrays = self._recorded
        now = getattr(self.model, "config", None)
        if now is None or now is not config:  # only families promise that other parameters mean another configuration
            parameters = self.model.parameters()
        if now is config and len(parameters) == len(arrays) and all(p.data is a for p, a in zip(parameters, arrays)):
            return
        self._plans, self._recorded = [{} for _ in range(self.stages)], (now, parameters, [p.data for p in parameters])
        self._changed = change_detector(self._recorded[2]) if device_of(self.model) == "cpu" else lambda: True
        if isinstance(self.model, Model):
            self._costs = np.array(self.model.cost().exits, np.float64)

    def _answers(self, images: Any, budget: float | None) -> tuple[np.ndarray, np.ndarray]:
        """(logits (B, classes), the exit (B,) that gave them)."""
        thresholds = None if budget is None else self._thresholds(budget)
        logits, exits = zip(*(self._stopping(part, thresholds) for part in self._parts(images)))
        return np.concatenate(logits), np.concatenate(exits)

    def _logits_by_exit(self, parts: list[np.ndarray]) -> Iterator[np.ndarray]:
        """The logits of all parts together, an exit at a time."""
        states: list[Arrays] = [()] * len(parts)
        for k in range(self.stages):
            answers = []
            for i, part in enumerate(parts):
                logits, states[i] = self._run(k, part, states[i], len(part))
                answers.append(logits)
            yield np.concatenate(answers)

    def _stopping(self, images: np.ndarray, thresholds: tuple[str, Sequence[float]] | None) -> tuple[np.ndarray, np.ndarray]:
        """(logits (B, classes), exits (B,)): each image stops at the first exit that is sure of it, and the others go on without it."""
        exits = np.zeros(len(images), np.int64)
        answers, state = self._run(0, images, (), len(images))
        going, logits = np.arange(len(images)), answers
        for k in range(1, self.stages):
            stays = np.ones(len(going), bool)
            if thresholds:  # NaN is never sure
                stays = ~(confidence(logits, thresholds[0]) >= thresholds[1][k - 1])
            going = going[stays]
            if not len(going):
                break
            logits, state = self._run(k, images[going], tuple(None if a is None else a[stays] for a in state), len(images))
            answers[going], exits[going] = logits, k
        return answers, exits

    def _thresholds(self, budget: float) -> tuple[str, Sequence[float]]:
        """The kind of confidence, and the least of it that stops an image at each exit but the last."""
        if self.stages == 1 or not isinstance(self.model, Model):
            raise UserError(f"budget={budget!r}: the model has one exit; a budget is for cascades, as create_model('dvt', ...)")
        found = self.model.calibration
        if found is None:
            raise UserError(f"budget={budget!r}: the model has no thresholds yet: calibrate it (minivit.calibrate, minivit calibrate)")
        bias = self.model.head.bias
        sign = bias.numpy().tobytes() if bias is not None else b""  # which every step of training changes
        if self._checked is None or self._checked[0] is not found or self._checked[1] != sign:
            check(found, self.model)
            self._checked = found, sign
        return found.confidence, found.for_budget(budget)

    def _prediction(self, logits: np.ndarray, exits: np.ndarray) -> Prediction:
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return Prediction(powers / powers.sum(1, keepdims=True), exits=exits, macs=self._costs[exits])

    def _run(self, k: int, images: np.ndarray, state: Arrays, whole: int) -> tuple[np.ndarray, Arrays]:
        """(logits, what the next stage reuses) of stage k. state: what stage k - 1 gave. whole: images of the batch that set out."""
        with self._slots:
            plans = self._plans[k]
            key, plan = self._take(plans, k, images, state, whole)
            try:
                return plan(images, state)
            finally:
                self._give_back(plans, k, key, plan)

    def _take(
        self, plans: dict[tuple[int, ...], list[_StagePlan]], k: int, images: np.ndarray, state: Arrays, whole: int
    ) -> tuple[tuple[int, ...], _StagePlan]:
        """A plan that nobody else uses meanwhile, and its input shape."""
        number = len(images)
        least = number if number == whole else _padded(number, whole)
        with self._lock:
            fitting = [s for s, free in plans.items() if free and s[1:] == images.shape[1:] and least <= s[0] <= 1.25 * number]
            key = min(fitting, default=(least, *images.shape[1:]))
            if key in fitting:
                plan = plans[key].pop()
                if plan.version != self._version:
                    plan.plan.prepare()
            else:
                with threads_set(self.threads), self.precision.products(), explain_out_of_memory(least):
                    plan = _StagePlan(self.model, k, key, state, self.precision.activations)
            plan.version = self._version
            return key, plan

    def _give_back(self, plans: dict[tuple[int, ...], list[_StagePlan]], k: int, key: tuple[int, ...], plan: _StagePlan) -> None:
        with self._lock:
            plans[key] = [*plans.pop(key, ()), plan]
            if len(plans) > (FIRST_PLANS if k == 0 else LATER_PLANS):
                del plans[next(iter(plans))]  # those that have not been used for longest


def _padded(number: int, whole: int) -> int:
    """The size of the plan for what is left of a whole batch: one of few, and at most a quarter more than `number`."""
    step = max(1, (1 << (number - 1).bit_length()) // 8)
    return min(whole, -(-number // step) * step)


class _StagePlan:
    """The plan of one stage, or of a model without stages, for batches of one shape."""

    def __init__(self, model: Module, k: int, shape: tuple[int, ...], state: Arrays, dtype: np.dtype) -> None:
        device = device_of(model)
        self.images = array_on(device, np.zeros(shape, dtype))  # (B, C, H, W)
        self.state = tuple(None if a is None else array_on(device, np.zeros((shape[0], *a.shape[1:]), a.dtype)) for a in state)
        self.given: list[bool] = []  # which of the things that the next stage may reuse there are
        with evaluating(model), no_grad():
            self.plan = Plan(lambda: self._compute(model, k), [p.data for p in model.parameters()], device)
        self.version = 0  # of the weights that the plan is prepared for

    def _compute(self, model: Module, k: int) -> tuple[np.ndarray, ...]:
        reused = tuple(None if a is None else Tensor(a) for a in self.state)
        logits, state = model.stage(k, Tensor(self.images), reused)
        self.given = [tensor is not None for tensor in state]
        return logits.data, *(tensor.data for tensor in state if tensor is not None)

    def __call__(self, images: np.ndarray, state: Arrays) -> tuple[np.ndarray, Arrays]:
        number = len(images)
        copy_from_numpy(self.images[:number], images)
        for own, array in zip(self.state, state):
            if own is not None and array is not None:
                copy_from_numpy(own[:number], array)
        self.plan.replay()
        logits, *reused = (np.array(to_numpy(a)[:number]) for a in self.plan.results)
        left = iter(reused)
        return logits.astype(np.float32, copy=False), tuple(next(left) if there else None for there in self.given)
