"""What becomes of ops that are called, a thread at a time: whether they are put on the tape, and whether they run at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from .kernels.core.op import Op

_state = threading.local()


def is_grad_enabled() -> bool:
    """Whether ops run now are put on the tape."""
    return getattr(_state, "grad_enabled", True)


@contextmanager
def no_grad() -> Iterator[None]:
    """Ops run inside (in this thread) are not put on the tape. Works as a decorator too."""
    before = is_grad_enabled()
    _state.grad_enabled = False
    try:
        yield
    finally:
        _state.grad_enabled = before


class Tracer(Protocol):
    """What `trace` reports to."""

    def op(self, op: Op, shapes: list[tuple[int, ...] | None], constants: Mapping[str, Any]) -> None:
        """An op would have run on inputs of these shapes."""

    def enter(self, module: Any) -> None:
        """What is reported from here to the matching `leave` belongs to this Module's `forward`."""

    def leave(self) -> None: ...


def current_tracer() -> Tracer | None:
    """What this thread reports to instead of running ops, if anything."""
    return getattr(_state, "tracer", None)


@contextmanager
def trace(tracer: Tracer) -> Iterator[None]:
    """Ops called inside (in this thread) do not run: they are reported, and give results of the right shape and dtype without values."""
    before = current_tracer()
    _state.tracer = tracer
    try:
        with no_grad():
            yield
    finally:
        _state.tracer = before
