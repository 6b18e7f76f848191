"""What all kernels share: which row an id means, where its entries lie, what they are worth after mask and threshold.

Shapes: P rows at a time, D columns of the widest table, M bytes of 7 rows' masks, both rounded up to powers of two; P1
is [P, 1], 1D is [1, D]. Nothing has one axis only: Triton 3.7 fails to compile some loops that add an axis to what they
load, and would move it between layouts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.kernels.layout import BLOCK_ROWS, Combine, Shared
from thresher.kernels.triton.metadata import TABLE_FIELDS

# Fields of a table in `Metadata.tables`.
_FIELDS: tl.constexpr = tl.constexpr(len(TABLE_FIELDS))
_FIRST_ELEMENT: tl.constexpr = tl.constexpr(TABLE_FIELDS.index("first_element"))
FIRST_ROW: tl.constexpr = tl.constexpr(TABLE_FIELDS.index("first_row"))
_DIM: tl.constexpr = tl.constexpr(TABLE_FIELDS.index("dim"))
FIRST_COLUMN: tl.constexpr = tl.constexpr(TABLE_FIELDS.index("first_column"))
_FIRST_MASK_BYTE: tl.constexpr = tl.constexpr(TABLE_FIELDS.index("first_mask_byte"))
_FIRST_START: tl.constexpr = tl.constexpr(TABLE_FIELDS.index("first_start"))

MULT: tl.constexpr = tl.constexpr(int(Combine.MULT))
CONCAT: tl.constexpr = tl.constexpr(int(Combine.CONCAT))

NONE: tl.constexpr = tl.constexpr(int(Shared.NONE))
TABLE: tl.constexpr = tl.constexpr(int(Shared.TABLE))
COLUMN: tl.constexpr = tl.constexpr(int(Shared.COLUMN))
ROW: tl.constexpr = tl.constexpr(int(Shared.ROW))

_BLOCK_ROWS: tl.constexpr = tl.constexpr(BLOCK_ROWS)


@triton.jit
def field(tables, table, FIELD: tl.constexpr):
    """A field of a table, or of one table for each lane."""
    return tl.load(tables + table * _FIELDS + FIELD)


@triton.jit
def dim_of(tables, table, ALIGN: tl.constexpr):
    """Columns of a table; knowing what divides them, the compiler moves up to 16 bytes at a time.

    The hint is lost on what a function gives back, so the load itself must carry it.
    """
    return tl.multiple_of(tl.load(tables + table * _FIELDS + _DIM), ALIGN)


@triton.jit
def parts_of(partitions, table, PARTS: tl.constexpr):
    """Partitions of a table, at most PARTS; a plain one among composed ones has one."""
    return tl.load(partitions + table * (PARTS * 3 + 1))


@triton.jit
def physical_rows(ids_P1, part, partitions, table, PARTS: tl.constexpr):
    """Row of each id's bucket in one partition; for plain tables (PARTS = 0) the id itself."""
    rows_P1 = ids_P1
    if PARTS > 0:
        partition = partitions + table * (PARTS * 3 + 1) + 1 + part * 3
        rows_P1 = tl.load(partition + 2) + ids_P1 // tl.load(partition) % tl.load(partition + 1)
    return rows_P1


@triton.jit
def _full_places(rows_P1, columns_1D, tables, table, ALIGN: tl.constexpr):
    first = tl.multiple_of(tl.load(tables + table * _FIELDS + _FIRST_ELEMENT), ALIGN)
    return first + rows_P1 * dim_of(tables, table, ALIGN) + columns_1D


@triton.jit
def _set_bits(bytes_):
    bytes_ -= (bytes_ >> 1) & 0x55
    bytes_ = (bytes_ & 0x33) + ((bytes_ >> 2) & 0x33)
    return (bytes_ + (bytes_ >> 4)) & 0x0F


