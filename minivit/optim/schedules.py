"""Learning-rate schedules: functions of the step, by name in SCHEDULES."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi


def cosine(step: int, steps: int, lr: float, warmup: int, min_lr: float) -> float:
    """The learning rate of step 0 ... steps - 1: a linear warmup that reaches `lr` at step warmup - 1, then half a cosine down to `min_lr`
    (SGDR, 1608.03983, without restarts)."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return min_lr + (lr - min_lr) / 2 * (1 + cos(pi * (step - warmup) / (steps - warmup)))


def linear(step: int, steps: int, lr: float, warmup: int, min_lr: float) -> float:
    """The same linear warmup, then a straight line down to `min_lr`, which a step after the last would have."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return min_lr + (lr - min_lr) * (steps - step) / (steps - warmup)


def wsd(step: int, steps: int, lr: float, warmup: int, min_lr: float) -> float:
    """Warmup, stable, decay: the same linear warmup, `lr` until 60 % of the steps, then a straight line (2404.06395, section 4)."""
    stable = max(warmup, round(0.6 * steps))
    return constant(step, steps, lr, warmup, min_lr) if step < stable else linear(step, steps, lr, stable, min_lr)


def constant(step: int, steps: int, lr: float, warmup: int, min_lr: float) -> float:
    """The same linear warmup, then constant `lr`."""
    return lr * (step + 1) / warmup if step < warmup else lr


SCHEDULES: dict[str, Callable[[int, int, float, int, float], float]] = {each.__name__: each for each in (cosine, linear, wsd, constant)}
