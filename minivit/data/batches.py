"""Batches for training and evaluation: selection, order and augmentation of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..kernels import OPS
from ..kernels.core.arrays import empty, to_device
from .augmentation import Policy, draw, find_policy
from .dataset import check_seed
from .labels import check_labels
from .mixing import check_mixing, draw_mixing

ORDER, BATCH = 0, 1  # the use of random numbers: the last word of the Philox counter


class Batches:
    """Normalised batches of a set of images, epoch by epoch.

    Every random number depends only on (seed, epoch, batch), through a counter-based generator (Philox; Salmon et al., 2011): an epoch is
    reproducible bit for bit, independent of earlier ones, and can start at any batch.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        augmentation: str | Policy = "none",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        repeats: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        device: str = "cpu",
    ) -> None:
        """
        images: (n, H, W, C) C-contiguous, uint8 or float32 in 0..1; H = W.   labels: (n,) integers below `num_classes`.
        mean, std: (C,), on the scale 0..1.   augmentation: a name in POLICIES, or a policy.
        mixup, cutmix: the alphas of their Beta distributions; 0 disables. If either is enabled, targets are soft.
        repeats: how many times an image that is chosen stands in a batch, changed anew each time (1901.09335); an epoch keeps its length,
            and so shows as many times fewer images, others in each epoch.
        drop_last: omit the last, incomplete batch; with `shuffle`, this omits different images in each epoch.
        device: the device on which batches are computed: "cpu", or "cuda", whose memory then holds all images as stored.

        Raises UserError for labels out of range, for another number of means than of channels, and if there are too few images for a batch.
        """
        self.images, self.device = images, device
        self.labels = check_labels(labels, len(images))
        self.batch_size, self.num_classes = batch_size, num_classes
        self.mean, self.std = np.array(mean, np.float32), np.array(std, np.float32)  # (C,)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values.shape != images.shape[3:]:
                raise UserError(f"{name} must hold a number for each of the {images.shape[-1]} channels, got {values.shape}")
        self.seed, self.repeats, self.shuffle, self.drop_last = seed, repeats, shuffle, drop_last
        self._device_images: Any = None  # copied on first use
        self.policy = find_policy(augmentation)
        self.mixup, self.cutmix = mixup, cutmix
        check_mixing(mixup=mixup, cutmix=cutmix)
        check_seed(seed)
        for name, number in (("batch_size", batch_size), ("repeats", repeats)):
            if number < 1:
                raise UserError(f"{name} must be 1 or more, got {number}")
        if len(self) == 0:
            raise UserError(f"batch_size {batch_size} is larger than the {len(images)} images: choose {len(images)} or less")
        if self.labels.max() >= num_classes:
            first = int(np.argmax(self.labels >= num_classes))
            raise UserError(
                f"labels[{first}] is {self.labels[first]}, out of range for {num_classes} classes: labels must be 0..{num_classes - 1}"
            )

    def __len__(self) -> int:
        """The number of batches per epoch."""
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def _counter(self, epoch: int, batch: int, use: int) -> np.random.Philox:
        return np.random.Philox(key=np.array([self.seed, epoch], np.uint64), counter=np.array([0, 0, batch, use], np.uint64))

    def order(self, epoch: int) -> np.ndarray:
        """The indices of the images in the order of an epoch, (n,) int64."""
        if not self.shuffle:
            return np.arange(len(self.images))
        order = np.argsort(self._counter(epoch, 0, ORDER).random_raw(len(self.images)), kind="stable")
        return np.repeat(order, self.repeats)[: len(order)]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (images, targets) of each batch, beginning with batch `start`.

        Images are (B, C, H, W) float32, normalised, on the device; targets are NumPy arrays (B,) int64, or with mixup or CutMix
        (B, num_classes) float32 whose rows sum to 1. The arrays are new for each batch.
        """
        order = self.order(epoch)
        for batch in range(start, len(self)):
            yield self._batch(epoch, batch, order[batch * self.batch_size : (batch + 1) * self.batch_size])

    def _batch(self, epoch: int, batch: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.Generator(self._counter(epoch, batch, BATCH))
        count, (_, H, W, C) = len(index), self.images.shape
        drawn = draw(random, self.policy, count, (H, W), C)
        mixing = draw_mixing(random, count, (H, W), self.mixup, self.cutmix)
        if self._device_images is None:
            self._device_images = to_device(self.images, self.device)
        inputs = [index, mixing.partner, drawn.matrices, drawn.colours, mixing.lam, mixing.boxes, drawn.holes, self.mean, self.std]
        images = empty((count, C, H, W), np.float32, self.device)
        arrays = [images, self._device_images, *(to_device(np.ascontiguousarray(a), self.device) for a in inputs)]
        OPS["augment"].run("forward", arrays, arrays[1:], ())
        labels = self.labels[index]  # (B,)
        if not (self.mixup or self.cutmix):
            return images, labels
        targets = np.zeros((count, self.num_classes), np.float32)
        rows = np.arange(count)
        targets[rows, labels] = mixing.share
        targets[rows, labels[mixing.partner]] += 1 - mixing.share  # each row occurs once, so += on an index is safe
        return images, targets
