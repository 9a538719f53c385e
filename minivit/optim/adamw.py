"""AdamW; `kernels/adamw.py` contains the formulas."""

from __future__ import annotations

from math import inf

from ..errors import UserError
from ..kernels.begin_update import BETA1, BETA2, EPS
from .flat import FlatParameters
from .optimizer import Optimizer, check_between, register, zeros_like


@register("adamw")
class AdamW(Optimizer):
    """Adam with decoupled weight decay (1711.05101), in PyTorch's form. Raises UserError for values out of range."""

    buffers = ("m", "v")

    def __init__(
        self,
        flat: FlatParameters,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        clip_norm: float | None = None,
        ema: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(flat, lr, weight_decay, clip_norm, ema)
        check_between(0, 1, **{"betas[0]": betas[0], "betas[1]": betas[1]})
        if not 0 < eps < inf:
            raise UserError(f"eps must be above 0 and finite, got {eps}")
        for index, value in zip((BETA1, BETA2, EPS), (*betas, eps)):
            self.scalars.set(index, value)
        self.m = zeros_like(flat.data)
        self.v = zeros_like(flat.data[self._segments_start :])  # of the segments alone

    @property
    def _segments_start(self) -> int:
        """Where the first segment begins in the flat buffers."""
        return self.flat.segments[0].start if self.flat.segments else len(self.flat.data)

    def _update(self) -> None:
        for segment in self.flat.segments:
            start, _, stop, _ = segment
            before = self._segments_start
            self._run_op("adamw", segment, (self.m[start:stop], self.v[start - before : stop - before]))
