"""The server: listen, answer, and end in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any

import uvicorn

from ..errors import UserError, reason
from ..inference.classifier import Classifier
from ..interrupts import SAME
from .app import Service
from .connections import Connection, abort_stuck
from .options import ServeOptions

SIGNALS = (signal.SIGINT, signal.SIGTERM)
BACKLOG = 1024  # connections that wait to be accepted


def run(classifier: Classifier, options: ServeOptions, ready: Callable[[str], None]) -> None:
    """Answer until a signal. ready: is told the address as soon as requests are answered. Raises UserError."""
    with listening(options) as listener:  # first, since it fails soon
        service = Service(classifier, options)
        service.batcher.warm_up()
        server = _Server(_config(service, options), options.timeout)
        with server.ending_in_order():
            ready(address(listener))
            asyncio.run(server.serve([listener]))


def _config(service: Service, options: ServeOptions) -> uvicorn.Config:
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it tells of each invalid form, which are the clients' mistakes
    return uvicorn.Config(
        service.app(),
        http=partial(Connection, most=options.max_connections),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=options.timeout / 2,  # type: ignore[arg-type]
        timeout_graceful_shutdown=int(3 * options.timeout) + 5,  # longer than anything that was accepted
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, timeout: float) -> None:
        super().__init__(config)
        self.should_exit = False
        self._timeout, self._ended = timeout, 0.0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        watch = asyncio.create_task(abort_stuck(self.server_state.connections, self._timeout))
        try:
            await super().serve(sockets)
        finally:
            watch.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again at the end, so that no status 0 is left."""
        yield

    @contextmanager
    def ending_in_order(self) -> Iterator[None]:
        """Inside, the first signal ends the server when all is answered; a second one does what it would do outside."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(number: int, frame: Any) -> None:
            if not self.should_exit:
                self.should_exit, self._ended = True, monotonic()
            elif monotonic() - self._ended > SAME:
                restore()
                signal.raise_signal(number)

        before = {number: signal.signal(number, end) for number in SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        try:
            yield
        finally:
            restore()


@contextmanager
def listening(options: ServeOptions) -> Iterator[socket.socket]:
    """A socket that listens where the options say. Raises UserError."""
    try:
        family, _, _, _, place = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(place[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {options.host} port {options.port}: {reason(error)}; choose another --host or --port") from error
    with listener:
        yield listener


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
