"""A connection's HTTP protocol that waits only so long for the head of a request, and reads only so much of it.

uvicorn limits neither: a client could send a byte a minute, or headers without end.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from thresher.serve.limits import Limits

_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


def protocol(limits: Limits) -> type[asyncio.Protocol]:
    """The protocol for uvicorn, with these limits."""

    class Protocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
                self._await_head()
            super().data_received(data)
            if self._deadline is not None:
                self._head_bytes += len(data)
                if self._head_bytes > limits.head_bytes:
                    self._refuse(431, f"head: at most {limits.head_bytes} bytes are read")

        def on_headers_complete(self) -> None:
            self._head_is_there()
            super().on_headers_complete()

        def _await_head(self) -> None:
            cause = f"head: not whole after {limits.seconds:g} s"
            self._deadline = self.loop.call_later(limits.seconds, self._refuse, 408, cause)
            self._head_bytes = 0

        def _head_is_there(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _refuse(self, status: int, cause: str) -> None:
            self._head_is_there()
            if self.transport.is_closing():
                return
            body = msgspec.json.encode({"error": cause})
            head = (
                f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    return Protocol
