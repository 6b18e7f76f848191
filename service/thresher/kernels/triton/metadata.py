"""What the kernels must know of a group of tables, as tensors on the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.kernels.layout import BLOCK_ROWS, output_dims, partitions_of, tables_of

TABLE_FIELDS = ("first_element", "first_row", "dim", "first_column", "first_mask_byte", "first_start")

_NARROW_KEYS = 2**31 - 1  # up to here keys have 32 bits, which halves the time to sort them


@dataclass(frozen=True)
class Metadata:
    """A group of tables; all tensors but `bounds` are int64.

    Attributes:
        tables: [tables, 6], `TABLE_FIELDS` of each table.
        features: [F, 2], of each feature the number of its table and its first output column.
        partitions: [tables, 1 + 3 K], how many partitions a table has, then divisor, modulus and first row of each.
        bounds: [tables + 1], the keys at which the tables begin, and the end of the last; the key of a row is its
            number in the whole group.
        parts: K, or 0 if no table is composed; `partitions` is empty then.
        width: output columns.
        align: what divides the columns of all tables, at most 16.
        block_d: a power of two that holds a row's columns.
        mask_block: a power of two that holds the bytes of 7 rows' masks.
    """

    tables: Tensor
    features: Tensor
    partitions: Tensor
    bounds: Tensor
    parts: int
    width: int
    align: int
    block_d: int
    mask_block: int

    @classmethod
    def of(
        cls,
        rows: Sequence[int],
        dims: Sequence[int],
        feature_tables: Sequence[int],
        partitions: Sequence[int],
        combine: int,
        device: torch.device,
    ) -> Metadata:
        """Build it, or give what was built for the same lists: only the first step copies anything to the device."""
        return _metadata(tuple(rows), tuple(dims), tuple(feature_tables), tuple(partitions), combine, device)

    def block_rows(self, tile: int) -> int:
        """Rows in a tile of so many entries; two at least, since Triton 3.7 fails on hints about [1, 1] tensors."""
        return max(2, tile // self.block_d)


@functools.lru_cache
def _metadata(
    rows: tuple[int, ...],
    dims: tuple[int, ...],
    feature_tables: tuple[int, ...],
    partitions: tuple[int, ...],
    combine: int,
    device: torch.device,
) -> Metadata:
    splits = partitions_of(partitions, len(rows))
    parts = max(map(len, splits), default=0)
    tables, lists, bounds = tables_of(rows, dims), [], [0]
    for table, split in zip(tables, splits, strict=True):
        own = split or [(1, table.rows)]  # a plain table among composed ones: one partition takes each id to itself
        first, numbers = 0, [len(own)]
        for divisor, modulus in own:
            numbers += [divisor, modulus, first]
            first += modulus
        lists.append(numbers + [1, 1, 0] * (parts - len(own)))
        bounds.append(table.first_row + table.rows)
    wide = output_dims(dims, partitions, combine)
    columns = [0]
    for table_number in feature_tables:
        columns.append(columns[-1] + wide[table_number])
    widest = max(dims)
    return Metadata(
        tables=torch.tensor(
            [[getattr(table, name) for name in TABLE_FIELDS] for table in tables], dtype=torch.int64, device=device
        ),
        features=torch.tensor(list(zip(feature_tables, columns, strict=False)), dtype=torch.int64, device=device),
        partitions=torch.tensor(lists if parts else [], dtype=torch.int64, device=device),
        # The key after the last row's is for pairs that are none.
        bounds=torch.tensor(bounds, dtype=torch.int32 if bounds[-1] <= _NARROW_KEYS else torch.int64, device=device),
        parts=parts,
        width=columns[-1],
        align=next(align for align in (16, 8, 4, 2, 1) if all(dim % align == 0 for dim in dims)),
        block_d=max(8, _power_of_two(widest)),
        mask_block=_power_of_two((BLOCK_ROWS - 1) * -(-widest // 8)),
    )


def _power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()
