"""Trainer: single optimizer steps, recorded once per batch shape and then replayed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from math import isfinite, sqrt
from threading import Lock
from typing import Any

import numpy as np

from ..errors import UserError, listed, nearest
from ..functional import checked_class_weights, classes_below, cross_entropy, sum_of
from ..interrupts import deferred
from ..kernels.core import arrays
from ..kernels.core.devices import device_of
from ..kernels.cpu.run import threads_set
from ..models.base import Model
from ..nn.layers import Random
from ..nn.module import Module, dtype_of
from ..optim import OPTIMIZERS, FlatParameters
from ..runtime.devices import check_device, copy_into, explain_out_of_memory, on_cpu
from ..runtime.plan import Plan
from ..runtime.precision import Precision, precision_for
from ..runtime.threads import thread_count
from ..tensor import Tensor

SHAPES = 4  # maximum number of batch shapes whose buffers and plans a Trainer keeps
# Each part of a batch packs the weights again and reads their gradients, while doubling the number of parts saves half as much memory as
# the previous doubling. Hence the number of parts is the square root of the memory that backward keeps, in units of the larger of
# PART_OF_WEIGHTS times the memory of the weights and PART_BYTES.
PART_OF_WEIGHTS, PART_BYTES = 2, 32 << 20


class TrainingError(UserError):
    """Training cannot continue, because the loss or a weight is not finite."""

    status = 1


class Trainer:
    """Trains a model batch by batch.

    model: a Module that maps images (B, C, H, W) to logits (B, K). The loss is the mean cross-entropy; for a cascade, the sum over all
        exits with equal weights and nothing detached (2105.15075, section 3.2). The trainable parameters are moved into one flat buffer.
    precision: "float32", "bf16x3", "bfloat16", "float64" or "auto" (`minivit.runtime.precision`). For "float64" a float32 model is
        converted; a float64 model is always trained in float64. `precision.name` is the resulting precision.
    device: "cpu", or "cuda", to which the entire model is moved. optimizer: "adamw", "sgd" or "muon"; its specific options (betas, eps;
        momentum, nesterov; those of both and adjust_lr_fn, ns_steps) are also accepted as keywords.
    weight_decay: for all parameters except those with one dimension, biases, class tokens and position embeddings
        (`Module.decayed_parameters`).
    clip_norm: maximum global norm of the gradient; None or 0: no clipping. label_smoothing: 0 ... below 1 (`functional.cross_entropy`).
    class_weights: (K,), the weight of each class in the loss (`functional.cross_entropy`); None: all alike. Against classes the mean is
        Σ w·loss / Σ w over the entire batch, also where it is computed in parts.
    accumulate: number of parts of a batch that are computed one after the other, to save memory; the gradient is that of the entire batch.
        None: 1 on a GPU and for a Module that is not `separable`, and nothing else for one with batch normalisation; otherwise selected
        by `parts`, so that activations need one half to one fourth of the memory for 1 to 2 % more time.
    ema: decay of a running average of the weights, e.g. 0.999; None or 0: none. `averaged()` swaps it into the model.
    layer_decay: factor of the learning rate from each layer to the layer before it, above 0 ... 1 (`Module.layer_numbers`).
    plan: record the first step for each batch shape and replay it afterwards (`minivit.runtime.plan`): identical results without the
        overhead of Python and the allocator. Python control flow in the model is then fixed at the first step.
    threads: number of compute threads; None: the number of cores. It does not affect results.

    lr, weight_decay: may be set between steps. steps: number of steps so far. gradient_norm: of the last step, before clipping.
    is_averaged: whether the model has the average of its weights.
    Raises UserError for values out of range.
    """

    def __init__(
        self,
        model: Module,
        *,
        precision: str = "float32",
        device: str = "cpu",
        optimizer: str = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        clip_norm: float | None = None,
        label_smoothing: float = 0.0,
        class_weights: Any = None,
        accumulate: int | None = None,
        ema: float | None = None,
        layer_decay: float = 1.0,
        plan: bool = True,
        threads: int | None = None,
        **optimizer_options: Any,
    ) -> None:
        check_device(device)
        self.threads = thread_count(threads)
        if optimizer not in OPTIMIZERS:
            raise UserError(f"unknown optimizer {optimizer!r}{nearest(optimizer, OPTIMIZERS)}: choose {', '.join(OPTIMIZERS)}")
        available = OPTIMIZERS[optimizer].options()
        for name in optimizer_options:
            if name not in available:
                raise UserError(f"{optimizer} has no option {name!r}{nearest(name, available)}; its own are {', '.join(available)}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must lie in 0 ... below 1, got {label_smoothing}")
        if accumulate is not None and accumulate < 1:
            raise UserError(f"accumulate must be 1 or more, got {accumulate}")
        self.model, self.label_smoothing, self.accumulate, self.plan = model, label_smoothing, accumulate, plan
        self._separable = model.separable and not model.statistic_parameters()
        if accumulate is not None and accumulate > 1 and model.statistic_parameters():
            raise UserError(f"accumulate={accumulate}: the model normalises over the whole batch, which has no parts: leave accumulate out")
        self.precision = precision_for(precision, dtype_of(model), device)
        classes = model.config.num_classes if isinstance(model, Model) else np.size(class_weights)
        weights = None if class_weights is None else checked_class_weights(class_weights, classes)
        with explain_out_of_memory(1):
            first, products = OPTIMIZERS[optimizer].first, self.precision.activations
            self.flat = FlatParameters(model, self.precision.parameters, device, first, products, layer_decay)
        self.class_weights = None if weights is None else arrays.array_on(device, weights.astype(self.precision.parameters))  # (K,)
        self._bf16_copy = device == "cuda" and self.precision.name == "bfloat16"  # on the CPU, packing rounds weights
        self.optimizer = OPTIMIZERS[optimizer](
            self.flat, lr=lr, weight_decay=weight_decay, clip_norm=clip_norm, ema=ema, **optimizer_options
        )
        self.steps, self.is_averaged = 0, False
        self._shapes: dict[tuple[Any, ...], _Batch] = {}  # shapes of images and labels -> buffers and plan, in order of last use
        self._lock = Lock()  # held during a step
        self._arguments = dict(precision=precision, device=device, optimizer=optimizer, weight_decay=weight_decay, clip_norm=clip_norm)
        self._arguments |= dict(
            label_smoothing=label_smoothing,
            class_weights=weights,
            accumulate=accumulate,
            ema=ema,
            layer_decay=layer_decay,
            plan=plan,
            threads=threads,
            **optimizer_options,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle or a copy contains: the model and the optimizer's state; steps are recorded again."""
        return _restored, (self.model, self._arguments, self.optimizer.state_dict(), self.steps)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of what later steps depend on: "model.<name>", "optimizer.<name>", and "random", the states of dropout, (states, 2)."""
        random = [np.asarray(arrays.to_numpy(each.state)).view(np.int64) for each in self._random_states()]
        return {
            **{f"model.{name}": value for name, value in self.model.state_dict().items()},
            **{f"optimizer.{name}": value for name, value in self.optimizer.state_dict().items()},
            "random": np.array(random, np.int64).reshape(-1, 2),
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where a Trainer with equal arguments was. Raises UserError, before anything changes, for another model or optimizer."""
        own = self.state_dict()
        wrong = [n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape]
        if wrong:
            raise UserError(f"the state is of another model or optimizer: {listed(sorted(wrong))} do not fit")
        for part, prefix in ((self.model, "model."), (self.optimizer, "optimizer.")):
            part.load_state_dict({n.removeprefix(prefix): state[n] for n in state if n.startswith(prefix)})
        for random, values in zip(self._random_states(), state["random"]):
            arrays.copy_from_numpy(random.state, values.astype(np.int64).view(np.uint64))
        self.steps = self.optimizer.steps

    def _random_states(self) -> list[Random]:
        """Of the model's dropout layers, in a fixed order."""
        return list({id(v): v for module in self.model.modules() for v in vars(module).values() if isinstance(v, Random)}.values())

    @property
    def lr(self) -> float:
        return self.optimizer.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer.lr = value

    @property
    def weight_decay(self) -> float:
        return self.optimizer.weight_decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self.optimizer.weight_decay = value

    @property
    def gradient_norm(self) -> float:
        return self.optimizer.gradient_norm

    def step(self, images: Any, labels: Any) -> float:
        """Perform one optimizer step; returns the mean loss of the batch before the update.

        images: (B, C, H, W) floats, normalised. labels: (B,) integers below K, or (B, K) probabilities. Both may lie on the
        GPU too, as arrays of CuPy, PyTorch or another library with CUDA's array interface, with any strides.
        Raises UserError for invalid arrays, without changing anything; TrainingError if the loss is not finite, in which case the weights
        are unusable.
        """
        return self.submit(images, labels).value()

    def submit(self, images: Any, labels: Any) -> PendingLoss:
        """Like `step`, without waiting for a GPU, which computes while the next batch is prepared; `value()` of the result is the loss."""
        if not self._lock.acquire(blocking=False):
            raise UserError("a Trainer makes one step at a time, and another thread is in one: give each thread a Trainer of its own")
        try:
            return self._submit(_array(images), _array(labels))
        finally:
            self._lock.release()

    def _submit(self, images: Any, labels: Any) -> PendingLoss:
        if self.flat.device == "cpu":
            images, labels = on_cpu(images), on_cpu(labels)
        key = tuple(images.shape), tuple(labels.shape)
        batch = self._shapes.get(key) or self._new_batch(images, labels)
        batch.fill(images, labels)
        self.flat.check()
        if batch.plan:
            batch.plan.replay()
        else:
            with threads_set(self.threads), self.precision.products(), explain_out_of_memory(len(batch.parts[-1][0])):
                if self.plan:
                    batch.plan = Plan(lambda: self._compute(batch), device=self.flat.device)
                batch.losses = batch.plan.results if batch.plan else self._compute(batch)
        self.steps += 1
        self._shapes.pop(key, None)
        self._shapes[key] = batch
        return PendingLoss(self, batch)

    @property
    def plans(self) -> list[Plan]:
        """The recorded steps that are currently kept, one per batch shape, in order of last use."""
        return [batch.plan for batch in self._shapes.values() if batch.plan]

    def swap_average(self) -> None:
        """Swap the model's weights with their running average, if `ema` is enabled. An interrupt waits for the end."""
        with deferred():
            self.optimizer.swap_average()
            self.is_averaged = not self.is_averaged

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context manager: inside, the model has the running average of its weights, if `ema` is enabled."""
        try:
            self.swap_average()
            yield
        finally:
            if self.is_averaged:
                self.swap_average()

    def _new_batch(self, images: np.ndarray, labels: np.ndarray) -> _Batch:
        if len(self._shapes) == SHAPES:
            del self._shapes[next(iter(self._shapes))]  # the least recently used one
        if images.ndim != 4 or 0 in images.shape:
            raise UserError(f"images must have the shape (B, C, H, W) and hold an image, got {images.shape}")
        if labels.ndim not in (1, 2) or len(labels) != len(images):
            raise UserError(f"labels must have the shape ({len(images)},) or ({len(images)}, classes), got {labels.shape}")
        return _Batch(
            tuple(images.shape), tuple(labels.shape), self.parts(len(images)), self.precision, self.flat.device, self.class_weights
        )

    def parts(self, images: int) -> int:
        """The number of parts for a batch of `images` images: `accumulate` if set, at most one part per image.

        Otherwise it depends on the memory that backward keeps if all layers are trained, relative to that of the trainable weights.
        """
        if self.accumulate:
            return min(images, self.accumulate)
        if self.flat.device != "cpu" or not self._separable or not isinstance(self.model, Model):
            return 1
        kept_bytes = images * self.model.cost().activations * self.precision.activations.itemsize
        return max(1, min(images, round(sqrt(kept_bytes / max(PART_BYTES, PART_OF_WEIGHTS * self.flat.data.nbytes)))))

    def _compute(self, batch: _Batch) -> tuple[np.ndarray, ...]:
        """Forward, backward and update; returns the loss () of each part."""
        self.model.train()
        self.flat.forget_gradients()
        losses = []
        with self.flat.with_bf16_copy() if self._bf16_copy else nullcontext():
            for (images, labels), share in zip(batch.parts, batch.shares):
                exits = self.model.exits(Tensor(images))
                batch.check_classes(exits[-1].shape[1])
                weighting = dict(weight=self.class_weights, batch=batch.classes_of_all)
                loss = sum_of(cross_entropy(logits, labels, self.label_smoothing, **weighting) for logits in exits)
                loss.backward(share)
                losses.append(loss.data)
        self.flat.clear_unused_gradients()
        self.optimizer.step()
        return tuple(losses)


def _restored(model: Module, arguments: dict[str, Any], optimizer: dict[str, np.ndarray], steps: int) -> Trainer:
    """A Trainer that goes on where another one was."""
    trainer = Trainer(model, **arguments)
    trainer.optimizer.load_state_dict(optimizer)
    trainer.steps = steps
    return trainer


def _array(values: Any) -> Any:
    return values.data if isinstance(values, Tensor) else arrays.as_array(values)


class PendingLoss:
    """The loss of a step that may still be running."""

    def __init__(self, trainer: Trainer, batch: _Batch) -> None:
        self._shares = batch.shares
        self._parts = [arrays.fetch(loss) for loss in batch.losses]  # copied, because the next step overwrites them
        self._step, self._lr = trainer.steps, trainer.lr

    def value(self) -> float:
        """Wait for the loss. Raises TrainingError if it is not finite."""
        loss = sum(share * float(part()) for share, part in zip(self._shares, self._parts))
        if not isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self._step} with learning rate {self._lr:g}: lower lr, lengthen the warmup "
                "or set clip_norm, and see that all images are finite"
            )
        return loss


class _Batch:
    """The buffers for batches of one shape, in parts whose sizes differ by at most one image, and the plan that reads them."""

    def __init__(
        self, images: tuple[int, ...], labels: tuple[int, ...], parts: int, precision: Precision, device: str, class_weights: Any
    ) -> None:
        label_dtype = np.int64 if len(labels) == 1 else precision.parameters
        self.images = arrays.empty(images, precision.activations, device)  # (B, C, H, W)
        self.labels = arrays.empty(labels, label_dtype, device)  # (B,) or (B, K)
        bounds = [images[0] * i // parts for i in range(parts + 1)]
        self.parts = [(self.images[start:stop], self.labels[start:stop]) for start, stop in pairwise(bounds)]
        self.class_weights = class_weights
        self.classes_of_all = self.labels if class_weights is not None and len(labels) == 1 else None  # where parts have unequal weights
        self.shares = [(stop - start) / images[0] if self.classes_of_all is None else 1.0 for start, stop in pairwise(bounds)]
        self.last_labels = np.zeros(0)  # the labels of the current batch
        self.classes = 0  # number of classes of the model; 0 before the first step
        self.plan: Plan | None = None
        self.losses: tuple[np.ndarray, ...] = ()  # of shape (), one per part

    def fill(self, images: Any, labels: Any) -> None:
        """Copy a batch into the buffers. Raises UserError for invalid labels."""
        if labels.ndim == 1 and device_of(labels) == "cpu":
            if labels.dtype.kind not in "iu":
                raise UserError(f"labels must be integers, or rows of probabilities, got {labels.dtype} of shape {labels.shape}")
            if self.classes and (labels.min() < 0 or labels.max() >= self.classes):
                classes_below(labels, self.classes)  # raises
        self.last_labels = labels
        for buffer, values in ((self.images, images), (self.labels, labels)):
            copy_into(buffer, values)

    def check_classes(self, classes: int) -> None:
        """Raises UserError if the labels do not match the model's number of classes."""
        if self.labels.ndim == 2 and self.labels.shape[1] != classes:
            raise UserError(f"labels have {self.labels.shape[1]} columns, the model {classes} classes")
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise UserError(f"there are {len(self.class_weights)} class weights, the model has {classes} classes")
        if self.labels.ndim == 1 and device_of(self.last_labels) == "cpu":
            classes_below(self.last_labels, classes)  # of the entire batch, so that the message names the right position
        self.classes = classes
