"""Predictor: logits and probabilities of normalised images, with plans recorded once per batch size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from threading import BoundedSemaphore, RLock
from typing import Any
from weakref import WeakSet

import numpy as np

from ..errors import UserError
from ..grad_mode import no_grad
from ..kernels.core.arrays import array_on, as_array, copy_from_numpy, to_numpy
from ..kernels.cpu.changes import change_detector
from ..kernels.cpu.run import most_threads, threads_set
from ..models.base import Model
from ..models.cascade.calibration import Calibration, check, confidence
from ..nn.module import Module, Parameter, device_of, dtype_of, evaluating
from ..runtime.devices import check_device, copy_into, explain_out_of_memory, on_cpu
from ..runtime.parts import Parts, part_size
from ..runtime.plan import Plan
from ..runtime.precision import OF_PREDICTIONS, precision_for
from ..runtime.threads import thread_count
from ..tensor import Tensor

FIRST_PLANS, LATER_PLANS = 4, 16  # maximum number of plans kept by a Predictor: for the first stage, for each later stage
LARGEST_BATCH = 256
Arrays = tuple[np.ndarray | None, ...]  # the state passed from one stage of a cascade to the next; () for the first stage
ELEMENTS = 2**22  # maximum size of a batch in elements, so that activations stay near the caches


_predictors: WeakSet[Predictor] = WeakSet()


def _release_locks() -> None:
    """In a child of fork: the threads that held locks of predictors do not exist there, and would never release them."""
    for predictor in list(_predictors):
        predictor._begin_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_locks)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The predictions of a model for B images."""

    probabilities: np.ndarray  # (B, K) float32; each row sums to 1
    exits: np.ndarray  # (B,) int64: the exit of each image, from 0; 0 if the model is not a cascade
    macs: np.ndarray  # (B,) float64: the multiply-adds up to this exit; NaN if unknown
    class_names: tuple[str, ...] = ()  # (K,), or () if unknown
    sources: tuple[str | int, ...] = ()  # (B,) of `Classifier.predict`: the path of each image, otherwise its place among those given
    skipped: tuple[str, ...] = ()  # why each image that could not be read was left out, a line each

    @property
    def labels(self) -> np.ndarray:
        """The most probable class of each image, (B,) int64."""
        return self.probabilities.argmax(1)

    @property
    def names(self) -> list[str]:
        """The name of the most probable class of each image, or its number if names are unknown."""
        return [self.class_names[k] if self.class_names else str(k) for k in self.labels]

    @property
    def confidence(self) -> np.ndarray:
        """The probability of the most probable class, (B,) float32, independent of the confidence used by thresholds."""
        return self.probabilities.max(1)

    def __len__(self) -> int:
        return len(self.probabilities)


