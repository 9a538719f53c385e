"""Connections of clients that are slow, broken, or too many, on top of uvicorn's HTTP/1.1."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from time import monotonic
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

GRACE = 0.25  # seconds after a signal to end in which what clients have sent is still read
LINGER = 1.0  # seconds for a client that is refused to read why
BUSY = b"too many clients are connected\n"
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: text/plain\r\n"
    b"Content-Length: " + str(len(BUSY)).encode() + b"\r\n\r\n" + BUSY
)


class Connection(H11Protocol):
    """One connection. most: of them at once; others are answered 503, or closed where even those are too many."""

    def __init__(self, *arguments: Any, most: int, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.most, self.refused, self.ending = most, False, False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self.refused = True
            if len(self.connections) > 2 * self.most:
                transport.abort()
            else:
                transport.write(REFUSAL)
                self.loop.call_later(LINGER, transport.close)

    def data_received(self, data: bytes) -> None:
        if not self.refused:
            super().data_received(data)
            self._announce_end()

    def shutdown(self) -> None:
        """End after what is being answered, or after a request that is on its way."""
        self.ending = True
        if self.refused:
            self.transport.close()
        self._announce_end()
        self.loop.call_later(GRACE, self._end)

    def _announce_end(self) -> None:
        """Let the answer say that it is the last one of this connection."""
        if self.ending and self.cycle is not None and self.cycle.keep_alive:
            self.cycle.keep_alive = False
            self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]

    def _end(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()


async def abort_stuck(connections: Set[Any], timeout: float) -> None:
    """Abort connections whose client takes longer than `timeout` seconds to send the head of a request, or to read an answer.

    uvicorn itself waits for both without end. The application has `timeout` to read and answer, and as much again to send.
    """
    seen: dict[Any, tuple[Any, bool, float]] = {}  # for each, its request, whether that is answered, and since when
    while True:
        await asyncio.sleep(min(1.0, timeout / 4))
        now, before, seen = monotonic(), seen, {}
        for connection in list(connections):
            request = connection.cycle
            answered = request is not None and request.response_complete
            since = before.get(connection, (None, False, now))
            same = since[0] is request and since[1] == answered
            seen[connection] = since if same else (request, answered, now)
            waits_for_client = request is None or answered
            if now - seen[connection][2] > (timeout if waits_for_client else 2 * timeout + 1):
                connection.transport.abort()
