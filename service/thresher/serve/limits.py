"""What a server takes from its clients, and what it says to those who ask for more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Most that one request, and all together, may take.

    Attributes:
        body_bytes: of a request's body, as it is sent and as it is unpacked, and of the embeddings that it asks for.
        head_bytes: of its request line and headers.
        rows: samples of a request.
        requests: at work at the same time; more are told to come again.
        connections: open at the same time.
        seconds: until the head of a request is there, then until its body is.
    """

    body_bytes: int = 16 * 2**20
    head_bytes: int = 64 * 2**10
    rows: int = 8192
    requests: int = 64
    connections: int = 1024
    seconds: float = 10.0


class RefusedError(ValueError):
    """A request that is not served, and why.

    Args:
        status: of the HTTP response.
        cause: what is wrong with the request, for its sender.
    """

    def __init__(self, status: int, cause: str) -> None:
        super().__init__(cause)
        self.status = status
