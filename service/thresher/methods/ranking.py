"""The k highest-ranked entries of sharded tables, exactly.

The budget is met to the parameter whatever the number of ranks and the sharding: the k-th largest key is found by
a radix select over histograms that are summed over the ranks, and equal keys are taken in the order of table, row
and column (where columns are split: of table, block of rows, block of columns, row and column). Keys are made a chunk
at a time, so nothing as large as a table is held beside the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_HALF = 16
_BINS = 1 << _HALF
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class RankedShard:
    """A rank's rows of one table and the keys of their entries.

    Attributes:
        table: place of the table among all tables.
        first_row: row of the whole table at which the shard begins.
        first_column: column of the whole table at which the shard begins.
        rows: rows of the shard.
        keys: float32 keys [r, D] of the rows from one to before another; −inf ranks last, NaN is not allowed.
    """

    table: int
    first_row: int
    first_column: int
    rows: int
    keys: Callable[[int, int], Tensor]


def select_largest(shards: Sequence[RankedShard], k: int) -> list[Tensor]:
    """Which entries are among the k with the largest keys over all ranks.

    Args:
        shards: this rank's; every rank calls it with its own, in any order.
        k: entries to select over all ranks, at least 1.

    Returns:
        A bool mask [rows, D] for each shard; over all ranks exactly k entries are set.

    Raises:
        ValueError: if there are fewer than k entries.
    """
    high, above, total = _bin_of_kth(shards, k, lambda code: code >> _HALF, None)
    if k > total:
        raise ValueError(f"{k} entries are to stay, but the tables have {total}")
    low, above_in_bin, _ = _bin_of_kth(shards, k - above, lambda code: code & (_BINS - 1), high)
    kth = (high << _HALF) | low
    take_equal = k - above - above_in_bin
    equal = [sum(int((code == kth).sum()) for code in _codes(shard)) for shard in shards]
    before = _equal_before(shards, equal)
    masks = []
    for shard, skip in zip(shards, before, strict=True):
        allowed = take_equal - skip
        parts = []
        for code in _codes(shard):
            is_equal = code == kth
            taken = is_equal.flatten().cumsum(0).view_as(code) <= allowed
            parts.append((code > kth) | (is_equal & taken))
            allowed -= int(is_equal.sum())
        masks.append(torch.cat(parts))
    return masks


def _ordered(keys: Tensor) -> Tensor:
    """Integers 0 … 2^32 − 1 in the order of the float32 keys."""
    bits = (keys.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0 makes −0 the same key as 0
    return torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits + (1 << 31)) & 0xFFFFFFFF


def _codes(shard: RankedShard) -> Iterator[Tensor]:
    """The ordered keys of a shard, a chunk of rows at a time."""
    for start in range(0, shard.rows, _CHUNK_ROWS):
        yield _ordered(shard.keys(start, min(start + _CHUNK_ROWS, shard.rows)))


def _bin_of_kth(
    shards: Sequence[RankedShard], k: int, digit: Callable[[Tensor], Tensor], high: int | None
) -> tuple[int, int, int]:
    """The digit of the k-th largest key, how many keys have a larger one, and how many there are.

    With `high`, among the keys with that upper half only.
    """
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for shard in shards:
        for code in _codes(shard):
            chosen = code.flatten() if high is None else code[code >> _HALF == high]
            counts += torch.bincount(digit(chosen).cpu(), minlength=_BINS)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    counts = counts.to(device)
    dist.all_reduce(counts)
    from_top = counts.cpu().flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, min(k, int(from_top[-1]))))
    return _BINS - 1 - place, int(from_top[place - 1]) if place else 0, int(from_top[-1])


def _equal_before(shards: Sequence[RankedShard], equal: Sequence[int]) -> list[int]:
    """For each shard, the entries equal to the k-th key in the shards before it."""
    places = [(shard.table, shard.first_row, shard.first_column) for shard in shards]
    gathered: list[list[tuple[tuple[int, int, int], int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, list(zip(places, equal, strict=True)))
    everywhere = [entry for entries in gathered for entry in entries]
    return [sum(count for other, count in everywhere if other < place) for place in places]
