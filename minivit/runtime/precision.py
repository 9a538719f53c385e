"""The precisions of training and inference, and the choice of the fastest on this machine.

float32    everything in float32
bf16x3     float32 in memory; each product as the sum of three products of bfloat16 halves, with a relative error of about 1e-5
bfloat16   activations and their gradients in bfloat16; products of bfloat16 accumulated in float32; weights, their gradients, statistics,
           softmax, the head and the loss in float32
float64    everything in float64, for checking
int8       for predictions alone: products with weights in 8 bits (`kernels/cpu/int8.py`), but that of the head; all else in float32
auto       the fastest of the others that trains as well as float32
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..errors import UserError, nearest
from ..kernels.core.dtypes import BFLOAT16
from ..kernels.cpu.gemm import products_in
from ..kernels.cpu.tiles import supported

PRECISIONS = ("float32", "bf16x3", "bfloat16", "float64")  # of training
OF_PREDICTIONS = (*PRECISIONS, "int8")
CPU_ONLY = ("bf16x3", "int8")


@dataclass(frozen=True)
class Precision:
    """name: one of OF_PREDICTIONS. parameters: the dtype of weights. activations: the dtype of everything computed from images."""

    name: str
    parameters: np.dtype
    activations: np.dtype

    @contextmanager
    def products(self) -> Iterator[None]:
        """Matrix products inside (in this thread) use this precision."""
        with products_in(self.name if self.name in ("bf16x3", "int8") else "float32"):
            yield


def precision_for(name: str, model: np.dtype, device: str = "cpu", known: Sequence[str] = PRECISIONS) -> Precision:
    """The precision of this name ("auto": the fastest) for a model of this dtype. A float64 model always computes in float64.

    known: OF_PREDICTIONS for predictions. Raises UserError for an unknown name, or one that the device does not support.
    """
    if device == "cuda" and name in CPU_ONLY:
        raise UserError(f"precision={name!r} is for the CPU: choose float32 or bfloat16 on a GPU")
    if name not in (*known, "auto"):
        raise UserError(f"precision={name!r} is not available{nearest(name, known)}: choose auto, {', '.join(known)}")
    name = "float64" if model == np.float64 else fastest(device)[0] if name == "auto" else name
    if name == "float64":
        return Precision(name, np.dtype(np.float64), np.dtype(np.float64))
    return Precision(name, np.dtype(np.float32), BFLOAT16 if name == "bfloat16" else np.dtype(np.float32))


def fastest(device: str = "cpu") -> tuple[str, str]:
    """(the precision that "auto" selects on this CPU, or on a GPU; the reason)."""
    if device == "cuda":
        return "bfloat16", "the GPU has tensor cores for bfloat16"
    instructions = supported()
    if instructions["amx"]:
        return "bfloat16", "the CPU has AMX, which multiplies bfloat16 some fifteen times as fast as float32"
    if instructions["avx512bf16"]:
        return "bfloat16", "the CPU has AVX512-BF16, which multiplies bfloat16 twice as fast as float32"
    return "float32", "the CPU has no instructions for bfloat16"
