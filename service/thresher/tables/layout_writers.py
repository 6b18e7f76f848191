"""How each layout takes rows, chunk by chunk, and says where in the file their bytes go.

Since the number of rows that keep each number of columns is known before the first row, every row's place is known when
it comes: nothing is held but chunks, and a bit or a number a row.

Shapes: n rows of a chunk, D columns, k kept columns of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from thresher.tables import values
from thresher.tables.format import Layout, mask_bytes, pack_masks, present_bytes, record_bytes
from thresher.tables.index import index_of
from thresher.tables.values import Dtype, value_bytes

Floats = npt.NDArray[np.float32]
Masks = npt.NDArray[np.bool_]
Pieces = Iterator[tuple[int, bytes]]


class LayoutWriter(Protocol):
    """Turns chunks of rows into bytes and their positions in the file."""

    def put(self, values_nD: Floats, mask_nD: Masks, scales: Floats | None) -> Pieces:
        """Bytes of the next rows; `scales` `[S, D]` are those of `numbers`."""

    def end(self) -> Pieces:
        """Bytes that are known after the last row."""

    def numbers(self, mask_nD: Masks) -> npt.NDArray[np.int64]:
        """Which of the S rows of scales the entries of each row `[n]` have."""


def layout_writer(
    layout: Layout, dtype: Dtype, dim: int, by_kept: Sequence[int], offsets: dict[str, int]
) -> LayoutWriter:
    """The writer of a layout.

    Args:
        layout: of the file.
        dtype: of the values.
        dim: D.
        by_kept: how many rows keep 0, 1, … D columns.
        offsets: where in the file each tensor begins.
    """
    if layout == "dense":
        return _Dense(dtype, offsets)
    if layout == "bitmap":
        return _Bitmap(dtype, dim, by_kept, offsets)
    return _Bucketed(dtype, dim, by_kept, offsets)


class _ScaleOfColumns:
    """Of layouts that have one scale a column."""

    def numbers(self, mask_nD: Masks) -> npt.NDArray[np.int64]:
        return np.zeros(len(mask_nD), np.int64)


class _Dense(_ScaleOfColumns):
    def __init__(self, dtype: Dtype, offsets: dict[str, int]) -> None:
        self._dtype = dtype
        self._position = offsets["values"]

    def put(self, values_nD: Floats, mask_nD: Masks, scales: Floats | None) -> Pieces:
        data = values.encode(np.where(mask_nD, values_nD, np.float32(0)), self._dtype, scales)
        yield self._position, data.tobytes()
        self._position += data.size

    def end(self) -> Pieces:
        yield from ()


class _Bitmap(_ScaleOfColumns):
    def __init__(self, dtype: Dtype, dim: int, by_kept: Sequence[int], offsets: dict[str, int]) -> None:
        self._dtype = dtype
        self._present = np.zeros(present_bytes(sum(by_kept)) * 8, np.bool_)
        self._present_position = offsets["present"]
        self._rows = 0
        self._mask_position = offsets["records"]
        self._value_position = offsets["records"] + sum(by_kept[1:]) * mask_bytes(dim)

    def put(self, values_nD: Floats, mask_nD: Masks, scales: Floats | None) -> Pieces:
        counts_n = mask_nD.sum(axis=1)
        self._present[self._rows : self._rows + len(mask_nD)] = counts_n > 0
        self._rows += len(mask_nD)
        masks = pack_masks(mask_nD[counts_n > 0])
        yield self._mask_position, masks.tobytes()
        self._mask_position += masks.size
        if self._dtype == "int4":  # a row takes whole bytes
            data = np.zeros((len(mask_nD), value_bytes("int4", mask_nD.shape[1])), np.uint8)
            for kept in np.unique(counts_n[counts_n > 0]).tolist():
                rows = np.flatnonzero(counts_n == kept)
                packed = values.encode(*_kept_of(values_nD, mask_nD, rows, kept, self._dtype, scales))
                data[rows, : packed.shape[1]] = packed
            flat = data[np.arange(data.shape[1]) < value_bytes("int4", 1) * ((counts_n + 1) // 2)[:, None]]
        else:
            own = None if scales is None else np.broadcast_to(scales, mask_nD.shape)[mask_nD][None]
            flat = values.encode(values_nD[mask_nD][None], self._dtype, own).reshape(-1)
        yield self._value_position, flat.tobytes()
        self._value_position += flat.size

    def end(self) -> Pieces:
        yield self._present_position, np.packbits(self._present, bitorder="little").tobytes()


class _Bucketed:
    def __init__(self, dtype: Dtype, dim: int, by_kept: Sequence[int], offsets: dict[str, int]) -> None:
        self._dtype = dtype
        self._dim = dim
        self._counts = np.array(by_kept, "<u4")
        self._counts_position = offsets["bucket_rows"]
        sizes = [record_bytes(dtype, dim, kept) if count else 0 for kept, count in enumerate(by_kept)]
        self._positions = offsets["records"] + np.cumsum([0, *np.multiply(sizes, by_kept, dtype=np.int64)])[:-1]
        there = self._counts > 0
        there[0] = False
        self._number: npt.NDArray[np.int64] = np.cumsum(there) - there  # of a bucket's scales, by kept columns

    def put(self, values_nD: Floats, mask_nD: Masks, scales: Floats | None) -> Pieces:
        counts_n = mask_nD.sum(axis=1)
        for kept in np.unique(counts_n[counts_n > 0]).tolist():
            rows = np.flatnonzero(counts_n == kept)
            own = None if scales is None else scales[self._number[kept]]
            index = index_of(self._dim, kept).encode(mask_nD[rows])
            stored = values.encode(*_kept_of(values_nD, mask_nD, rows, kept, self._dtype, own))
            data = np.concatenate([index, stored], axis=1)
            yield int(self._positions[kept]), data.tobytes()
            self._positions[kept] += data.size

    def end(self) -> Pieces:
        yield self._counts_position, self._counts.tobytes()

    def numbers(self, mask_nD: Masks) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = self._number[mask_nD.sum(axis=1)]
        return found


def _kept_of(
    values_nD: Floats, mask_nD: Masks, rows: npt.NDArray[np.intp], kept: int, dtype: Dtype, scales: Floats | None
) -> tuple[Floats, Dtype, Floats | None]:
    """What `values.encode` takes, for rows that keep as many columns."""
    mask = mask_nD[rows]
    found = values_nD[rows][mask].reshape(-1, kept)
    own = None if scales is None else np.broadcast_to(scales, mask.shape)[mask].reshape(-1, kept)
    return found, dtype, own
