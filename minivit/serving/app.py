"""The ASGI application: paths, requests and answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..data.image_file import Unreadable
from ..errors import UserError, nearest, printable, shown
from ..inference.classifier import Classifier
from .answers import has_attention
from .batcher import Batcher, Overloaded, Upload
from .metrics import CONTENT_TYPE, Metrics
from .openapi import describe
from .options import ServeOptions

PAGE = Path(__file__).with_name("page.html")
HEADERS = {  # of the page: it loads nothing from elsewhere, and is shown in no other page
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
UPLOADS = 16  # bodies of the largest size, of which the bodies of all requests together may have the bytes
FLAGS = {"": True, "1": True, "true": True, "0": False, "false": False}


class Service:
    """The handlers of all paths. Raises UserError for a budget that the model has not."""

    def __init__(self, classifier: Classifier, options: ServeOptions) -> None:
        self.classifier, self.options = classifier, options
        self.metrics = Metrics(lambda: self.batcher.queued)
        self.batcher = Batcher(classifier, options, self.metrics.batch)
        self._check_budget(options.budget)
        self._bytes = 0  # of the bodies of all requests

    def app(self) -> Any:
        """The ASGI application."""
        handlers = {
            "/": self.page,
            "/predict": self.predict,
            "/model": self.model,
            "/healthz": self.health,
            "/metrics": self.told_metrics,
            "/openapi.json": self.openapi,
        }
        routes = [Route(path, handler, methods=["POST" if path == "/predict" else "GET"]) for path, handler in handlers.items()]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _error, Exception: _error}, lifespan=self._lifespan)
        return self.metrics.counting(app, set(handlers))

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        with self.batcher.running():
            yield

    # ---------------------------------------------------------------------------------------------------------------- predictions
    async def predict(self, request: Request) -> Response:
        """Label the images in the body."""
        start = perf_counter()
        try:
            budget, attention = self._parameters(request)
            self.batcher.check_room(1)
            async with self._counted(request) as counted:
                uploads = await self._uploads(counted)
                left = self.options.timeout - (perf_counter() - start)
                answers = await asyncio.wait_for(self.batcher.answer(uploads, budget, attention), left)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Overloaded as overload:
            raise HTTPException(
                503, "too many images wait: try again later, or serve with a larger --max-queue", {"Retry-After": str(overload.seconds)}
            ) from overload
        except asyncio.TimeoutError:
            raise HTTPException(503, f"no answer within {self.options.timeout:g} seconds: try again later", {"Retry-After": "1"}) from None
        except Unreadable as error:
            raise HTTPException(422, str(error)) from error
        except UserError as error:  # the model's, as weights that are not finite
            raise HTTPException(500, str(error)) from error
        predictions = [{"name": upload.name, **answer} for upload, answer in zip(uploads, answers)]
        return JSONResponse({"predictions": predictions, "milliseconds": round(1000 * (perf_counter() - start), 3)})

    def _parameters(self, request: Request) -> tuple[float | None, bool]:
        """(budget, whether attention is asked for) of the query. Raises HTTPException."""
        query = request.query_params
        for name in query:
            if name not in ("budget", "attention"):
                raise HTTPException(400, f"unknown parameter {shown(name)}{nearest(name, ['budget', 'attention'])}")
        try:
            budget = float(query["budget"]) if "budget" in query else self.options.budget
            self._check_budget(budget)
        except ValueError as error:
            message = str(error) if isinstance(error, UserError) else f"budget must be a number, not {shown(query['budget'])}"
            raise HTTPException(400, message) from error
        flag = query.get("attention", "false")
        if flag not in FLAGS:
            raise HTTPException(400, f"attention must be true or false, not {shown(flag)}")
        if FLAGS[flag] and not has_attention(self.classifier):
            raise HTTPException(400, f"{self.classifier.model.name} has no attention to tell of: leave attention out")
        return budget, FLAGS[flag]

    def _check_budget(self, budget: float | None) -> None:
        if budget is not None:
            self.classifier.predictor.check_budget(budget)

    @asynccontextmanager
    async def _counted(self, request: Request) -> AsyncIterator[Request]:
        """The request, whose body ends with HTTPException where it is too long, or where those of all requests together are.

        Inside, its bytes count as in memory. What comes of a body after the answer is dropped by uvicorn as it comes.
        """
        most, own, end = self.options.upload_bytes, 0, b""
        if int(request.headers.get("content-length", 0)) > most:
            raise self._too_long()

        async def receive() -> Any:
            nonlocal own, end
            message = await request.receive()
            part = message.get("body", b"")
            own += len(part)
            self._bytes += len(part)
            end = (end + part[-4:])[-4:]
            request.state.end = end
            if own > most:
                raise self._too_long()
            if self._bytes > UPLOADS * most:
                self._bytes, own = self._bytes - own, 0  # now, so that no others are refused for these bytes
                raise Overloaded(1)
            return message

        try:
            yield Request(request.scope, receive)
        finally:
            self._bytes -= own

    def _too_long(self) -> HTTPException:
        return HTTPException(413, f"the body may have at most {self.options.max_upload:g} MiB: send fewer or smaller images")

    async def _uploads(self, request: Request) -> list[Upload]:
        """The image files in the body. Raises HTTPException."""
        try:
            found = await asyncio.wait_for(self._read(request), self.options.timeout)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the body did not come within {self.options.timeout:g} seconds") from None
        if not found:
            raise HTTPException(400, "no image was sent: send a file as the body, or files as parts of multipart/form-data")
        return found

    async def _read(self, request: Request) -> list[Upload]:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            body = await request.body()
            return [Upload("", BytesIO(body))] if body else []
        most = self.options.max_queue
        try:
            form = await request.form(max_files=most, max_fields=most)
        except FormParserError as error:  # from earlier versions of Starlette
            raise HTTPException(400, "the body is no valid form of multipart/form-data") from error
        if not request.state.end.rstrip().endswith(b"--"):  # the parser drops a part that is cut off
            raise HTTPException(400, "the form does not end with its boundary: a part of it is missing")
        files = [each for _, each in form.multi_items() if not isinstance(each, str)]
        return [Upload(printable(file.filename or "")[:200], file.file) for file in files]

    # --------------------------------------------------------------------------------------------------------------- other paths
    async def page(self, request: Request) -> Response:
        """The page for browsers."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=HEADERS)

    async def model(self, request: Request) -> Response:
        """What is served."""
        model, shape = self.classifier.model, self.classifier.config.image_shape
        calibration = model.calibration if model.num_exits > 1 else None
        return JSONResponse(
            {
                "model": model.name,
                "classes": self.classifier.class_names,
                "input": shape,
                "exits": model.num_exits,
                "budgets": list(calibration.budgets) if calibration else [],
                "attention": has_attention(self.classifier),
            }
        )

    async def health(self, request: Request) -> Response:
        """200 while images are answered."""
        works = self.batcher.works
        return JSONResponse({"status": "ok" if works else "failed"}, 200 if works else 503)

    async def told_metrics(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        """The description of this interface."""
        return JSONResponse(describe(self.classifier, self.options))


async def _error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": "the server failed; its standard error tells more"}, 500)
