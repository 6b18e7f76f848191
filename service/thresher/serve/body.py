"""Reads a request's body within limits: bytes as sent, bytes as unpacked, and time."""

from __future__ import annotations

import asyncio
import zlib

from starlette.requests import ClientDisconnect, Request

from thresher.serve.limits import Limits, RefusedError

_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, unpacked.

    Raises:
        RefusedError: if it is too large, comes too slowly, breaks off, or is not packed as it says.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.body_bytes:
        raise RefusedError(413, f"body: {declared} bytes, at most {limits.body_bytes} are read; split the request")
    packing = request.headers.get("content-encoding", "identity")
    if packing not in ("identity", *_WINDOW_BITS):
        raise RefusedError(415, f"Content-Encoding: {packing[:40]!r}; there are identity, {', '.join(_WINDOW_BITS)}")
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise RefusedError(413, f"body: at most {limits.body_bytes} bytes are read; split the request")
                parts.append(part)
    except TimeoutError:
        raise RefusedError(408, f"body: not whole after {limits.seconds:g} s: {size} bytes came") from None
    except ClientDisconnect:
        raise RefusedError(400, f"body: broke off after {size} bytes") from None
    body = b"".join(parts)
    return body if packing == "identity" else _unpacked(body, packing, limits)


def _unpacked(body: bytes, packing: str, limits: Limits) -> bytes:
    unpacker = zlib.decompressobj(_WINDOW_BITS[packing])
    try:
        found = unpacker.decompress(body, limits.body_bytes + 1)
    except zlib.error as error:
        raise RefusedError(400, f"body: is not {packing}: {error}") from None
    if len(found) > limits.body_bytes:
        raise RefusedError(413, f"body: unpacks to more than {limits.body_bytes} bytes; split the request")
    if not unpacker.eof or unpacker.unused_data:
        raise RefusedError(400, f"body: is not one whole {packing} stream")
    return found
