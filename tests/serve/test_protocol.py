"""The server through a client that is not ours, and through plain HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.serve.conftest import Server
from tests.serve.models import COLUMNS
from thresher.serve.publication import current
from thresher.tables import load

pytestmark = pytest.mark.timeout(120)
TYPES = {"user_id": "INT64", "city": "BYTES", "genres": "BYTES", "age": "FP32"}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    yield client
    client.close()


@pytest.fixture(scope="module")
def expected(server: Server) -> np.ndarray:
    return np.array(json.loads((current(server.folder) / "golden.json").read_text())["scores"])


def inputs(columns: dict[str, list[Any]], binary: bool) -> list[triton.InferInput]:
    found = []
    for name, datatype in TYPES.items():
        dtype: Any = {"INT64": np.int64, "FP32": np.float32, "BYTES": object}[datatype]
        values = np.array([np.nan if value is None else value for value in columns[name]], dtype)
        tensor = triton.InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values, binary_data=binary)
        found.append(tensor)
    return found


def test_health_and_metadata(server: Server, client: triton.InferenceServerClient) -> None:
    version = current(server.folder).name
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("clicks")
    assert client.is_model_ready("clicks", version)
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.get_model_metadata("clicks") == {
        "name": "clicks",
        "versions": [version],
        "platform": "thresher",
        "inputs": [{"name": name, "datatype": TYPES[name], "shape": [-1]} for name in COLUMNS],
        "outputs": [
            {"name": "score", "datatype": "FP32", "shape": [-1]},
            {"name": "embedding", "datatype": "FP32", "shape": [-1, 12]},
        ],
    }
    assert client.get_model_metadata("clicks", version) == client.get_model_metadata("clicks")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("clicks", "1")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("packing", [None, "gzip", "deflate"])
def test_scores(binary: bool, packing: str | None, client: triton.InferenceServerClient, expected: np.ndarray) -> None:
    columns = COLUMNS if binary else COLUMNS | {"age": [0.0 if age is None else age for age in COLUMNS["age"]]}
    found = client.infer(
        "clicks",
        inputs(columns, binary),
        outputs=[triton.InferRequestedOutput("score", binary_data=binary)],
        request_id="7",
        request_compression_algorithm=packing,
    )
    np.testing.assert_allclose(found.as_numpy("score"), expected, rtol=0, atol=1e-6)
    assert found.get_response()["id"] == "7"
    assert found.get_response()["model_name"] == "clicks"


def test_embeddings(server: Server, client: triton.InferenceServerClient) -> None:
    wanted = [triton.InferRequestedOutput("embedding"), triton.InferRequestedOutput("score", binary_data=False)]
    version = current(server.folder).name
    found = client.infer("clicks", inputs(COLUMNS, True), outputs=wanted, model_version=version)
    tables = load(current(server.folder))
    vectors = tables.embed(tables.ids(COLUMNS))
    assert np.array_equal(found.as_numpy("embedding"), np.concatenate(list(vectors.values()), axis=1))
    assert found.as_numpy("score").shape == (5,)


def test_embeddings_have_a_limit_too(client: triton.InferenceServerClient) -> None:
    tensors = []
    for name, datatype in TYPES.items():
        values = np.array([""] * 3000, object) if datatype == "BYTES" else np.zeros(3000, np.uint8)
        tensors.append(triton.InferInput(name, [3000], "BYTES" if datatype == "BYTES" else "UINT8"))
        tensors[-1].set_data_from_numpy(values)
    assert client.infer("clicks", tensors).as_numpy("score").shape == (3000,)
    with pytest.raises(InferenceServerException, match="embedding: 144000 bytes, at most 100000 are sent"):
        client.infer("clicks", tensors, outputs=[triton.InferRequestedOutput("embedding")])


def tensor(name: str, values: list[Any], datatype: str | None = None, shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "shape": shape or [len(values)], "datatype": datatype or TYPES[name], "data": values}


def one(**changes: list[Any]) -> dict[str, Any]:
    columns = {"user_id": [10], "city": ["Oslo"], "genres": ["Drama"], "age": [18.0]} | changes
    return {"inputs": [tensor(name, values) for name, values in columns.items()]}


def infer(server: Server, request: Any, **headers: str) -> tuple[int, Any]:
    body = request if isinstance(request, bytes) else json.dumps(request)
    return server.ask("POST", "/v2/models/clicks/infer", body, **headers)


def test_other_forms_of_the_same_sample_score_alike(server: Server) -> None:
    status, response = infer(server, one(genres=["Action|Drama"]))
    assert status == 200
    (score,) = response["outputs"][0]["data"]
    forms = [
        {"user_id": tensor("user_id", ["10"], "BYTES")},
        {"user_id": tensor("user_id", [10], "INT32", [1, 1])},
        {"genres": tensor("genres", ["Drama", "Action"], "BYTES", [1, 2])},
        {"genres": tensor("genres", [["Action", "Drama"]], "BYTES", [1, 2])},
        {"genres": tensor("genres", ["Action", "", "Drama"], "BYTES", [1, 3])},
        {"age": tensor("age", [18], "UINT8")},
        {"age": tensor("age", ["18.0"], "BYTES")},
    ]
    plain = {own["name"]: own for own in one(genres=["Action|Drama"])["inputs"]}
    for form in forms:
        status, response = infer(server, {"inputs": list((plain | form).values())})
        assert status == 200, response
        assert response["outputs"][0]["data"] == pytest.approx([score], abs=1e-6)


WRONG: list[tuple[Any, int, str]] = [
    (b"", 400, "not a request of the Open Inference Protocol"),
    (b"{", 400, "not a request of the Open Inference Protocol"),
    (b"\xff\xfe", 400, "not a request of the Open Inference Protocol"),
    (b"[" * 50_000, 400, "not a request of the Open Inference Protocol"),
    ({}, 400, "missing required field `inputs`"),
    ({"inputs": []}, 400, "inputs: is empty"),
    ({"inputs": [{"name": "user_id"}]}, 400, "missing required field `shape`"),
    (one(user_id=[]), 400, "has 1 samples, 'user_id' has 0"),
    ({"inputs": one()["inputs"][1:]}, 400, "column 'user_id' is missing; there are 'city', 'genres', 'age'"),
    ({"inputs": [*one()["inputs"], tensor("age", [1])]}, 400, "input 'age': stands there twice"),
    ({"inputs": [tensor("age", [1], "FP8")]}, 400, "datatype 'FP8'; there are BYTES, BOOL"),
    ({"inputs": [tensor("age", [1], shape=[1, 1, 1])]}, 400, "shape [1, 1, 1] must be [samples]"),
    ({"inputs": [tensor("age", [1], shape=[-1])]}, 400, "shape [-1] must be"),
    ({"inputs": [tensor("age", [1], shape=[10**12])]}, 413, "1000000000000 samples, at most 3000 a request"),
    ({"inputs": [tensor("age", [1], shape=[1, 10**15])]}, 400, "has 1 values, shape [1, 1000000000000000] has 1"),
    ({"inputs": [tensor("age", ["x"])]}, 400, "input 'age': data must be numbers of type FP32"),
    ({"inputs": [tensor("user_id", [1.5])]}, 400, "input 'user_id': data must be numbers of type INT64"),
    ({"inputs": [tensor("user_id", [2**70])]}, 400, "input 'user_id': a value does not fit into INT64"),
    ({"inputs": [tensor("city", [5])]}, 400, "input 'city': data of BYTES must be texts"),
    ({"inputs": [{"name": "city", "shape": [1], "datatype": "BYTES"}]}, 400, "neither data nor binary_data_size"),
    (one() | {"outputs": [{"name": "logit"}]}, 400, "output 'logit': there are score and embedding"),
    (one(age=["old"]), 400, "data must be numbers"),
    ({"inputs": [*one()["inputs"][:3], tensor("age", ["old"], "BYTES")]}, 400, "column 'age': is numeric"),
]


@pytest.mark.parametrize(("request_", "status", "cause"), WRONG)
def test_a_malformed_request_is_told_why(request_: Any, status: int, cause: str, server: Server) -> None:
    found, response = infer(server, request_)
    assert (found, list(response)) == (status, ["error"])
    assert cause in response["error"]


def binary(head: dict[str, Any], data: bytes) -> tuple[bytes, dict[str, str]]:
    encoded = json.dumps(head).encode()
    return encoded + data, {"Inference_Header_Content_Length": str(len(encoded))}


@pytest.mark.parametrize(
    ("name", "datatype", "data", "size", "cause"),
    [
        ("user_id", "INT64", b"12345678", 9, "binary_data_size 9, but 8 bytes of the body are left"),
        ("user_id", "INT64", b"12345678", -1, "binary_data_size -1, but 8 bytes"),
        ("user_id", "INT64", b"12345678", "8", "binary_data_size 8, but 8 bytes"),
        ("user_id", "INT64", b"1234", 4, "binary_data_size 4, but INT64 [1] has 8 bytes"),
        ("user_id", "INT64", b"12345678x", 8, "1 bytes after the last input"),
        ("city", "BYTES", b"\x04\0\0\0Os", 6, "text 0 reaches beyond binary_data_size 6"),
        ("city", "BYTES", b"\xff\xff\xff\xff", 4, "text 0 reaches beyond binary_data_size 4"),
        ("city", "BYTES", b"\x01\0\0\0\xff", 5, "can't decode byte 0xff"),
        ("city", "BYTES", b"\x01\0\0\0xy", 6, "1 bytes after the last text"),
        ("city", "BYTES", b"\x01", 1, "binary_data_size 1 is too small for 1 texts"),
    ],
)
def test_lying_binary_tensors_are_told_why(
    name: str, datatype: str, data: bytes, size: Any, cause: str, server: Server
) -> None:
    head = {"name": name, "shape": [1], "datatype": datatype, "parameters": {"binary_data_size": size}}
    body, headers = binary({"inputs": [head]}, data)
    status, response = infer(server, body, **headers)
    assert status == 400
    assert cause in response["error"]


@pytest.mark.parametrize("length", ["-1", "1e3", "99999999", "", "\u00b2"])
def test_a_lying_head_length_is_told(length: str, server: Server) -> None:
    status, response = infer(server, json.dumps(one()).encode(), Inference_Header_Content_Length=length)
    assert status == 400
    assert "Inference-Header-Content-Length" in response["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/clicks/versions/1", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/clicks/infer", 405),
        ("DELETE", "/v2", 405),
        ("GET", "/v1/models", 404),
        ("GET", "/../../etc/passwd", 404),
    ],
)
def test_other_addresses_are_refused_with_a_cause(method: str, path: str, status: int, server: Server) -> None:
    found, response = server.ask(method, path)
    assert found == status
    assert response["error"]


def test_metrics_count(server: Server) -> None:
    def value(name: str) -> float:
        _, text = server.ask("GET", "/metrics")
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    good, bad, rows = (
        'thresher_requests_total{status="200"}',
        'thresher_requests_total{status="400"}',
        "thresher_request_rows_sum",
    )
    before = [value(name) for name in (good, bad, rows)]
    infer(server, one())
    infer(server, {})
    assert [value(name) for name in (good, bad, rows)] == [before[0] + 1, before[1] + 1, before[2] + 1]
    assert value("thresher_model_ready") == 1
    assert value("thresher_model_bytes") == load(current(server.folder)).total_bytes
    assert value("thresher_request_seconds_count") > 0


def test_an_empty_batch_is_empty(server: Server) -> None:
    status, response = infer(server, {"inputs": [tensor(name, [], shape=[0]) for name in TYPES]})
    assert (status, response["outputs"][0]) == (200, {"name": "score", "datatype": "FP32", "shape": [0], "data": []})


def test_the_folder_may_be_an_export(tmp_path: Path) -> None:
    from tests.serve.conftest import serving
    from tests.serve.models import write_export

    with serving(write_export(tmp_path / "export")) as server:
        server.wait_for(200)
        assert infer(server, one())[0] == 200
