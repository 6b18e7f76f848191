"""Format 1 of the compact tables: names, limits, the two layouts and their exact bytes.

`docs/table_format.md` describes it byte by byte. Shapes: N rows of a table, D columns, B = ceil(D / 8) bytes of a
row's mask, K kept values of the table.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.tables.safetensors_file import TensorSpec, header

FORMAT = 1
MAX_DIM = 1024
MAX_ROWS = 2**31 - 1
MAX_PARTITIONS = 16
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")

Layout = Literal["dense", "bitmap"]
Dtype = Literal["fp32", "fp16"]
DTYPES: dict[Dtype, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}

MANIFEST = "manifest.json"
DENSE = "dense.safetensors"
ONNX = "dense.onnx"


def table_path(name: str) -> str:
    """Path of a table's file inside the folder."""
    return f"tables/{name}.safetensors"


def vocabulary_path(field: str) -> str:
    """Path of a field's vocabulary inside the folder."""
    return f"vocabulary/{field}.safetensors"


def mask_bytes(dim: int) -> int:
    """Bytes of one row's mask."""
    return (dim + 7) // 8


def pack_masks(mask_ND: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Masks as bits `[N, B]`: bit j % 8, counted from the lowest, of byte j // 8 is column j."""
    return np.packbits(mask_ND, axis=1, bitorder="little")


def unpack_masks(mask_NB: npt.NDArray[np.uint8], dim: int) -> npt.NDArray[np.bool_]:
    """Masks as booleans `[N, D]`."""
    return np.unpackbits(mask_NB, axis=1, count=dim, bitorder="little").view(np.bool_)


def tensors(layout: Layout, dtype: Dtype, rows: int, dim: int, kept: int) -> list[TensorSpec]:
    """The tensors of a table's file."""
    if layout == "dense":
        return [TensorSpec("values", DTYPES[dtype], (rows, dim))]
    return [
        TensorSpec("values", DTYPES[dtype], (kept,)),
        TensorSpec("mask", np.dtype("u1"), (rows, mask_bytes(dim))),
    ]


def table_file_bytes(layout: Layout, dtype: Dtype, rows: int, dim: int, kept: int) -> int:
    """Exact size of a table's file in bytes."""
    specs = tensors(layout, dtype, rows, dim, kept)
    return len(header(specs)[0]) + sum(spec.nbytes for spec in specs)


def smallest_layout(dtype: Dtype, rows: int, dim: int, kept: int) -> Layout:
    """The layout with the smaller file; `dense` where they are equal, because its lookup is one gather."""
    dense = table_file_bytes("dense", dtype, rows, dim, kept)
    return "dense" if dense <= table_file_bytes("bitmap", dtype, rows, dim, kept) else "bitmap"
