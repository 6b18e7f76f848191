"""The server, end to end, against the same model served dense by FastAPI and torch.

DeepFM over 26 fields with a vocabulary of integers each, 16 columns, random weights, served by us from tables of which
3 % of the parameters stay, in fp16, and by a FastAPI application with one float32 embedding for all fields. Each server
is a process with one thread for its arithmetic; clients on loopback ask one request after the other on each of their
connections, with raw keys that differ from request to request.

    python -m benchmarks.serve [--quick]
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._environment import ROOT, environment

RESULTS = ROOT / "benchmarks" / "results" / "serve.json"
FIELDS, DIM, KEPT, HIDDEN = 26, 16, 0.03, [64, 64]
QUICK = "--quick" in sys.argv
IDS = 10_000 if QUICK else 1_000_000  # of each field
SECONDS = 3.0 if QUICK else 20.0
SAMPLES, CONNECTIONS = (1, 128, 1024), (1, 8)
DIFFERENT = 64  # requests that take turns
NAMES = [f"f{number}" for number in range(FIELDS)]


def main() -> None:
    """Measure all cases and write them down."""
    load = os.getloadavg()[0]  # above 0.5 other work took part in what is measured
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, "-m", "benchmarks.serve", "--make", folder, *sys.argv[1:]], check=True)
        rows = []
        for server, protocols in (("thresher", ("binary", "json")), ("fastapi_torch", ("json",))):
            port = _free_port()
            process = subprocess.Popen(_command(server, folder, port))
            try:
                _wait(port)
                for protocol in protocols:
                    for samples in SAMPLES:
                        for connections in CONNECTIONS:
                            rows.append(_measure(process.pid, port, server, protocol, samples, connections))
                            print(json.dumps(rows[-1]), flush=True)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait()
        sizes = json.loads((folder / "sizes.json").read_text())
    RESULTS.write_text(
        json.dumps(
            {
                "environment": environment(1, "service/thresher", "benchmarks/serve.py"),
                "model": {"name": "deepfm", "fields": FIELDS, "dim": DIM, "ids": IDS, "kept": KEPT, "hidden": HIDDEN},
                "seconds": SECONDS,
                "load_before": load,
                **sizes,
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )


def make(folder: Path) -> None:
    """Write the model: as exported tables, and as arrays for torch."""
    import torch
    from torch import nn

    from thresher.embedding.table_plan import TablePlan
    from thresher.models.dense_onnx import dense_onnx, dense_tensors
    from thresher.spec import ModelSpec
    from thresher.tables import Writer
    from thresher.tables.safetensors_file import TensorSpec
    from thresher.train.build import create_model

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    plan = TablePlan.uniform(NAMES, DIM)
    spec = ModelSpec(name="deepfm", dim=DIM, hidden=HIDDEN)
    model = create_model(spec, nn.Identity(), plan, 0)
    dense = {name: tensor.detach().numpy().copy() for name, tensor in dense_tensors(model).items()}
    writer = Writer(folder / "export", model="deepfm", seed=0, budget=KEPT, spec_fingerprint="0" * 64)
    weights = np.lib.format.open_memmap(folder / "tables.npy", "w+", np.float32, (FIELDS * (IDS + 1), DIM))
    for number, name in enumerate(NAMES):
        mask = random.random((IDS + 1, DIM)) < KEPT
        values = (random.standard_normal((IDS + 1, DIM)) * 0.1).astype(np.float16).astype(np.float32) * mask
        weights[number * (IDS + 1) : (number + 1) * (IDS + 1)] = values
        with writer.table(name, rows=IDS + 1, dim=DIM, kept=int(mask.sum()), dtype="fp16") as table:
            table.write(values, mask)
        keys = random.permutation(10 * IDS)[:IDS].astype(np.int64)
        np.save(folder / f"{name}.npy", keys)
        writer.field(name, table=name, kind="categorical", encoding="vocabulary", keys=keys)
    writer.dense(dense)
    stored = [TensorSpec(name, array.dtype, array.shape) for name, array in dense.items()]
    writer.graph(dense_onnx(model, "fields", {name: [name] for name in NAMES}, 0, stored), {})
    entries = writer.finish()
    torch.save({name: torch.from_numpy(array) for name, array in dense.items()}, folder / "dense.pt")
    samples = {name: np.load(folder / f"{name}.npy")[:32].tolist() for name in NAMES}
    scores = Dense(folder).scores(samples)
    (folder / "export" / "golden.json").write_text(json.dumps({"columns": samples, "scores": scores}))
    sizes = {"thresher_bytes": entries.total_bytes, "dense_table_bytes": weights.nbytes}
    (folder / "sizes.json").write_text(json.dumps(sizes))


class Dense:
    """The model in torch: one embedding for all fields, a dictionary of keys for each."""

    def __init__(self, folder: Path) -> None:
        import torch
        from torch import nn

        from thresher.embedding.table_plan import TablePlan
        from thresher.models.dense_onnx import GivenVectors, Scored
        from thresher.spec import ModelSpec
        from thresher.train.build import create_model

        torch.set_num_threads(1)
        spec = ModelSpec(name="deepfm", dim=DIM, hidden=HIDDEN)
        model = create_model(spec, nn.Identity(), TablePlan.uniform(NAMES, DIM), 0)
        model.load_state_dict(torch.load(folder / "dense.pt"))
        model.set_submodule("fields", GivenVectors(model.get_submodule("fields"), {name: [name] for name in NAMES}))
        self.model = Scored(model).eval()
        self.weights = torch.from_numpy(np.load(folder / "tables.npy"))
        self.ids = []
        for number, name in enumerate(NAMES):
            first = number * (IDS + 1)
            keys = np.load(folder / f"{name}.npy").tolist()
            self.ids.append((first, {key: first + 1 + place for place, key in enumerate(keys)}))

    def scores(self, columns: dict[str, list[int]]) -> list[float]:
        """Scores of raw keys."""
        import torch

        with torch.inference_mode():
            rows = torch.tensor(
                [[ids.get(key, oov) for key in columns[name]] for name, (oov, ids) in zip(NAMES, self.ids, strict=True)]
            )
            vectors_FBD = torch.nn.functional.embedding(rows, self.weights)
            found: list[float] = self.model(tuple(vectors_FBD), torch.empty(rows.shape[1], 0)).tolist()
            return found


def serve_dense(folder: Path, port: int) -> None:
    """The FastAPI application."""
    import fastapi
    import pydantic
    import uvicorn

    class Samples(pydantic.BaseModel):
        columns: dict[str, list[int]]

    app, dense = fastapi.FastAPI(), Dense(folder)

    def ready() -> dict[str, bool]:
        return {"ready": True}

    def infer(samples: Samples) -> dict[str, list[float]]:
        return {"scores": dense.scores(samples.columns)}

    infer.__annotations__["samples"] = Samples  # FastAPI looks names up in the module
    app.get("/v2/health/ready")(ready)
    app.post("/infer")(infer)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", http="httptools", access_log=False)


def _command(server: str, folder: Path, port: int) -> list[str]:
    if server == "thresher":
        options = ["--model", str(folder / "export"), "--port", str(port)]
        return [sys.executable, "-m", "thresher.cli", "serve", *options]
    return [sys.executable, "-m", "benchmarks.serve", "--dense", str(folder), str(port), *sys.argv[1:]]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait(port: int) -> None:
    import http.client

    for _ in range(1200):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise TimeoutError("the server did not get ready")


def _requests(server: str, protocol: str, samples: int) -> list[bytes]:
    """Whole HTTP requests; nine keys of ten are in the vocabularies."""
    random = np.random.default_rng(samples)
    found = []
    for _ in range(DIFFERENT):
        keys = {name: random.integers(0, 10 * IDS, samples) for name in NAMES}
        headers = ""
        if server == "fastapi_torch":
            path, body = "/infer", json.dumps({"columns": {name: own.tolist() for name, own in keys.items()}}).encode()
            headers = "Content-Type: application/json\r\n"
        else:
            path, binary = "/v2/models/export/infer", protocol == "binary"
            inputs: list[dict[str, Any]] = [{"name": name, "datatype": "INT64", "shape": [samples]} for name in NAMES]
            for own in inputs:
                data = (
                    {"parameters": {"binary_data_size": samples * 8}}
                    if binary
                    else {"data": keys[own["name"]].tolist()}
                )
                own.update(data)
            body = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": binary}}).encode()
            if binary:
                headers = f"Inference-Header-Content-Length: {len(body)}\r\n"
                body += b"".join(keys[name].astype("<i8").tobytes() for name in NAMES)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        found.append(head.encode() + body)
    return found


def _measure(pid: int, port: int, server: str, protocol: str, samples: int, connections: int) -> dict[str, Any]:
    requests = _requests(server, protocol, samples)
    asyncio.run(_ask(port, requests, connections, min(SECONDS / 4, 2.0)))
    began, cpu_s = time.perf_counter(), _cpu_s(pid)
    latencies_ms = asyncio.run(_ask(port, requests, connections, SECONDS))
    wall_s, cpu_s = time.perf_counter() - began, _cpu_s(pid) - cpu_s
    cuts = statistics.quantiles(latencies_ms, n=100)
    return {
        "server": server,
        "protocol": protocol,
        "samples": samples,
        "connections": connections,
        "requests_per_s": round(len(latencies_ms) / wall_s, 1),
        "p50_ms": round(cuts[49], 3),
        "p99_ms": round(cuts[98], 3),
        "server_cpu_ms": round(1000 * cpu_s / len(latencies_ms), 3),
    }


async def _ask(port: int, requests: list[bytes], connections: int, seconds: float) -> list[float]:
    """Milliseconds of each request on all connections."""
    until = time.perf_counter() + seconds
    found: list[float] = []

    async def one(first: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        number = first
        while (began := time.perf_counter()) < until:
            writer.write(requests[number % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            found.append((time.perf_counter() - began) * 1000)
            number += connections
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(one(first) for first in range(connections)))
    return found


def _cpu_s(pid: int) -> float:
    """Seconds of all cores that a process has used."""
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    if "--make" in sys.argv:
        make(Path(sys.argv[sys.argv.index("--make") + 1]))
    elif "--dense" in sys.argv:
        place = sys.argv.index("--dense")
        serve_dense(Path(sys.argv[place + 1]), int(sys.argv[place + 2]))
    else:
        main()