@triton.jit
def places(
    rows_P1, there_P1, columns_1D, mask, starts, tables, table,
    ALIGN: tl.constexpr, MASK_BLOCK: tl.constexpr,
):  # fmt: skip
    """Which entries of the rows are stored, and where each of them lies in a flat tensor; both [P, D].

    MASK_BLOCK = 0 is full storage, all entries of each row.
    """
    dim = dim_of(tables, table, ALIGN)
    stored_PD = there_P1 & (columns_1D < dim)
    if MASK_BLOCK == 0:
        places_PD = _full_places(rows_P1, columns_1D, tables, table, ALIGN)
    else:
        row_bytes = (dim + 7) // 8
        first_byte = field(tables, table, _FIRST_MASK_BYTE)
        own_PD = first_byte + rows_P1 * row_bytes + columns_1D // 8
        own_PD = tl.load(mask + own_PD, mask=stored_PD, other=0).to(tl.int32)
        kept_PD = (own_PD >> (columns_1D % 8)) & 1
        # The rows before this one in its block: their masks lie in one piece, at most 7 rows long.
        blocks_P1 = rows_P1 // _BLOCK_ROWS
        bytes_1M = tl.arange(0, MASK_BLOCK)[None, :]
        earlier_PM = there_P1 & (bytes_1M < rows_P1 % _BLOCK_ROWS * row_bytes)
        bytes_PM = first_byte + blocks_P1 * (_BLOCK_ROWS * row_bytes) + bytes_1M
        bytes_PM = tl.load(mask + bytes_PM, mask=earlier_PM, other=0).to(tl.int32)
        before_P1 = tl.load(starts + field(tables, table, _FIRST_START) + blocks_P1, mask=there_P1, other=0)
        before_P1 += tl.sum(_set_bits(bytes_PM), axis=1, keep_dims=True)
        stored_PD = kept_PD != 0
        places_PD = before_P1 + (tl.cumsum(kept_PD, axis=1) - kept_PD)
    return stored_PD, places_PD


@triton.jit
def read(flat, places_PD, stored_PD):
    """Entries in float32, 0 where nothing is stored."""
    return tl.load(flat + places_PD, mask=stored_PD, other=0.0).to(tl.float32)


@triton.jit
def threshold_places(rows_P1, there_P1, columns_1D, tables, table, ALIGN: tl.constexpr, SHARED: tl.constexpr):
    """Whether the rows have thresholds, and where in the flat tensor: both [1, 1], [1, D], [P, 1] or [P, D]."""
    within_1D = columns_1D < dim_of(tables, table, ALIGN)
    if SHARED == TABLE:
        places_ = tl.zeros([1, 1], dtype=tl.int64) + table
        there = places_ >= 0
    elif SHARED == COLUMN:
        places_ = field(tables, table, FIRST_COLUMN) + columns_1D
        there = within_1D
    elif SHARED == ROW:
        places_ = field(tables, table, FIRST_ROW) + rows_P1
        there = there_P1
    else:
        places_ = _full_places(rows_P1, columns_1D, tables, table, ALIGN)
        there = there_P1 & within_1D
    return there, places_


@triton.jit
def vectors(
    rows_P1, there_P1, columns_1D, weights, thresholds, pressure, mask, starts, tables, table,
    SHARED: tl.constexpr, ALIGN: tl.constexpr, MASK_BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows after mask and threshold, `v − clamp(v, −g, g)`: [P, D] in float32."""
    stored_PD, places_PD = places(rows_P1, there_P1, columns_1D, mask, starts, tables, table, ALIGN, MASK_BLOCK)
    values_PD = read(weights, places_PD, stored_PD)
    if SHARED != NONE:
        there, places_ = threshold_places(rows_P1, there_P1, columns_1D, tables, table, ALIGN, SHARED)
        g = tl.sigmoid(read(thresholds, places_, there) + pressure)
        values_PD -= tl.minimum(tl.maximum(values_PD, -g), g)
    return values_PD


@triton.jit
def combined(
    ids_P1, there_P1, part, columns_1D, weights, thresholds, pressure, mask, starts, tables, table, partitions,
    PARTS: tl.constexpr, COMBINE: tl.constexpr, SHARED: tl.constexpr, ALIGN: tl.constexpr, MASK_BLOCK: tl.constexpr,
):  # fmt: skip
    """One vector for each id, [P, D]: of partition `part` for CONCAT and plain tables, else of all."""
    rows_P1 = physical_rows(ids_P1, part, partitions, table, PARTS)
    result_PD = vectors(
        rows_P1, there_P1, columns_1D, weights, thresholds, pressure, mask, starts, tables, table,
        SHARED, ALIGN, MASK_BLOCK,
    )  # fmt: skip
    if COMBINE != CONCAT and PARTS > 1:
        parts = parts_of(partitions, table, PARTS)
        for other in tl.static_range(1, PARTS):
            rows_P1 = physical_rows(ids_P1, other, partitions, table, PARTS)
            vectors_PD = vectors(
                rows_P1, there_P1 & (other < parts), columns_1D, weights, thresholds, pressure, mask, starts, tables,
                table, SHARED, ALIGN, MASK_BLOCK,
            )  # fmt: skip
            if COMBINE == MULT:
                result_PD *= tl.where(other < parts, vectors_PD, 1.0)
            else:
                result_PD += vectors_PD
    return result_PD
