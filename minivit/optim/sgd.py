"""Stochastic gradient descent with momentum; `kernels/sgd.py` contains the formulas."""

from __future__ import annotations

from ..kernels.begin_update import MOMENTUM
from .flat import FlatParameters
from .optimizer import Optimizer, check_between, register, zeros_like


@register("sgd")
class SGD(Optimizer):
    """Stochastic gradient descent with momentum, in PyTorch's form: weight decay is added to the gradient. Raises UserError."""

    buffers = ("velocity",)

    def __init__(
        self,
        flat: FlatParameters,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        ema: float | None = None,
        momentum: float = 0.9,
        nesterov: bool = False,
    ) -> None:
        super().__init__(flat, lr, weight_decay, clip_norm, ema)
        check_between(0, 1, momentum=momentum)
        self.scalars.set(MOMENTUM, momentum)
        self.nesterov, self.velocity = nesterov, zeros_like(flat.data)

    def _update(self) -> None:
        for segment in self.flat.segments:
            self._run_op("sgd", segment, (self.velocity[segment.start : segment.stop],), self.nesterov)
