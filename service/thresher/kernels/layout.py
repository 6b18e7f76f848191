"""How the tables of a group lie in its flat tensors, and the enumerations that the operators take.

Shapes, here and in all backends: N rows and D columns of a table, F features, B samples, L ids in a batch, U different
rows in a batch, K partitions of a composed table.

A group of tables lies in one flat tensor, table after table, row after row; so do thresholds, masks and optimizer
states. *Compact* storage holds only the entries that a mask keeps, in the same order. Where a row's entries begin is
the start of its block of 8 rows plus the set bits of the rows before it in the block: 1 byte a row instead of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

BLOCK_ROWS = 8  # rows that share a start in compact storage
MASK_PADDING = 8  # bytes after the last mask, so that a backend may read whole words


class Shared(IntEnum):
    """Which entries of one table share a threshold; `NONE` is a table without thresholds."""

    NONE = 0
    TABLE = 1
    COLUMN = 2
    ROW = 3
    ELEMENT = 4


class Combine(IntEnum):
    """How the rows that the partitions of a composed table give for one id become its vector."""

    ADD = 0
    MULT = 1
    CONCAT = 2


class Optimizer(IntEnum):
    """Update rules of the fused backward."""

    SGD = 0
    ROWWISE_ADAGRAD = 1
    ADAGRAD = 2
    ADAM = 3


# Flat tensors of state an update rule keeps for each tensor it updates, and whether each holds one value a row.
STATES: dict[Optimizer, tuple[tuple[str, bool], ...]] = {
    Optimizer.SGD: (),
    Optimizer.ROWWISE_ADAGRAD: (("sum", True),),
    Optimizer.ADAGRAD: (("sum", False),),
    Optimizer.ADAM: (("exp_avg", False), ("exp_avg_sq", False)),
}
BETA1, BETA2 = 0.9, 0.999


@dataclass(frozen=True)
class Table:
    """One table of a group, and where its part of each flat tensor begins."""

    rows: int
    dim: int
    number: int
    first_element: int
    first_row: int
    first_column: int
    first_mask_byte: int
    first_start: int

    @property
    def mask_bytes(self) -> int:
        """Bytes of one row's mask."""
        return -(-self.dim // 8)

    @property
    def starts(self) -> int:
        """Entries of `starts`: one a block, and the end of the last."""
        return -(-self.rows // BLOCK_ROWS) + 1


def tables_of(rows: Sequence[int], dims: Sequence[int]) -> list[Table]:
    """The tables of a group in the order in which they lie in its flat tensors."""
    tables, element, row, column, byte, start = [], 0, 0, 0, 0, 0
    for number, (n, d) in enumerate(zip(rows, dims, strict=True)):
        table = Table(n, d, number, element, row, column, byte, start)
        tables.append(table)
        element, row, column = element + n * d, row + n, column + d
        byte, start = byte + n * table.mask_bytes, start + table.starts
    return tables


def elements(flat: Tensor, table: Table) -> Tensor:
    """View of a flat tensor with one value an entry as the table's [N, D]."""
    return flat.narrow(0, table.first_element, table.rows * table.dim).view(table.rows, table.dim)


def per_row(flat: Tensor, table: Table) -> Tensor:
    """View of a flat tensor with one value a row as the table's [N, 1]."""
    return flat.narrow(0, table.first_row, table.rows).view(table.rows, 1)


def thresholds_of(flat: Tensor, table: Table, shared: Shared) -> Tensor:
    """The table's part of the flat thresholds: [1, 1], [1, D], [N, 1] or [N, D]."""
    if shared == Shared.TABLE:
        return flat[table.number].view(1, 1)
    if shared == Shared.COLUMN:
        return flat.narrow(0, table.first_column, table.dim).view(1, table.dim)
    return per_row(flat, table) if shared == Shared.ROW else elements(flat, table)


def masks_of(mask: Tensor, table: Table) -> Tensor:
    """The table's part of the flat masks, uint8 [N, ⌈D/8⌉]; bit j mod 8 of byte j div 8 says whether column j stays."""
    return mask.narrow(0, table.first_mask_byte, table.rows * table.mask_bytes).view(table.rows, table.mask_bytes)


def kept_of(flat: Tensor, starts: Tensor, table: Table) -> Tensor:
    """The table's part of a compact flat tensor, the kept entries row after row."""
    own = starts[table.first_start : table.first_start + table.starts]
    return flat[int(own[0]) : int(own[-1])]


def unpack_masks(packed_NK: Tensor, dim: int) -> Tensor:
    """Packed masks as bool [N, D]."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed_NK.device)
    return (packed_NK.unsqueeze(2) >> bits & 1).bool().flatten(1)[:, :dim]


def starts_of(packed_NK: Tensor, dim: int, first: int) -> Tensor:
    """Where each block of a table's rows begins in compact storage, and where the last ends, int64.

    Args:
        packed_NK: the table's packed masks.
        dim: columns of the table.
        first: entries that the tables before it keep.
    """
    rows = packed_NK.shape[0]
    blocks = -(-rows // BLOCK_ROWS)
    starts = torch.zeros(blocks + 1, dtype=torch.int64, device=packed_NK.device)
    chunk = 1 << 13  # blocks unpacked at a time
    for block in range(0, blocks, chunk):
        kept_N = unpack_masks(packed_NK[block * BLOCK_ROWS : (block + chunk) * BLOCK_ROWS], dim).sum(1)
        kept_N = torch.nn.functional.pad(kept_N, (0, -kept_N.numel() % BLOCK_ROWS))
        part = kept_N.view(-1, BLOCK_ROWS).sum(1)
        starts[block + 1 : block + 1 + part.numel()] = part
    return starts.cumsum(0) + first


def partitions_of(partitions: Sequence[int], tables: int) -> list[list[tuple[int, int]]]:
    """The partitions of each table: partition j takes id x to bucket (x div a_j) mod m_j.

    Args:
        partitions: table after table, the number of its partitions, then a_j and m_j of each; empty for plain tables.
        tables: how many there are.
    """
    if not partitions:
        return [[] for _ in range(tables)]
    found, values = [], iter(partitions)
    for _ in range(tables):
        found.append([(next(values), next(values)) for _ in range(next(values))])
    return found


def stacked_rows(ids_L: Tensor, split: Sequence[tuple[int, int]]) -> Tensor:
    """Rows of the stacked partitions [L, K] for each id; for a plain table the ids themselves, K = 1."""
    if not split:
        return ids_L.unsqueeze(1)
    first, rows = 0, []
    for divisor, modulus in split:
        rows.append(first + ids_L // divisor % modulus)
        first += modulus
    return torch.stack(rows, dim=1)


def output_dims(dims: Sequence[int], partitions: Sequence[int], combine: int) -> list[int]:
    """Columns of each table's vectors: those of its rows, or of all partitions' rows side by side."""
    if combine != Combine.CONCAT:
        return list(dims)
    return [dim * max(1, len(own)) for dim, own in zip(dims, partitions_of(partitions, len(dims)), strict=True)]
