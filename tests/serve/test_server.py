"""The server as a process: it waits for golden requests, switches without a failed request, drains, and bears abuse."""

from __future__ import annotations

import contextlib
import gzip
import json
import signal
import socket
import statistics
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import Server, serving
from tests.serve.models import COLUMNS, write_export
from thresher.rundir import write_json
from thresher.serve.publication import publish
from thresher.tables import load
from thresher.tables.golden import GOLDEN

pytestmark = pytest.mark.timeout(120)
TYPES = {"user_id": "INT64", "city": "BYTES", "genres": "BYTES", "age": "FP32"}
INFER = "/v2/models/clicks/infer"


def request(rows: int = 1) -> bytes:
    columns = {name: [0.0 if value is None else value for value in COLUMNS[name]] for name in TYPES}
    inputs = [
        {"name": name, "shape": [rows], "datatype": TYPES[name], "data": (columns[name] * rows)[:rows]}
        for name in TYPES
    ]
    return json.dumps({"inputs": inputs}).encode()


def head(length: int | None, **headers: str) -> bytes:
    lines = [f"POST {INFER} HTTP/1.1", "Host: x", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    lines += ["Transfer-Encoding: chunked"] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def send(server: Server, *parts: bytes, pause: float = 0.0) -> bytes:
    """The answer to raw bytes, read until the server closes or says no more."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
                if b"\r\n\r\n" in answer and b"Connection: close" not in answer and b"connection: close" not in answer:
                    break
        return answer


@contextlib.contextmanager
def others_go_on(server: Server) -> Iterator[None]:
    """Well-behaved requests all the while, each of which must be answered, and most of them soon."""
    stop, seconds, failed = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            began = time.monotonic()
            status, response = server.ask("POST", INFER, request())
            seconds.append(time.monotonic() - began)
            if status != 200:
                failed.append(response)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failed == []
    assert statistics.median(seconds) < 0.5, "good requests waited for a bad one"


def test_a_slow_head_is_cut_off(server: Server) -> None:
    with others_go_on(server):
        answer = send(server, *(bytes([byte]) for byte in head(10)[:12]), pause=0.15)
        silent = send(server, b"")
    for found in (answer, silent):
        assert found.startswith(b"HTTP/1.1 408 "), found
        assert b'{"error":"head: not whole after 1.5 s"}' in found


def test_a_slow_body_is_cut_off(server: Server) -> None:
    with others_go_on(server):
        answer = send(server, head(1000), *([b"{"] * 12), pause=0.15)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body: not whole after 1.5 s: " in answer


def test_an_endless_head_is_cut_off(server: Server) -> None:
    with others_go_on(server):
        answer = send(server, b"GET /v2 HTTP/1.1\r\n", *([b"X-More: " + b"x" * 1000 + b"\r\n"] * 200))
    assert answer.startswith(b"HTTP/1.1 431 ") or answer == b""  # reset while we still sent


def test_an_endless_body_is_cut_off(server: Server) -> None:
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    with others_go_on(server):
        answer = send(server, head(None), *([chunk] * 2000))
    assert answer.startswith(b"HTTP/1.1 413 ") or answer == b""
    assert b"at most 100000 bytes are read" in answer or answer == b""


def test_a_body_that_is_declared_too_large_is_not_waited_for(server: Server) -> None:
    began = time.monotonic()
    answer = send(server, head(10**12))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body: 1000000000000 bytes, at most 100000 are read" in answer
    assert time.monotonic() - began < 1.4


def test_a_body_shorter_than_declared_and_one_that_breaks_off(server: Server) -> None:
    body = request()
    assert send(server, head(len(body) + 5), body).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(len(body)) + body[:-5])
    assert server.ask("POST", INFER, body)[0] == 200


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_compressed_bombs_are_not_unpacked(packing: str, server: Server) -> None:
    bomb = b" " * 80_000_000
    packed = gzip.compress(bomb) if packing == "gzip" else zlib.compress(bomb)
    assert len(packed) < 100_000
    with others_go_on(server):
        status, response = server.ask("POST", INFER, packed, Content_Encoding=packing)
    assert (status, response["error"]) == (413, "body: unpacks to more than 100000 bytes; split the request")


@pytest.mark.parametrize(
    ("body", "packing", "status", "cause"),
    [
        (b"not gzip", "gzip", 400, "body: is not gzip"),
        (gzip.compress(b"{}")[:-4], "gzip", 400, "body: is not one whole gzip stream"),
        (gzip.compress(b"{}") + b"x", "gzip", 400, "body: is not one whole gzip stream"),
        (b"{}", "br", 415, "Content-Encoding: 'br'; there are identity, gzip, deflate"),
    ],
)
def test_wrong_compression_is_told(body: bytes, packing: str, status: int, cause: str, server: Server) -> None:
    found, response = server.ask("POST", INFER, body, Content_Encoding=packing)
    assert found == status
    assert cause in response["error"]


@pytest.mark.parametrize(
    "text", [b"\0" * 100, b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01"]
)
def test_what_is_not_http_is_refused(text: bytes, server: Server) -> None:
    with others_go_on(server):
        assert send(server, text).startswith(b"HTTP/1.1 400 ")


def test_more_requests_than_may_work_at_once_are_sent_away(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            waiting = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            waiting.sendall(head(100))
        time.sleep(0.3)
        status, response = server.ask("POST", INFER, request())
        assert (status, response["error"]) == (503, "8 requests are at work, which is the most; come again")
        assert server.ask("GET", "/v2/health/ready")[0] == 200
    time.sleep(0.3)
    assert server.ask("POST", INFER, request())[0] == 200


def test_it_listens_on_loopback_alone(server: Server) -> None:
    own = socket.gethostbyname(socket.gethostname())
    if own.startswith("127."):
        pytest.skip("this machine's name has a loopback address alone")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((own, server.port), timeout=2)


def test_it_is_ready_when_golden_requests_pass(tmp_path: Path) -> None:
    export = write_export(tmp_path / "export")
    right = (export / GOLDEN).read_bytes()
    value = json.loads(right)
    value["scores"][1] += 0.01
    write_json(export / GOLDEN, value)
    with serving(tmp_path / "export") as server:
        response = server.wait_for(503)
        for _ in range(100):
            if response["problem"] != "loading":
                break
            response = server.ask("GET", "/v2/health/ready")[1]
            time.sleep(0.05)
        assert response["ready"] is False
        assert "row 1 scores" in response["problem"]
        assert server.ask("GET", "/v2/models/clicks/ready")[0] == 503
        assert server.ask("POST", INFER, request())[0] == 503
        assert server.ask("GET", "/v2/health/live")[0] == 200


def test_a_new_version_is_switched_to_without_a_failed_request(tmp_path: Path) -> None:
    to = tmp_path / "published"
    exports = [write_export(tmp_path / f"export{seed}", seed) for seed in range(3)]
    scores = {}
    for export in exports:
        scores[publish(export, "", to, keep=3)] = load(export).score(
            {name: [0.0 if value is None else value for value in column] for name, column in COLUMNS.items()}
        )
    names = list(scores)
    publish(exports[0], "", to, keep=3)
    answers: list[tuple[int, str, list[float]]] = []
    stop = threading.Event()
    with serving(to) as server:
        server.wait_for(200)

        def ask() -> None:
            while not stop.is_set():
                status, response = server.ask("POST", INFER, request(5))
                version = response.get("model_version", "")
                answers.append((status, version, response["outputs"][0]["data"] if status == 200 else []))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in (1, 2):
            publish(exports[number], "", to, keep=3)
            server.wait_for(200, f"/v2/models/clicks/versions/{names[number]}/ready")
        # One that is broken is not switched to.
        folder = to / ("f" * 64)
        folder.mkdir()
        write_json(to / "current.json", {"version": folder.name})
        for _ in range(100):
            if problem := server.ask("GET", "/v2/health/ready")[1]["problem"]:
                break
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        assert "were changed after they were published" in problem
        publish(exports[2], "", to, keep=3)
        for _ in range(100):
            if not (problem := server.ask("GET", "/v2/health/ready")[1]["problem"]):
                break
            time.sleep(0.05)
        assert problem == ""
        assert server.ask("GET", "/v2/models/clicks")[1]["versions"] == [names[2]]
    assert {status for status, _, _ in answers} == {200}
    assert [version for version in names if any(version == found for _, found, _ in answers)] == names
    for _, version, found in answers:  # each by one version, none by a mixture
        assert found == pytest.approx(scores[version].tolist(), abs=1e-6)


def test_sigterm_finishes_what_was_begun(tmp_path: Path) -> None:
    body = request()
    with serving(write_export(tmp_path / "export"), "--timeout-s", "10") as server:
        server.wait_for(200)
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as begun:
            begun.sendall(head(len(body)) + body[:-1])
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.1", server.port), timeout=2)
            begun.sendall(body[-1:])
            assert begun.recv(65536).startswith(b"HTTP/1.1 200 ")
        server.process.wait(timeout=10)
        assert server.process.returncode in (0, -signal.SIGTERM)
