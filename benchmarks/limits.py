"""What this machine can do at most: float32 products, and memory traffic."""
from __future__ import annotations

from time import sleep

import numpy as np

from minivit.kernels.cpu import kernel, threads
from minivit.kernels.device import empty
from minivit.kernels.gemm import gemm
from minivit.kernels.op import launch
from minivit.plan import Plan

from .measure import LIMIT_SECONDS, PRODUCT, TINY_PRODUCT, product_rate, repeat

STREAM, TINY_STREAM = 128 << 20, 64 << 10               # bytes of each of the three arrays that are streamed
SETTLE = 0.3                                            # seconds after which OpenBLAS's threads have stopped spinning


def product_rates(tiny: bool = False) -> dict[str, float]:
    """Floating-point operations a second of a large float32 product, by who computes it."""
    size = TINY_PRODUCT if tiny else PRODUCT
    a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    c = empty((size, size), np.float32)

    def ours() -> np.ndarray:
        gemm(c, a, b)
        return c

    rates = {"minivit": product_rate(Plan(ours).replay, size, tiny), "NumPy": product_rate(lambda: np.matmul(a, b, out=c), size, tiny)}
    sleep(SETTLE)
    return rates


@kernel
def _triad(band, bands, a, b, c, factor):
    for i in range(len(a) * band // bands, len(a) * (band + 1) // bands):
        a[i] = b[i] + a.dtype.type(factor) * c[i]


def memory_rate(tiny: bool = False) -> float:
    """Bytes a second that a = b + factor·c reads and writes, of arrays that fit no cache: the best of several runs."""
    number = (TINY_STREAM if tiny else STREAM) // 4
    a, b, c = (empty((number,), np.float32) for _ in range(3))
    b[:], c[:] = 1, 2

    def triad() -> np.ndarray:
        launch(_triad, threads(), a, b, c, 0.5)
        return a

    return 3 * a.nbytes / min(repeat(Plan(triad).replay, 0 if tiny else LIMIT_SECONDS))
