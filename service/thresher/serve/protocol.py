"""The Open Inference Protocol, version 2, over HTTP: requests as columns of raw values, scores as responses.

JSON, and the extension for binary tensors: a JSON head of `Inference-Header-Content-Length` bytes, then the data of
tensors in their order, little-endian; a text is its length in 4 bytes and its UTF-8. Shapes: B samples.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from thresher.serve.limits import Limits, RefusedError

HEAD_LENGTH = "inference-header-content-length"
SCORE, EMBEDDING = "score", "embedding"
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
BYTES = "BYTES"
_JSON_KINDS = {"b": (bool,), "u": (int,), "i": (int,), "f": (int, float)}


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


_DECODER = msgspec.json.Decoder(_Request)


@dataclass(frozen=True)
class Request:
    """An inference request.

    Attributes:
        id: as the client gave it.
        columns: raw values by the name of their column, NumPy arrays or lists, each `[B]`; `[B, K]` for bags of K keys.
        rows: B.
        outputs: names of the wanted outputs, and whether each is to be binary.
    """

    id: str
    columns: dict[str, Any]
    rows: int
    outputs: dict[str, bool]


def read_request(body: bytes, head_length: str | None, limits: Limits) -> Request:
    """Read a request.

    Args:
        body: of the HTTP request, unpacked.
        head_length: its header `Inference-Header-Content-Length`, where it has one.
        limits: of the server.

    Raises:
        RefusedError: names the input and what is wrong with it.
    """
    head, rest = body, memoryview(b"")
    if head_length is not None:
        if not head_length.isascii() or not head_length.isdigit() or int(head_length) > len(body):
            raise RefusedError(
                400, f"Inference-Header-Content-Length: {head_length[:40]!r} for a body of {len(body)} bytes"
            )
        head, rest = body[: int(head_length)], memoryview(body)[int(head_length) :]
    try:
        request = _DECODER.decode(head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(400, f"not a request of the Open Inference Protocol: {error}") from None
    if not request.inputs:
        raise RefusedError(400, "inputs: is empty; give a tensor for each column that the model reads")
    rows = _rows(request.inputs, limits)
    columns: dict[str, Any] = {}
    for tensor in request.inputs:
        if tensor.name in columns:
            raise RefusedError(400, f"input {tensor.name[:80]!r}: stands there twice")
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            columns[tensor.name] = _from_json(tensor)
        else:
            if type(size) is not int or not 0 <= size <= len(rest):
                raise RefusedError(
                    400,
                    f"input {tensor.name[:80]!r}: binary_data_size {str(size)[:40]}, but {len(rest)} bytes of the body "
                    "are left",
                )
            columns[tensor.name] = _from_bytes(tensor, rest[:size])
            rest = rest[size:]
    if len(rest):
        raise RefusedError(400, f"body: {len(rest)} bytes after the last input")
    every = request.parameters.get("binary_data_output") is True
    wanted = request.outputs or [_Output(SCORE)]
    outputs = {output.name: output.parameters.get("binary_data", every) is True for output in wanted}
    if unknown := outputs.keys() - {SCORE, EMBEDDING}:
        raise RefusedError(400, f"output {min(unknown)[:80]!r}: there are {SCORE} and {EMBEDDING}")
    return Request(request.id, columns, rows, outputs)


def write_response(
    request: Request, model: str, version: str, found: Mapping[str, npt.NDArray[np.float32]]
) -> tuple[bytes, int | None]:
    """A response's body, and the bytes of its JSON head where binary data follow it.

    Args:
        request: that is answered.
        model: name of the model.
        version: of the model.
        found: the wanted outputs.
    """
    outputs, parts = [], []
    for name, array in found.items():
        tensor: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
        if request.outputs[name]:
            parts.append(array.tobytes())
            outputs.append(tensor | {"parameters": {"binary_data_size": array.nbytes}})
        else:
            outputs.append(tensor | {"data": array.ravel().tolist()})
    response = {"model_name": model, "model_version": version, "outputs": outputs}
    head = msgspec.json.encode(response | ({"id": request.id} if request.id else {}))
    return (b"".join([head, *parts]), len(head)) if parts else (head, None)


def _rows(inputs: list[_Tensor], limits: Limits) -> int:
    """B, after the shapes were checked."""
    rows = None
    for tensor in inputs:
        at = f"input {tensor.name[:80]!r}"
        if tensor.datatype != BYTES and tensor.datatype not in DTYPES:
            raise RefusedError(400, f"{at}: datatype {tensor.datatype[:40]!r}; there are {BYTES}, {', '.join(DTYPES)}")
        if not 1 <= len(tensor.shape) <= 2 or min(tensor.shape) < 0:
            raise RefusedError(400, f"{at}: shape {tensor.shape[:9]} must be [samples], or [samples, keys of a bag]")
        if rows is None:
            rows = tensor.shape[0]
        if tensor.shape[0] != rows:
            raise RefusedError(400, f"{at}: has {tensor.shape[0]} samples, {inputs[0].name[:80]!r} has {rows}")
    assert rows is not None
    if rows > limits.rows:
        raise RefusedError(413, f"{rows} samples, at most {limits.rows} a request; split it")
    return rows


def _from_json(tensor: _Tensor) -> Any:
    at, count = f"input {tensor.name[:80]!r}", math.prod(tensor.shape)
    if tensor.data is None:
        raise RefusedError(400, f"{at}: has neither data nor binary_data_size")
    values = tensor.data
    if len(tensor.shape) == 2 and values and isinstance(values[0], list):  # rows may stand in lists of their own
        if any(not isinstance(row, list) or len(row) != tensor.shape[1] for row in values):
            raise RefusedError(
                400, f"{at}: data must be {tensor.shape[0]} lists of {tensor.shape[1]} values, or all in one"
            )
        values = [value for row in values for value in row]
    if len(values) != count:
        raise RefusedError(400, f"{at}: has {len(values)} values, shape {tensor.shape} has {count}")
    if tensor.datatype == BYTES:
        if any(type(value) is not str for value in values):
            raise RefusedError(400, f"{at}: data of {BYTES} must be texts")
        return _shaped(values, tensor.shape)
    dtype = DTYPES[tensor.datatype]
    if any(type(value) not in _JSON_KINDS[dtype.kind] for value in values):
        raise RefusedError(400, f"{at}: data must be numbers of type {tensor.datatype}")
    try:
        array = np.array(values, dtype)
    except OverflowError:
        raise RefusedError(400, f"{at}: a value does not fit into {tensor.datatype}") from None
    return _shaped_array(array, tensor.shape)


def _from_bytes(tensor: _Tensor, data: memoryview) -> Any:
    at, count = f"input {tensor.name[:80]!r}", math.prod(tensor.shape)
    if tensor.datatype == BYTES:
        return _shaped(_texts(data, count, at), tensor.shape)
    dtype = DTYPES[tensor.datatype]
    if len(data) != count * dtype.itemsize:
        raise RefusedError(
            400,
            f"{at}: binary_data_size {len(data)}, but {tensor.datatype} {tensor.shape} has "
            f"{count * dtype.itemsize} bytes",
        )
    return _shaped_array(np.frombuffer(data, dtype), tensor.shape)


_LENGTH = struct.Struct("<I")


def _texts(data: memoryview, count: int, at: str) -> list[str]:
    if count * 4 > len(data):  # before a loop over them
        raise RefusedError(400, f"{at}: binary_data_size {len(data)} is too small for {count} texts")
    found: list[str] = []
    begin = 0
    try:
        for _ in range(count):
            end = begin + 4 + _LENGTH.unpack_from(data, begin)[0]
            if end > len(data):
                raise RefusedError(400, f"{at}: text {len(found)} reaches beyond binary_data_size {len(data)}")
            found.append(str(data[begin + 4 : end], "utf-8"))
            begin = end
    except (struct.error, UnicodeDecodeError) as error:
        raise RefusedError(400, f"{at}: text {len(found)}: {error}") from None
    if begin != len(data):
        raise RefusedError(400, f"{at}: {len(data) - begin} bytes after the last text")
    return found


def _shaped(values: list[str], shape: list[int]) -> Any:
    if len(shape) == 1 or shape[1] == 1:
        return values
    return [values[first : first + shape[1]] for first in range(0, len(values), shape[1])] or [[]] * shape[0]


def _shaped_array(array: npt.NDArray[Any], shape: list[int]) -> npt.NDArray[Any]:
    return array if len(shape) == 1 or shape[1] == 1 else array.reshape(shape)