class Predictor:
    """predictor(images) -> logits, in evaluation mode, with plans of the model's forward that are recorded once per batch size.

    model: a module (B, C, H, W) -> (B, classes). Its weights may change between calls, for example by training or loading; after a change
    of single elements, which might not be detected, call `refresh()`.
    precision: for a float32 model "float32", "bf16x3", "bfloat16" or "auto" (`runtime/precision.py`); None: the dtype of the model.
    device: "cpu" or "cuda", to which the model is moved; None: its current device.
    batch_size: the maximum, beyond which batches are split; None: depending on the image size.
    threads: number of compute threads; None: the number of cores.
    tta: average the logits of an image and of its mirror image (test-time augmentation), for twice the time.
    Any number of threads may call it at once; `threads` of one call and the number of cores decide how many run side by side.
    A cascade has separate plans for each stage: with a budget, images that exit leave the batch, and the others continue without them
    (2105.15075, section 3.1). A few plans are kept; a batch slightly smaller than that of an existing plan is padded.
    """

    def __init__(
        self,
        model: Module,
        precision: str | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        threads: int | None = None,
        tta: bool = False,
    ) -> None:
        model_dtype = dtype_of(model).name
        if device is not None:
            check_device(device)
            model.to(device)
        self.precision = precision_for(precision or model_dtype, dtype_of(model), device_of(model), OF_PREDICTIONS)
        if self.precision.parameters != model_dtype:
            raise UserError(f"precision={precision!r} does not fit a model of dtype {model_dtype}: create it with dtype={precision!r}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        self.model, self.batch_size, self.threads, self.tta = model.unwrapped(), batch_size, thread_count(threads), tta
        self.stages = self.model.num_exits
        self._begin()

    def _begin(self) -> None:
        """Set up without any plan."""
        self._begin_locks()
        # For each stage, the plans that are free, by input shape, in order of last use.
        self._plans: list[dict[tuple[int, ...], list[_StagePlan]]] = []
        self._recorded: tuple[Any, list[Parameter], list[np.ndarray]] = None, [], []  # configuration, parameters, their arrays
        self._weights_changed: Callable[[], bool] = lambda: False  # whether the weights have changed since its last call
        self._version = 0  # of the weights: the number of changes
        self._costs = np.full(self.stages, np.nan)  # multiply-adds by exit
        self._verified: tuple[Calibration, bytes] | None = None  # the calibration checked last, and the head's bias at that time

    def _begin_locks(self) -> None:
        self._lock = RLock()  # protects the attributes of `_begin`, and is held while a plan is recorded
        self._slots = BoundedSemaphore(most_threads())  # as many plans run at once as there are cores; then each plan has one
        _predictors.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy holds: plans are recorded anew."""
        return {name: getattr(self, name) for name in ("precision", "model", "batch_size", "threads", "tta", "stages")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __call__(self, images: Any, budget: float | None = None) -> np.ndarray:
        """Logits (B, classes) float32 of images (B, C, H, W), normalised as in training.

        For a cascade, the logits of the last exit, or with a budget (see `predict`) those of each image's exit. The images may lie on the
        GPU, as for `Trainer.step`.
        """
        return self._logits_and_exits(images, budget)[0]

    def predict(self, images: Any, budget: float | None = None) -> Prediction:
        """Predictions for images (B, C, H, W); in a cascade, each image leaves at the first exit with sufficient confidence for the budget.

        budget: mean cost per image, in the unit of the model's calibration (`minivit.calibrate`); None: all images use the last exit.
        Raises UserError if the model has no thresholds for the budget, or thresholds for other weights.
        """
        return self._prediction(*self._logits_and_exits(images, budget))

    def logits(self, images: Any) -> np.ndarray:
        """The logits of every exit: (exits, B, classes) float32."""
        return np.concatenate([np.stack([*self._averaged_by_exit([part])]) for part in self._split(images)], axis=1)

    def exits(self, images: Any) -> Iterator[Prediction]:
        """Yields the predictions of one exit after another for all images, each computed on demand.

        The states between stages are kept for all images: about 70 kB per image for dvt_nano_32, 4 MB for dvt_deit_small.
        """
        for k, logits in enumerate(self._averaged_by_exit(self._split(images))):
            yield self._prediction(logits, np.full(len(logits), k))

    def check_budget(self, budget: float) -> None:
        """Raises UserError if the model has no thresholds for a budget, as `predict` does."""
        self._thresholds(budget)

    def refresh(self) -> None:
        """Read all weights again at the next call."""
        self._version += 1

    @property
    def plans(self) -> list[Plan | Parts]:
        """The recorded plans that are kept, of all stages."""
        return [stage.plan for plans in self._plans for free in plans.values() for stage in free]

    def _split(self, images: Any) -> list[np.ndarray]:
        """Split images into batches for plans; plans for replaced parameters are discarded."""
        images = images.data if isinstance(images, Tensor) else as_array(images)
        if self.tta or self.stages > 1 or device_of(self.model) == "cpu":  # these pick images, or mirror them
            images = on_cpu(images)
        if images.ndim != 4 or 0 in images.shape:
            raise UserError(f"images must have the shape (B, C, H, W) and hold an image, got {images.shape}")
        with self._lock:
            self._update()
        largest = self.batch_size or min(LARGEST_BATCH, max(1, ELEMENTS // prod(images.shape[1:])))
        return [images[start : start + largest] for start in range(0, len(images), largest)]

    def _update(self) -> None:
        """Discard all plans if the model's parameters were replaced or moved, for example by a Trainer."""
        self._version += self._weights_changed()
        config, parameters, arrays = self._recorded
        current_config = getattr(self.model, "config", None)
        if current_config is None or current_config is not config:  # only Models guarantee a new configuration object for new parameters
            parameters = self.model.parameters()
        if current_config is config and len(parameters) == len(arrays) and all(p.data is a for p, a in zip(parameters, arrays)):
            return
        self._plans, self._recorded = [{} for _ in range(self.stages)], (current_config, parameters, [p.data for p in parameters])
        self._weights_changed = change_detector(self._recorded[2]) if device_of(self.model) == "cpu" else lambda: True
        if isinstance(self.model, Model):
            self._costs = np.array(self.model.cost().exits, np.float64)

    def _logits_and_exits(self, images: Any, budget: float | None) -> tuple[np.ndarray, np.ndarray]:
        """(logits (B, classes), exits (B,)): the exit of each image, and its logits there."""
        thresholds = None if budget is None else self._thresholds(budget)
        if self.tta:
            *_, last = self._averaged_by_exit(self._split(images))
            return last, np.full(len(last), self.stages - 1)
        logits, exits = zip(*(self._run_with_exits(part, thresholds) for part in self._split(images)))
        return np.concatenate(logits), np.concatenate(exits)

    def _logits_by_exit(self, parts: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the logits (n, classes) of all parts for one exit after another."""
        states: list[Arrays] = [()] * len(parts)
        for k in range(self.stages):
            outputs = []
            for i, part in enumerate(parts):
                logits, states[i] = self._run(k, part, states[i], len(part))
                outputs.append(logits)
            yield np.concatenate(outputs)

    def _averaged_by_exit(self, parts: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Like `_logits_by_exit`, with tta the mean of those of the images and of their mirror images."""
        if not self.tta:
            yield from self._logits_by_exit(parts)
            return
        for logits, mirrored in zip(self._logits_by_exit(parts), self._logits_by_exit([part[..., ::-1] for part in parts])):
            yield (logits + mirrored) / 2

    def _run_with_exits(self, images: np.ndarray, thresholds: tuple[str, Sequence[float]] | None) -> tuple[np.ndarray, np.ndarray]:
        """(logits (B, classes), exits (B,)): each image leaves at the first exit with sufficient confidence; the others continue."""
        exits = np.zeros(len(images), np.int64)
        final_logits, state = self._run(0, images, (), len(images))
        active, logits = np.arange(len(images)), final_logits
        for k in range(1, self.stages):
            remains = np.ones(len(active), bool)
            if thresholds:  # NaN never leaves
                remains = ~(confidence(logits, thresholds[0]) >= thresholds[1][k - 1])
            active = active[remains]
            if not len(active):
                break
            logits, state = self._run(k, images[active], tuple(None if a is None else a[remains] for a in state), len(images))
            final_logits[active], exits[active] = logits, k
        return final_logits, exits

    def _thresholds(self, budget: float) -> tuple[str, Sequence[float]]:
        """The kind of confidence, and the thresholds of all exits but the last, for a budget. Raises UserError."""
        if self.stages == 1 or not isinstance(self.model, Model):
            raise UserError(f"budget={budget!r}: the model has one exit; a budget is for cascades, as create_model('dvt', ...)")
        calibration = self.model.calibration
        if calibration is None:
            raise UserError(f"budget={budget!r}: the model has no thresholds yet: calibrate it (minivit.calibrate, minivit calibrate)")
        bias = self.model.head.bias
        bias_bytes = bias.numpy().tobytes() if bias is not None else b""  # changed by every training step
        if self._verified is None or self._verified[0] is not calibration or self._verified[1] != bias_bytes:
            check(calibration, self.model)
            self._verified = calibration, bias_bytes
        if self.tta:
            raise UserError(f"budget={budget!r}: its thresholds are for logits that are no averages: leave tta out")
        return calibration.confidence, calibration.for_budget(budget)

    def _prediction(self, logits: np.ndarray, exits: np.ndarray) -> Prediction:
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return Prediction(powers / powers.sum(1, keepdims=True), exits=exits, macs=self._costs[exits])

    def _run(self, k: int, images: np.ndarray, state: Arrays, initial_size: int) -> tuple[np.ndarray, Arrays]:
        """Run stage k: (logits, state for the next stage). state: from stage k - 1. initial_size: batch size at the first stage."""
        with self._slots:
            plans = self._plans[k]
            key, plan = self._take(plans, k, images, state, initial_size)
            try:
                return plan(images, state)
            finally:
                self._give_back(plans, k, key, plan)

    def _take(
        self, plans: dict[tuple[int, ...], list[_StagePlan]], k: int, images: np.ndarray, state: Arrays, initial_size: int
    ) -> tuple[tuple[int, ...], _StagePlan]:
        """A plan that no other thread uses meanwhile, and its input shape."""
        size = len(images)
        min_size = size if size == initial_size else _padded(size, initial_size)
        with self._lock:
            usable = [s for s, free in plans.items() if free and s[1:] == images.shape[1:] and min_size <= s[0] <= 1.25 * size]
            key = min(usable, default=(min_size, *images.shape[1:]))
            if key in usable:
                plan = plans[key].pop()
                if plan.version != self._version:
                    plan.plan.prepare()
            else:
                with threads_set(self.threads), self.precision.products(), explain_out_of_memory(min_size):
                    plan = _StagePlan(self.model, k, key, state, self.precision.activations)
            plan.version = self._version
            return key, plan

    def _give_back(self, plans: dict[tuple[int, ...], list[_StagePlan]], k: int, key: tuple[int, ...], plan: _StagePlan) -> None:
        with self._lock:
            plans[key] = [*plans.pop(key, ()), plan]
            if len(plans) > (FIRST_PLANS if k == 0 else LATER_PLANS):
                del plans[next(iter(plans))]  # the least recently used ones


def _padded(size: int, initial_size: int) -> int:
    """The plan size for `size` remaining images of a batch: one of few sizes, and at most a quarter larger than `size`."""
    step = max(1, (1 << (size - 1).bit_length()) // 8)
    return min(initial_size, -(-size // step) * step)


class _StagePlan:
    """The plan of one stage, or of a model that is not a cascade, for batches of one shape."""

    def __init__(self, model: Module, k: int, shape: tuple[int, ...], state: Arrays, dtype: np.dtype) -> None:
        device, constants = device_of(model), [p.data for p in model.parameters()]
        size = part_size(shape[0], prod(shape[1:])) if device == "cpu" else 0
        rows = -(-shape[0] // size) * size if size else shape[0]
        self.images = array_on(device, np.zeros((rows, *shape[1:]), dtype))  # (rows, C, H, W), of which B are used
        self.state = tuple(None if a is None else array_on(device, np.zeros((rows, *a.shape[1:]), a.dtype)) for a in state)
        self.present: list[bool] = []  # which entries of the state for the next stage are not None
        compute, batch = partial(self._compute, model, k), (self.images, *self.state)
        with evaluating(model), no_grad():
            self.plan = Parts(compute, batch, size, constants) if size else Plan(lambda: compute(*batch), constants, device)
        self.version = 0  # of the weights for which the plan was prepared

    def _compute(self, model: Module, k: int, images: Any, *state_before: Any) -> tuple[Any, ...]:
        previous_state = tuple(None if a is None else Tensor(a) for a in state_before)
        logits, state = model.stage(k, Tensor(images), previous_state)
        self.present = [tensor is not None for tensor in state]
        return logits.data, *(tensor.data for tensor in state if tensor is not None)

    def __call__(self, images: np.ndarray, state: Arrays) -> tuple[np.ndarray, Arrays]:
        size = len(images)
        copy_into(self.images[:size], images)
        for buffer, array in zip(self.state, state):
            if buffer is not None and array is not None:
                copy_from_numpy(buffer[:size], array)
        self.plan.replay()
        logits, *next_state = (np.array(to_numpy(a)[:size]) for a in self.plan.results)
        remaining = iter(next_state)
        return logits.astype(np.float32, copy=False), tuple(next(remaining) if present else None for present in self.present)
