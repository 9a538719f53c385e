"""Muon, with AdamW for what is no matrix between hidden layers; `kernels/muon.py` and `kernels/orthogonalise.py` contain the formulas."""

from __future__ import annotations

from math import prod, sqrt
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..errors import UserError, nearest
from ..kernels.begin_update import MOMENTUM
from ..kernels.core import arrays
from ..nn.module import Module, Parameter
from .adamw import AdamW
from .flat import Chosen, FlatParameters
from .optimizer import check_between, register, run_op

RATIOS = {  # the learning rate of a matrix (rows, columns), in units of lr
    "original": lambda rows, columns: sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
}


class Batch(NamedTuple):
    """All matrices of one shape: where they lie in the flat buffer, and of each, (matrices,) on the device, the start there, int64, and the
    scale of its learning rate, float64."""

    rows: int
    columns: int
    place: slice
    starts: Any
    scales: Any


def hidden(model: Module, trainable: list[Parameter]) -> list[Parameter]:
    """The matrices between hidden layers, by shape."""
    matrices = model.hidden_matrices()
    return sorted((p for p in trainable if id(p) in matrices), key=lambda p: matrices[id(p)][1:])


@register("muon")
class Muon(AdamW):
    """Orthogonalised momentum (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") in PyTorch's form for the
    matrices between hidden layers (`Module.hidden_matrices`), and AdamW for all other parameters, with the same lr and weight_decay.

    Where a parameter stacks the matrices of q, k and v, each is orthogonalised alone, as Jordan et al. recommend.

    adjust_lr_fn: "match_rms_adamw" gives the updates of every matrix the root mean square 0.2, about that of AdamW's (2502.16982,
        equation 4), so that one learning rate suits all parameters; with "original", Muon's is usually some ten times AdamW's.
    ns_steps: the number of Newton-Schulz iterations. betas, eps: those of AdamW.
    Raises UserError for values out of range.
    """

    first: ClassVar[Chosen] = staticmethod(hidden)

    def __init__(
        self,
        flat: FlatParameters,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        clip_norm: float | None = None,
        ema: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str = "match_rms_adamw",
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(flat, lr, weight_decay, clip_norm, ema, betas, eps)
        check_between(0, 1, momentum=momentum)
        if adjust_lr_fn not in RATIOS:
            raise UserError(f"unknown adjust_lr_fn {adjust_lr_fn!r}{nearest(adjust_lr_fn, RATIOS)}: choose {', '.join(RATIOS)}")
        if not isinstance(ns_steps, int) or not 1 <= ns_steps < 100:
            raise UserError(f"ns_steps must be a whole number of 1 ... 99, got {ns_steps}")
        self.scalars.set(MOMENTUM, momentum)
        self.nesterov, self.ratio, self.ns_steps = nesterov, RATIOS[adjust_lr_fn], ns_steps
        self.batches = self._batches()

    def _batches(self) -> list[Batch]:
        """The matrices of the flat buffer, by shape."""
        found: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for key, (parts, rows, columns) in self.flat.model.hidden_matrices().items():
            if key in self.flat.starts:
                start, scale = self.flat.starts[key], self.flat.scales[key]
                found.setdefault((rows, columns), []).extend((start + i * rows * columns, scale) for i in range(parts))
        return [self._batch(shape, *map(np.array, zip(*matrices))) for shape, matrices in found.items()]

    def _batch(self, shape: tuple[int, int], starts: np.ndarray, scales: np.ndarray) -> Batch:
        place, device = slice(int(starts.min()), int(starts.max()) + prod(shape)), self.flat.device
        return Batch(*shape, place, arrays.array_on(device, starts.astype(np.int64) - place.start), arrays.array_on(device, scales))

    def _update(self) -> None:
        for batch in self.batches:
            self._update_matrices(batch)
        super()._update()

    def _update_matrices(self, batch: Batch) -> None:
        flat, scalars, rows, columns, starts = self.flat, self.scalars.array, batch.rows, batch.columns, batch.starts
        p, g, m, average = (None if a is None else a[batch.place] for a in (flat.data, flat.gradient, self.m, self.average))
        u, o = (arrays.empty((len(starts), rows, columns), flat.products, flat.device) for _ in range(2))
        run_op("muon_momentum", (m, u), (g, m, starts, self._squares, scalars), rows, columns, self.nesterov)
        run_op("orthogonalise", (o,), (u,), self.ns_steps)
        run_op("muon", (p, average), (p, o, average, starts, batch.scales, scalars), self.ratio(rows, columns))
