"""Per-thread modes of ops: whether they are recorded on the tape, and whether they run at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from .kernels.core.op import Op

_state = threading.local()


def is_grad_enabled() -> bool:
    """Whether ops are currently recorded on the tape."""
    return getattr(_state, "grad_enabled", True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Context manager or decorator: ops inside it (in this thread) are not recorded on the tape."""
    previous = is_grad_enabled()
    _state.grad_enabled = False
    try:
        yield
    finally:
        _state.grad_enabled = previous


class Tracer(Protocol):
    """Receives the reports of `trace`.

    whole: whether models compute all of their last block, as papers count it, or only what their head reads.
    """

    whole: bool

    def op(self, op: Op, inputs: Sequence[Any], outputs: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
        """Called for each op instead of running it, with its arrays, or None for absent ones; those of `outputs` are empty."""

    def enter(self, module: Any) -> None:
        """Called at the start of a Module's `forward`: the reports up to the matching `leave` belong to it."""

    def leave(self) -> None:
        """Called at the end of a Module's `forward`."""


def current_tracer() -> Tracer | None:
    """The tracer that this thread reports to instead of running ops, or None."""
    return getattr(_state, "tracer", None)


@contextmanager
def trace(tracer: Tracer) -> Iterator[None]:
    """Ops inside (in this thread) do not run: they are reported to `tracer` and return empty arrays of the right shape and dtype."""
    previous = current_tracer()
    _state.tracer = tracer
    try:
        with no_grad():
            yield
    finally:
        _state.tracer = previous
