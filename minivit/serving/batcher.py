"""`Batcher`: decodes the images of concurrent requests in some threads, and computes them together in another."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Any, BinaryIO

import numpy as np

from ..data.decode import read_image
from ..inference.classifier import Classifier
from ..kernels.cpu.run import threads, threads_set
from .answers import Answer, answers, fitting, has_attention, plan_sizes
from .options import ServeOptions

LONGEST_RETRY = 60  # seconds
RECENT = 0.1  # the weight of the newest batch in the mean seconds of an image


class Overloaded(Exception):
    """The queue is full. seconds: after which it may be empty."""

    def __init__(self, seconds: int) -> None:
        super().__init__("the queue is full")
        self.seconds = seconds


@dataclass
class Upload:
    """An image file that a client sent; reading it gives its bytes."""

    name: str
    file: BinaryIO

    def read(self) -> bytes:
        return self.file.read()


@dataclass(eq=False)
class _Request:
    budget: float | None
    attention: bool
    wanted: bool = True  # until it is answered, has failed, or its client has left


@dataclass(eq=False)
class _Image:
    request: _Request
    pixels: np.ndarray  # (H, W, C) uint8
    answer: asyncio.Future[Answer]


class Batcher:
    """Answers images in batches. It belongs to the event loop in which `running` is entered.

    An image counts as queued from its admission until nothing works on it any more, also where its request has ended before: so the
    memory that images take is bounded by `max_queue`. on_batch: is told the exits of the images of each batch, from 1.
    """

    def __init__(self, classifier: Classifier, options: ServeOptions, on_batch: Callable[[list[int]], None] = lambda exits: None) -> None:
        self.classifier, self.options, self.on_batch = classifier, options, on_batch
        self.queued = 0  # images
        self._decoding = 0  # of them
        self.threads = threads()
        self.sizes = plan_sizes(classifier, options.batch_size)
        self._decoded: deque[_Image] = deque()
        self._seconds = 0.0  # of an image, the mean of recent ones
        self._arrival = asyncio.Event()
        self._decoders = ThreadPoolExecutor(self.threads, "decode")
        self._computer = ThreadPoolExecutor(1, "compute")

    def warm_up(self) -> None:
        """Compile what is missing and record the plans, so that no request waits for it."""
        C, H, W = self.classifier.config.image_shape
        blank, attention = np.zeros((1, H, W, C), np.uint8), [has_attention(self.classifier)]
        for size in self.sizes:
            self._computer.submit(self._answers, blank, self.options.budget, attention, size).result()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, batches are computed."""
        self._task = asyncio.get_running_loop().create_task(self._compute_batches())
        try:
            yield
        finally:
            self._task.cancel()
            for pool in (self._decoders, self._computer):
                pool.shutdown(wait=False, cancel_futures=True)

    @property
    def works(self) -> bool:
        """Whether it computes what comes."""
        return not self._task.done()

    def check_room(self, images: int) -> None:
        """Raises Overloaded if so many images more are too many."""
        if self.queued + images > self.options.max_queue:
            raise Overloaded(min(LONGEST_RETRY, max(1, ceil(self.queued * self._seconds))))

    async def answer(self, uploads: Sequence[Upload], budget: float | None, attention: bool) -> list[Answer]:
        """The answers to the images of one request.

        Raises Overloaded, and UserError for an image that cannot be read. It can be cancelled; what is being computed then is dropped.
        """
        self.check_room(len(uploads))
        request = _Request(budget, attention)
        self.queued += len(uploads)
        self._decoding += len(uploads)
        tasks = [asyncio.create_task(self._answer_one(request, upload)) for upload in uploads]
        try:
            await asyncio.wait(tasks)  # which leaves them running where it is cancelled: a thread cannot be stopped
        finally:
            request.wanted = False
        found = [task.result() for task in tasks]
        for failure in found:  # the others are unwanted because of it
            if isinstance(failure, Exception) and not isinstance(failure, _Unwanted):
                raise failure
        return [answer for answer in found if isinstance(answer, dict)]

    async def _answer_one(self, request: _Request, upload: Upload) -> Answer | Exception:
        """The answer, or why there is none."""
        loop = asyncio.get_running_loop()
        try:
            try:
                pixels = await loop.run_in_executor(self._decoders, self._decode, request, upload)
            finally:
                self._decoding -= 1
                self._arrival.set()
            image = _Image(request, pixels, loop.create_future())
            self._decoded.append(image)
            return await image.answer
        except Exception as error:
            request.wanted = False
            return error
        finally:
            self.queued -= 1

    def _decode(self, request: _Request, upload: Upload) -> np.ndarray:
        if not request.wanted:
            raise _Unwanted
        return read_image(upload, **self.classifier.preprocessing.shape, max_pixels=self.options.max_pixels)

    async def _compute_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_images()
            batch, size = self._next_batch()
            if not batch:
                continue
            pixels, attention = np.stack([image.pixels for image in batch]), [image.request.attention for image in batch]
            start = perf_counter()
            try:
                found = await loop.run_in_executor(self._computer, self._answers, pixels, batch[0].request.budget, attention, size)
            except Exception as error:
                for image in batch:
                    image.answer.set_exception(error)
                continue
            self._seconds += RECENT * ((perf_counter() - start) / len(batch) - self._seconds)
            self.on_batch([answer.get("exit", 1) for answer in found])
            for image, answer in zip(batch, found):
                image.answer.set_result(answer)

    async def _wait_for_images(self) -> None:
        """Until one is decoded, and then no longer than `max_wait` for others that are being decoded."""
        while not self._decoded:
            self._arrival.clear()
            await self._arrival.wait()
        end = perf_counter() + self.options.max_wait / 1000
        while self._decoding and len(self._decoded) < self.sizes[-1] and (left := end - perf_counter()) > 0:
            self._arrival.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrival.wait(), left)

    def _next_batch(self) -> tuple[list[_Image], int]:
        """The oldest images of one budget, as many as fit a plan, and the size of this plan."""
        waiting = [image for image in self._decoded if image.request.wanted]
        for image in self._decoded:
            if not image.request.wanted:
                image.answer.set_exception(_Unwanted())
        same = [image for image in waiting if image.request.budget == waiting[0].request.budget]
        number, size = fitting(len(same), self.sizes) if same else (0, 0)
        batch = same[:number]
        taken = set(map(id, batch))
        self._decoded = deque(image for image in waiting if id(image) not in taken)
        return batch, size

    def _answers(self, *arguments: Any) -> list[Answer]:
        with threads_set(self.threads):  # a setting of each thread
            return answers(self.classifier, *arguments)


class _Unwanted(Exception):
    """Nobody waits for the answer any more."""
