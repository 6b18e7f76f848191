"""Starts the server."""

from __future__ import annotations

import logging
from pathlib import Path

import uvicorn

from thresher.serve.app import App
from thresher.serve.connection import protocol
from thresher.serve.limits import Limits
from thresher.serve.model import Model
from thresher.serve.publication import current


def run(folder: Path, name: str, host: str, port: int, limits: Limits, poll_seconds: float = 1.0) -> None:
    """Serve until SIGTERM or SIGINT; then take no more requests, finish those at work, and return.

    Args:
        folder: published models, or exported tables.
        name: of the model, in URLs.
        host: address to listen on.
        port: to listen on.
        limits: of requests.
        poll_seconds: between two looks for a newer version.

    Raises:
        ValueError: if the folder holds no model.
    """
    current(folder)  # a mistake in the path is told at once; what is wrong with a version makes it not ready
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    app = App(Model(name, folder), limits, poll_seconds)
    config = uvicorn.Config(
        app.starlette(),
        host=host,
        port=port,
        http=protocol(limits),
        ws="none",
        lifespan="on",
        access_log=False,  # /metrics counts them
        server_header=False,
        date_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(limits.seconds) + 5,
        log_config=None,
    )
    uvicorn.Server(config).run()
