"""The safetensors container: written as a stream, read by memory map with every field of its header checked.

A file is 8 bytes N (little-endian), N bytes of JSON header, then the tensors. The safetensors library wants whole
arrays to write, and accepts repeated keys when it reads; here the header is written ahead of the data, whose sizes
are known, and a file that is not exactly as described is refused.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.tables import strict_json

MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMENSIONS = 8
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "BOOL": np.dtype("?"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of a tensor in a file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def header(tensors: Iterable[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The start of a file that holds `tensors`, and where in the file the data of each begins.

    Widest types come first and the header's length is a multiple of 8, so that every tensor is aligned.

    Raises:
        ValueError: if a type has no place in the format, or the names need too large a header.
    """
    members: dict[str, Any] = {}
    begin = 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        if tensor.dtype not in CODES:
            raise ValueError(f"tensor {tensor.name!r}: type {tensor.dtype} cannot be stored; convert it to float32")
        end = begin + tensor.nbytes
        members[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(members, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(members)} tensors need a header of {len(text)} bytes, at most {MAX_HEADER_BYTES} fit")
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: data + member["data_offsets"][0] for name, member in members.items()
    }


def write(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write whole arrays as one file.

    Raises:
        ValueError: if a type has no place in the format.
    """
    specs = {name: TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()}
    start, offsets = header(specs.values())
    with path.open("wb") as file:
        file.write(start)
        for name in sorted(offsets, key=lambda name: offsets[name]):
            file.write(np.ascontiguousarray(arrays[name]).data)


def map_file(path: Path) -> mmap.mmap:
    """Map a regular file for reading; links are refused, wherever they lead.

    Raises:
        ValueError: if there is no such file, it is empty, or it is no regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: not a regular file")
        if status.st_size == 0:
            raise ValueError(f"{path}: empty")
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(handle)


def parse(mapped: mmap.mmap, where: str) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a mapped file: read-only arrays that share its memory.

    Args:
        mapped: the whole file.
        where: the file, as errors name it.

    Raises:
        ValueError: if the header is not well formed, or the tensors do not fill the file exactly.
    """
    header_bytes = int.from_bytes(mapped[:8], "little")
    data = 8 + header_bytes
    if len(mapped) < 8 or header_bytes > MAX_HEADER_BYTES or data > len(mapped):
        raise ValueError(f"{where}: header of {header_bytes} bytes in a file of {len(mapped)} bytes")
    members = strict_json.loads(mapped[8:data], where)
    if not isinstance(members, dict):
        raise ValueError(f"{where}: header is not a JSON object")
    arrays = {}
    spans = []
    for name, member in members.items():
        shown = f"{where}: tensor {name[:80]!r}"
        if not isinstance(member, dict) or member.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{shown}: must have dtype, shape and data_offsets, and nothing else")
        code, shape, span = member["dtype"], member["shape"], member["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise ValueError(f"{shown}: unknown dtype {str(code)[:80]!r}")
        if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > 2**48:
            raise ValueError(f"{shown}: shape must be at most {MAX_DIMENSIONS} sizes that memory can address")
        if not _is_sizes(span) or len(span) != 2:
            raise ValueError(f"{shown}: data_offsets must be two whole numbers from 0 up")
        spec = TensorSpec(name, DTYPES[code], tuple(shape))
        begin, end = span
        if end - begin != spec.nbytes or data + end > len(mapped):
            raise ValueError(f"{shown}: data_offsets {begin} to {end} do not hold {code} {shape} within the file")
        spans.append((begin, end))
        arrays[name] = np.frombuffer(mapped, spec.dtype, math.prod(shape), data + begin).reshape(shape)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"{where}: tensors overlap or leave a gap at byte {position} of the data")
        position = end
    if data + position != len(mapped):
        raise ValueError(f"{where}: {len(mapped) - data - position} bytes after the last tensor")
    return arrays


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= 2**48 for item in value)
