"""Format 2 of the compact tables: names, limits, the layouts and their exact bytes.

`docs/table_format.md` describes it byte by byte. Shapes: N rows of a table, D columns, B = ceil(D / 8) bytes of a
row's mask, P rows that keep anything, R bytes of records.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from thresher.tables.index import index_of
from thresher.tables.safetensors_file import TensorSpec, header
from thresher.tables.values import LIMITS, STORED, Dtype, value_bytes

FORMAT = 2
MAX_DIM = 1024
MAX_ROWS = 2**31 - 1
MAX_PARTITIONS = 16
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
# Zeros after the last record: a lookup reads 64 bytes at once, wherever in a record it begins.
PADDING = 64

Layout = Literal["dense", "bitmap", "bucketed"]
LAYOUTS: tuple[Layout, ...] = ("dense", "bucketed", "bitmap")  # of equally small ones the first is taken: it is faster

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


def rows_by_kept(mask_NB: npt.NDArray[np.uint8], dim: int) -> list[int]:
    """How many rows keep 0, 1, … D columns, `[D + 1]`, of packed masks."""
    counts_N = np.bitwise_count(mask_NB).sum(axis=1, dtype=np.int64)
    return [int(count) for count in np.bincount(counts_N, minlength=dim + 1)]


def present_bytes(rows: int) -> int:
    """Bytes of a bitmap's presence bits: whole words of 64 rows."""
    return -(-rows // 64) * 8


def record_bytes(dtype: Dtype, dim: int, kept: int) -> int:
    """Bytes of a bucketed table's record of a row that keeps so many columns."""
    return index_of(dim, kept).bytes + value_bytes(dtype, kept)


def tensors(layout: Layout, dtype: Dtype, dim: int, by_kept: Sequence[int]) -> list[TensorSpec]:
    """The tensors of a table's file, of which `by_kept[k]` rows keep k columns."""
    rows = sum(by_kept)
    scales: tuple[int, ...] = (dim,)
    if layout == "dense":
        columns = value_bytes(dtype, dim) // STORED[dtype].itemsize
        found = [TensorSpec("values", STORED[dtype], (rows, columns))]
    elif layout == "bitmap":
        each = [mask_bytes(dim) + value_bytes(dtype, kept) for kept in range(1, dim + 1)]
        size = sum(count * size for count, size in zip(by_kept[1:], each, strict=True))
        found = [
            TensorSpec("records", np.dtype("u1"), (size + PADDING,)),
            TensorSpec("present", np.dtype("u1"), (present_bytes(rows),)),
        ]
    else:
        scales = (sum(count > 0 for count in by_kept[1:]), dim)
        size = sum(count * record_bytes(dtype, dim, kept) for kept, count in enumerate(by_kept) if count)
        found = [
            TensorSpec("bucket_rows", np.dtype("<u4"), (dim + 1,)),
            TensorSpec("records", np.dtype("u1"), (size + PADDING,)),
        ]
    return found + [TensorSpec("scales", np.dtype("<f4"), scales)] * (dtype in LIMITS)


def table_file_bytes(layout: Layout, dtype: Dtype, dim: int, by_kept: Sequence[int]) -> int:
    """Exact size of a table's file in bytes."""
    specs = tensors(layout, dtype, dim, by_kept)
    return len(header(specs)[0]) + sum(spec.nbytes for spec in specs)


def choose_layout(
    wanted: Layout | Literal["auto"], dtype: Dtype, dim: int, by_kept: Sequence[int], renumber: bool
) -> Layout:
    """The layout that is wanted, or the one with the smallest file.

    Args:
        wanted: a layout, or `auto`.
        dtype: of the values.
        dim: D.
        by_kept: how many rows keep 0, 1, … D columns.
        renumber: whether rows may get other numbers.

    Raises:
        ValueError: if `bucketed` is wanted, and rows must keep their numbers.
    """
    if wanted == "bucketed" and not renumber:
        raise ValueError(
            "layout bucketed renumbers rows, which only rows of vocabularies may be: ids that are hashed, shared or "
            "given as they are stay; take layout auto or bitmap"
        )
    if wanted != "auto":
        return wanted
    allowed = [layout for layout in LAYOUTS if renumber or layout != "bucketed"]
    return min(allowed, key=lambda layout: table_file_bytes(layout, dtype, dim, by_kept))
