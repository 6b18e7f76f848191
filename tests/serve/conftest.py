"""A server as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.serve.models import write_export
from thresher.serve.publication import publish


@dataclass
class Server:
    """A running server.

    Attributes:
        process: of `thresher serve`.
        port: that it listens on.
        folder: the published models.
    """

    process: subprocess.Popen[str]
    port: int
    folder: Path

    def ask(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON, or text, of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            data = response.read().decode()
            return response.status, json.loads(data) if "json" in response.getheader("Content-Type", "") else data

    def wait_for(self, status: int, path: str = "/v2/health/ready") -> Any:
        """Ask until there is an answer of this status."""
        for _ in range(400):
            with contextlib.suppress(OSError):
                found, value = self.ask("GET", path)
                if found == status:
                    return value
            time.sleep(0.05)
        raise AssertionError(f"{path} did not get status {status}")


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    """Serve published models while the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; sys.modules['torch'] = None; from thresher.cli import main; main()"
    command = ["serve", "--model", str(folder), "--name", "clicks", "--port", str(port), *options]
    process = subprocess.Popen([sys.executable, "-c", program, *command], stderr=subprocess.PIPE, text=True)
    server = Server(process, port, folder)
    try:
        server.wait_for(200, "/v2/health/live")
        yield server
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with narrow limits."""
    folder = tmp_path_factory.mktemp("served")
    publish(write_export(folder / "export"), "# The card\n", folder / "published", keep=3)
    limits = ["--max-rows", "3000", "--max-body-bytes", "100000", "--timeout-s", "1.5", "--max-requests", "8"]
    with serving(folder / "published", *limits) as server:
        server.wait_for(200)
        yield server
