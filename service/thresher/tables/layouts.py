"""How each layout of a table turns row ids into vectors, in plain NumPy: what the native core must give too.

Shapes: N rows, D columns, B bytes of a row's mask, P rows that keep anything, L ids of a lookup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from thresher.tables import values
from thresher.tables.format import (
    PADDING,
    Layout,
    mask_bytes,
    record_bytes,
    tensors,
    unpack_masks,
)
from thresher.tables.index import Index, index_of
from thresher.tables.values import BITS, Dtype, value_bytes

Arrays = Mapping[str, npt.NDArray[Any]]
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Rows that share one 64-bit start. Below 65: their other starts, less than 64 * 1,024, then fit into 16 bits.
BLOCK_ROWS = 64
# Values or rows looked at together when a table is checked: bounds the memory that this takes.
CHECK_ROWS = 1024 * BLOCK_ROWS


@dataclass(frozen=True)
class Shape:
    """What the manifest says of a table.

    Attributes:
        layout: of its file.
        dtype: of its values.
        rows: N.
        dim: D.
        kept: parameters that stay.
    """

    layout: Layout
    dtype: Dtype
    rows: int
    dim: int
    kept: int


@dataclass(frozen=True)
class Bags:
    """The ids of B samples in a table, and how their vectors are combined.

    Attributes:
        table: in which they are rows.
        ids_L: row ids, int64; -1 is none.
        offsets: `[B + 1]`, int64, rising from 0 to L: sample i has ids `offsets[i]` up to `offsets[i + 1]`. None: one
            id a sample.
        weights_L: that vectors are multiplied by, float32.
        mean: divide the sums by the number of ids.
    """

    table: Table
    ids_L: Ids
    offsets: Ids | None = None
    weights_L: Floats | None = None
    mean: bool = False

    @property
    def samples(self) -> int:
        """B."""
        return len(self.ids_L) if self.offsets is None else len(self.offsets) - 1


class Table(Protocol):
    """A table that is ready for lookups."""

    def lookup(self, ids_L: Ids) -> Floats:
        """Vectors `[L, D]` of rows that are within the table; of id -1, which is none, zeros."""


def table_of(arrays: Arrays, shape: Shape, where: str) -> Table:
    """The table that a file holds, checked.

    Raises:
        ValueError: names `where`, the tensor, and what it must be.
    """
    if shape.layout == "dense":
        return DenseTable(arrays, shape, where)
    if shape.layout == "bitmap":
        return BitmapTable(arrays, shape, where)
    return BucketedTable(arrays, shape, where)


class DenseTable:
    """Values `[N, D]`; a lookup is one gather.

    Raises:
        ValueError: if a value is not finite, or more than `kept` are not 0; names `where`.
    """

    def __init__(self, arrays: Arrays, shape: Shape, where: str) -> None:
        """Check a mapped table."""
        check_shapes(arrays, shape, where)
        self._shape = shape
        self._values_N = _rows_of_bytes(arrays["values"], value_bytes(shape.dtype, shape.dim))
        self._scales = _scales(arrays, where)
        nonzero = 0
        step = CHECK_ROWS // 8  # decoded, a row is up to 8 times as long
        for first in range(0, shape.rows, step):
            part = self._values_N[first : first + step]
            if not values.all_finite(part, shape.dtype):
                raise ValueError(f"{where}: values: a value near row {first} is not finite")
            nonzero += int(np.count_nonzero(values.decode(part, shape.dtype, shape.dim)))
        if nonzero > shape.kept:
            raise ValueError(f"{where}: values: {nonzero} are not 0, but the manifest says that {shape.kept} are kept")

    def lookup(self, ids_L: Ids) -> Floats:
        """Vectors `[L, D]` of rows that are within the table; of id -1, which is none, zeros."""
        out_LD = values.decode(self._values_N[ids_L], self._shape.dtype, self._shape.dim)
        if self._scales is not None:
            out_LD *= self._scales
        out_LD[ids_L < 0] = 0
        return out_LD


class BitmapTable:
    """A bit for every row that keeps anything, and of these the masks `[P, B]` and then the values, row by row.

    How many rows are present before a row, and where its values begin, is counted once, at load: 1/16 byte a row, and
    2.125 bytes a present row, for a 64-bit start of each 64 of them and a 16-bit distance from it. It is not stored: it
    would be as large as the masks at d = 16, and all must be read anyway, to hold one against the other.

    Raises:
        ValueError: if bits, masks and values do not fit together, or a value is not finite; names `where`.
    """

    def __init__(self, arrays: Arrays, shape: Shape, where: str) -> None:
        """Check a mapped table and count where its rows start."""
        check_shapes(arrays, shape, where)
        self._shape = shape
        self._scales = _scales(arrays, where)
        self._present = arrays["present"]
        words = np.bitwise_count(self._present.reshape(-1, 8)).sum(axis=1, dtype=np.int64)
        self._ranks = (np.cumsum(words) - words).astype(np.uint32)
        last = np.unpackbits(self._present[-8:], bitorder="little")
        if last[shape.rows % 64 or 64 :].any():
            raise ValueError(f"{where}: present: bits beyond row {shape.rows - 1} are set")
        present, width, records = int(words.sum()), mask_bytes(shape.dim), arrays["records"]
        if present * width + PADDING > len(records):
            raise ValueError(
                f"{where}: present: has {present} bits set, more masks than the {len(records)} bytes of records hold"
            )
        self._mask_PB = records[: present * width].reshape(present, width)
        self._values = records[present * width :]
        self._block_starts = np.empty(-(-present // BLOCK_ROWS), np.int64)
        self._distances_P = np.empty(present, np.uint16)
        # Starts count values; of int4, of which a row takes whole bytes, these.
        self._unit = 1 if shape.dtype == "int4" else BITS[shape.dtype] // 8
        kept = end = 0
        for first in range(0, present, CHECK_ROWS):
            chunk_PB = self._mask_PB[first : first + CHECK_ROWS]
            if shape.dim % 8 and (chunk_PB[:, -1] >> shape.dim % 8).any():
                raise ValueError(f"{where}: mask: bits beyond column {shape.dim - 1} are set")
            counts_P = np.bitwise_count(chunk_PB).sum(axis=1, dtype=np.int64)
            if not counts_P.all():
                raise ValueError(f"{where}: mask: a row that is present keeps nothing")
            units_P = (counts_P + 1) // 2 if shape.dtype == "int4" else counts_P
            starts_P = end + np.cumsum(units_P) - units_P
            blocks = starts_P[::BLOCK_ROWS]
            self._block_starts[first // BLOCK_ROWS :][: len(blocks)] = blocks
            self._distances_P[first : first + CHECK_ROWS] = starts_P - np.repeat(blocks, BLOCK_ROWS)[: len(starts_P)]
            kept += int(counts_P.sum())
            end += int(units_P.sum())
        size = len(self._values) - PADDING
        if kept != shape.kept or end * self._unit != size:
            raise ValueError(
                f"{where}: mask: has {kept} bits set for {size} bytes of values, and {shape.kept} in the manifest"
            )
        _check_values(self._values[:size], shape.dtype, where)
        _check_padding(records, where)

    def lookup(self, ids_L: Ids) -> Floats:
        """Vectors `[L, D]` of rows that are within the table; of id -1, which is none, zeros."""
        shape = self._shape
        out_LD = np.zeros((len(ids_L), shape.dim), np.float32)
        there_L = (ids_L >= 0) & (self._present[ids_L // 8] >> (ids_L % 8).astype(np.uint8) & 1).astype(np.bool_)
        ids = ids_L[there_L]
        words = self._present.reshape(-1, 8)[ids // 64]
        before = np.arange(64) < (ids % 64)[:, None]
        places = self._ranks[ids // 64] + (np.unpackbits(words, axis=1, bitorder="little") & before).sum(axis=1)
        mask_LD = unpack_masks(self._mask_PB[places], shape.dim)
        counts_L = mask_LD.sum(axis=1)
        starts_L = (self._block_starts[places // BLOCK_ROWS] + self._distances_P[places]) * self._unit
        found_LD = np.zeros(mask_LD.shape, np.float32)
        for kept in np.unique(counts_L).tolist():
            rows = np.flatnonzero(counts_L == kept)
            data = self._values[starts_L[rows, None] + np.arange(value_bytes(shape.dtype, kept))]
            columns = np.nonzero(mask_LD[rows])[1].reshape(-1, kept)
            found_LD[rows[:, None], columns] = values.decode(data, shape.dtype, kept)
        if self._scales is not None:
            found_LD *= self._scales
        out_LD[there_L] = found_LD
        return out_LD


@dataclass(frozen=True)
class _Bucket:
    """Rows that keep k columns: from `first` on, with a record each."""

    first: int
    index: Index
    records: Bytes  # [rows, bytes of a record]
    scales: Floats | None


class BucketedTable:
    """Rows in the order of the number of columns that they keep, k: of each k all records are as long.

    Raises:
        ValueError: if buckets do not fill the table, an index is malformed, or a value is not finite; names `where`.
    """

    def __init__(self, arrays: Arrays, shape: Shape, where: str) -> None:
        """Check a mapped table."""
        by_kept = check_shapes(arrays, shape, where)
        self._shape = shape
        self._buckets: list[_Bucket] = []
        scales, records = _scales(arrays, where), arrays["records"]
        first, begin = by_kept[0], 0
        for kept in range(1, shape.dim + 1):
            if not (count := by_kept[kept]):
                continue
            size = record_bytes(shape.dtype, shape.dim, kept)
            own = None if scales is None else scales[len(self._buckets)]
            cut = records[begin : begin + count * size].reshape(count, size)
            self._buckets.append(_Bucket(first, index_of(shape.dim, kept), cut, own))
            self._check(self._buckets[-1], where)
            first, begin = first + count, begin + count * size
        self._firsts = np.array([bucket.first for bucket in self._buckets] + [first], np.int64)
        _check_padding(records, where)

    def _check(self, bucket: _Bucket, where: str) -> None:
        for first in range(0, len(bucket.records), CHECK_ROWS):
            part = bucket.records[first : first + CHECK_ROWS]
            bucket.index.decode(part[:, : bucket.index.bytes], f"{where}: records: bucket of {bucket.index.kept}")
            _check_values(part[:, bucket.index.bytes :], self._shape.dtype, where)

    def lookup(self, ids_L: Ids) -> Floats:
        """Vectors `[L, D]` of rows that are within the table; of id -1, which is none, zeros."""
        out_LD = np.zeros((len(ids_L), self._shape.dim), np.float32)
        bucket_L = np.searchsorted(self._firsts, ids_L, side="right") - 1
        for number in np.unique(bucket_L[bucket_L >= 0]).tolist():
            places, bucket = np.flatnonzero(bucket_L == number), self._buckets[number]
            index, found = bucket.index, bucket.records[ids_L[places] - bucket.first]
            columns = index.decode(found[:, : index.bytes], "")
            parts = values.decode(found[:, index.bytes :], self._shape.dtype, index.kept)
            if bucket.scales is not None:
                parts *= bucket.scales[columns]
            out_LD[places[:, None], columns] = parts
        return out_LD


def pooled(bags: Bags) -> Floats:
    """Vectors `[B, D]` of bags."""
    return pool(bags.table.lookup(bags.ids_L), bags)


def pool(vectors_LD: Floats, bags: Bags) -> Floats:
    """Sum or mean of each bag, float32 `[B, D]`, of the vectors of its ids.

    Each bag is added up from its first id to its last, as a model does, so that the sum has the same bits;
    `np.add.reduceat` would add in another order. The loop is over positions in a bag, not over samples. Id -1, which is
    none, does not count in a mean.
    """
    if bags.weights_L is not None:
        vectors_LD = vectors_LD * bags.weights_L[:, None]
    if bags.offsets is None:
        return vectors_LD
    starts_B, lengths_B = bags.offsets[:-1], np.diff(bags.offsets)
    out_BD = np.zeros((len(lengths_B), vectors_LD.shape[1]), np.float32)
    there = np.flatnonzero(lengths_B)
    position = 0
    while len(there):
        out_BD[there] += vectors_LD[starts_B[there] + position]
        position += 1
        there = there[lengths_B[there] > position]
    if bags.mean:
        before = np.concatenate([[0], np.cumsum(bags.ids_L >= 0)])
        counts_B = before[bags.offsets[1:]] - before[bags.offsets[:-1]]
        out_BD /= np.maximum(counts_B, 1)[:, None].astype(np.float32)
    return out_BD


def check_shapes(arrays: Arrays, shape: Shape, where: str) -> list[int]:
    """Check names, types and sizes of a table's tensors.

    Returns:
        How many rows keep 0, 1, … D columns, where the layout says so; for others all as if they kept D.

    Raises:
        ValueError: if they are not what the layout has for such a table.
    """
    by_kept = [0] * shape.dim + [shape.rows]
    if shape.layout == "bucketed":
        counts = arrays.get("bucket_rows", _NONE)
        if counts.shape != (shape.dim + 1,) or counts.dtype != np.uint32:
            raise ValueError(f"{where}: bucket_rows: is {counts.dtype} {counts.shape}, must be {shape.dim + 1} uint32")
        by_kept = [int(count) for count in counts]
        if sum(by_kept) != shape.rows:
            raise ValueError(f"{where}: bucket_rows: are {sum(by_kept)} rows, the manifest says {shape.rows}")
        kept = sum(kept * count for kept, count in enumerate(by_kept))
        if kept != shape.kept:
            raise ValueError(f"{where}: bucket_rows: keep {kept} parameters, the manifest says {shape.kept}")
    expected = {spec.name: (spec.dtype, spec.shape) for spec in tensors(shape.layout, shape.dtype, shape.dim, by_kept)}
    found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    if shape.layout == "bitmap" and "records" in found and len(found["records"][1]) == 1:
        expected["records"] = (expected["records"][0], found["records"][1])  # known when the bits are counted
    if found != expected:
        raise ValueError(f"{where}: has tensors {found}, layout {shape.layout} must have {expected}")
    return by_kept


_NONE = np.empty(0, np.uint8)


def check_finite(array: npt.NDArray[Any], name: str, where: str) -> None:
    """Check a flat array in pieces.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    for first in range(0, len(array), CHECK_ROWS):
        if not np.isfinite(array[first : first + CHECK_ROWS]).all():
            raise ValueError(f"{where}: {name}: a value near position {first} is not finite")


def _scales(arrays: Arrays, where: str) -> Floats | None:
    if "scales" not in arrays:
        return None
    values.check_scales(arrays["scales"], where)
    return arrays["scales"]


def _check_values(data: Bytes, dtype: Dtype, where: str) -> None:
    step = CHECK_ROWS if data.ndim > 1 else CHECK_ROWS * BITS[dtype]  # whole values
    for first in range(0, len(data), step):
        if not values.all_finite(data[first : first + step], dtype):
            raise ValueError(f"{where}: values: a value near position {first} is not finite")


def _check_padding(records: Bytes, where: str) -> None:
    if records[-PADDING:].any():
        raise ValueError(f"{where}: records: must end with {PADDING} bytes of 0")


def _rows_of_bytes(array: npt.NDArray[Any], size: int) -> Bytes:
    """A mapped array [N, …] as bytes [N, size], without a copy."""
    return array.reshape(-1).view(np.uint8).reshape(-1, size)
