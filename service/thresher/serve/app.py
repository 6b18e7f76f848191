"""The server's addresses: the Open Inference Protocol, metrics, and a page for people."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from thresher.serve import page
from thresher.serve.body import read_body
from thresher.serve.limits import Limits, RefusedError
from thresher.serve.metrics import Metrics
from thresher.serve.model import Model, Version
from thresher.serve.protocol import EMBEDDING, HEAD_LENGTH, SCORE, read_request, write_response

logger = logging.getLogger("thresher.serve")

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_FILES = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class App:
    """Handlers over a model.

    Args:
        model: that is served.
        limits: of requests.
        poll_seconds: between two looks for a newer version.
    """

    def __init__(self, model: Model, limits: Limits, poll_seconds: float) -> None:
        self.model = model
        self.limits = limits
        self.metrics = Metrics(model)
        self._poll_seconds = poll_seconds
        self._at_work = 0

    def starlette(self) -> Starlette:
        """The ASGI application."""
        post = ["POST"]
        model = "/v2/models/{model}"
        routes = [
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/metrics", self.prometheus),
            Route("/page/model", self.describe),
            Route("/page/score", self._counted(self.example), methods=post),
        ]
        for path in (model, model + "/versions/{version}"):
            routes += [
                Route(path, self.metadata),
                Route(f"{path}/ready", self.model_ready),
                Route(f"{path}/infer", self._counted(self.infer), methods=post),
            ]
        routes += [Route(path, functools.partial(_file, name)) for path, name in _FILES.items()]
        return Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={RefusedError: _refused, HTTPException: _not_there, Exception: _failed},
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        watch = asyncio.create_task(self.model.watch(self._poll_seconds))
        try:
            yield
        finally:
            watch.cancel()

    async def server(self, _: Request) -> Response:
        """What this is."""
        return _json(
            {
                "name": "thresher",
                "version": importlib.metadata.version("thresher"),
                "extensions": ["binary_tensor_data"],
            }
        )

    async def live(self, _: Request) -> Response:
        """The process answers."""
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        """A version has passed its golden requests."""
        ready = self.model.version is not None
        return _json({"ready": ready, "problem": self.model.problem}, 200 if ready else 503)

    async def model_ready(self, request: Request) -> Response:
        """The same of the model that the path names."""
        version = self._version(request)
        return _json({"name": self.model.name, "version": version.name, "ready": True})

    async def metadata(self, request: Request) -> Response:
        """Inputs and outputs."""
        version = self._version(request)
        columns = sum(version.tables.columns.values())
        return _json(
            {
                "name": self.model.name,
                "versions": [version.name],
                "platform": "thresher",
                "inputs": page.inputs(version.tables),
                "outputs": [
                    {"name": SCORE, "datatype": "FP32", "shape": [-1]},
                    {"name": EMBEDDING, "datatype": "FP32", "shape": [-1, columns]},
                ],
            }
        )

    async def infer(self, request: Request) -> Response:
        """Scores."""
        version = self._version(request)
        body = await read_body(request, self.limits)
        data, head_length = await run_in_threadpool(self._infer, version, body, request.headers.get(HEAD_LENGTH))
        if head_length is None:
            return Response(data, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(head_length)}
        return Response(data, headers=headers, media_type="application/octet-stream")

    def _infer(self, version: Version, body: bytes, head_length: str | None) -> tuple[bytes, int | None]:
        request = read_request(body, head_length, self.limits)
        self.metrics.rows.observe(request.rows)
        size = 4 * request.rows * sum(version.tables.columns.values())
        if EMBEDDING in request.outputs and size > self.limits.body_bytes:
            cause = f"{EMBEDDING}: {size} bytes, at most {self.limits.body_bytes} are sent; split the request"
            raise RefusedError(413, cause)
        try:
            found = version.infer(request.columns, request.outputs)
        except ValueError as error:
            raise RefusedError(400, str(error)) from None
        return write_response(request, self.model.name, version.name, found)

    async def prometheus(self, _: Request) -> Response:
        """Metrics."""
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def describe(self, _: Request) -> Response:
        """What the page shows of the model."""
        version = self.model.version
        if version is None:
            raise RefusedError(503, self.model.problem)
        return _json(page.description(self.model.name, version))

    async def example(self, request: Request) -> Response:
        """The page's form: score of one sample, and what its rows kept."""
        version = self.model.version
        if version is None:
            raise RefusedError(503, self.model.problem)
        body = await read_body(request, self.limits)
        return _json(await run_in_threadpool(page.scored, version.tables, body))

    def _version(self, request: Request) -> Version:
        """The version that a path asks for."""
        name, version = request.path_params["model"], self.model.version
        if name != self.model.name:
            raise RefusedError(404, f"model {name[:80]!r}: there is {self.model.name!r}")
        if version is None:
            raise RefusedError(503, f"no version is served yet: {self.model.problem}")
        if request.path_params.get("version", version.name) != version.name:
            raise RefusedError(
                404, f"version {request.path_params['version'][:80]!r}: the current one is {version.name}"
            )
        return version

    def _counted(self, handler: Handler) -> Handler:
        """Let only so many requests work at once, and count all."""

        async def counted(request: Request) -> Response:
            began, status = time.perf_counter(), 500
            self._at_work += 1
            self.metrics.at_work.set(self._at_work)
            try:
                if self._at_work > self.limits.requests:
                    raise RefusedError(
                        503, f"{self.limits.requests} requests are at work, which is the most; come again"
                    )
                response = await handler(request)
                status = response.status_code
                return response
            except RefusedError as error:
                status = error.status
                raise
            finally:
                self._at_work -= 1
                self.metrics.at_work.set(self._at_work)
                self.metrics.requests.labels(status).inc()
                self.metrics.seconds.observe(time.perf_counter() - began)

        return counted


async def _file(name: str, _: Request) -> Response:
    return FileResponse(Path(__file__).parent / name, headers=_HEADERS)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"Retry-After": "1"} if error.status == 503 else {}
    if request.method == "POST":
        headers["Connection"] = "close"  # what is left of the body is not read
    return _json({"error": str(error)}, error.status, headers)


async def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return _json({"error": cause}, error.status_code, dict(error.headers or {}))


async def _failed(request: Request, error: Exception) -> Response:
    logger.error("%s %s", request.method, request.url.path, exc_info=error)
    return _json({"error": "the server failed; its log says why"}, 500)
