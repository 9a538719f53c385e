"""What a server counts, in the text form of Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Requests by path and status, their seconds, the sizes of batches, images by exit, and the length of the queue.

    queue: returns the number of images that wait or are computed.
    """

    def __init__(self, queue: Callable[[], int]) -> None:
        self._registry = every = CollectorRegistry()
        ProcessCollector(registry=every)
        self._requests = Counter(
            "minivit_requests", "Requests by path and status; 499: the client left", ["path", "status"], registry=every
        )
        self._seconds = Histogram("minivit_request_seconds", "Seconds until the answer", ["path"], buckets=SECONDS, registry=every)
        self._batches = Histogram("minivit_batch_images", "Images that were computed at once", buckets=IMAGES, registry=every)
        self._images = Counter("minivit_images", "Images that were labelled, by exit", ["exit"], registry=every)
        Gauge("minivit_queue_images", "Images that wait or are computed", registry=every).set_function(queue)

    def batch(self, exits: list[int]) -> None:
        """Count a batch. exits: of each of its images, from 1."""
        self._batches.observe(len(exits))
        for exit in exits:
            self._images.labels(exit).inc()

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self._registry)

    def counting(self, app: Any, paths: set[str]) -> Any:
        """The ASGI application `app`, whose requests are counted; paths: those that are told apart."""

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            status, start = 499, perf_counter()

            async def noting(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, noting)
            finally:
                path = scope["path"] if scope["path"] in paths else "other"
                self._requests.labels(path, status).inc()
                self._seconds.labels(path).observe(perf_counter() - start)

        return counted
