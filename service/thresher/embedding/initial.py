"""Initial values as a pure function of (seed, table, row, column).

A table starts alike on 1 rank and on 64, under every sharding, and the lottery ticket's rewind needs no snapshot.
The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the counter
holds row and column, the key is drawn from seed and table name.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from thresher.embedding.partitions import Partitions
from thresher.kernels.layout import Combine

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_CHUNK_ROWS = 1 << 16  # bounds the temporary int64 tensors


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random 32-bit words, as int64 tensors, for each counter of four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps at 64 bits, which keeps both halves
        c0, c1, c2, c3 = (
            (product1 >> 32 & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> 32 & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def fill_uniform(
    shard: Tensor,
    seed: int,
    table: str,
    scale: float,
    first_row: int = 0,
    first_column: int = 0,
    centre: float = 0.0,
) -> None:
    """Fill a shard of a table with its initial values, uniform in [centre - scale, centre + scale).

    Args:
        shard: [rows, columns], any float dtype and device; filled in place.
        seed: of the run.
        table: the table's name.
        scale: half the width of the range.
        first_row: row of the whole table at which the shard begins.
        first_column: column of the whole table at which the shard begins.
        centre: middle of the range.
    """
    digest = hashlib.sha256(f"{seed}/{table}".encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    columns = shard.shape[1]
    first_block, last_block = first_column // 4, (first_column + columns + 3) // 4
    blocks = torch.arange(first_block, last_block, device=shard.device).unsqueeze(0)
    skip = first_column - 4 * first_block
    for start in range(0, shard.shape[0], _CHUNK_ROWS):
        part = shard[start : start + _CHUNK_ROWS]
        rows = torch.arange(part.shape[0], device=shard.device).add_(first_row + start).unsqueeze(1)
        zero = torch.zeros_like(rows)
        words = philox((blocks + zero, rows & _LOW, rows >> 32, zero), key)
        bits = torch.stack(torch.broadcast_tensors(*words), dim=2).flatten(1)[:, skip : skip + columns]
        # 24 bits are exact in float32, so every backend gets the same values bit for bit.
        part.copy_((bits >> 8).float().mul_(2.0**-23).sub_(1.0).mul_(scale).add_(centre))


def fill_composed(
    shard: Tensor,
    partitions: Partitions,
    combine: Combine,
    seed: int,
    table: str,
    scale: float,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """Fill a shard of a composed table, so that ids' vectors have the variance scale² / 3 of a plain table's.

    K rows that are added have a K-th of it each. Of rows that are multiplied the first partition's have all of it, and
    the others are c · u, u uniform in [0.5, 1.5): E[(c u)²] = c² (1 + 1/12) is 1 with c² = 12/13.

    Args:
        shard: [rows, columns], rows of the partitions' buckets; filled in place.
        partitions: of the table.
        combine: of the table.
        seed: of the run.
        table: the table's name.
        scale: half the width of a plain table's range.
        first_row: row of the whole table at which the shard begins.
        first_column: column of the whole table at which the shard begins.
    """
    factor = math.sqrt(12 / 13)
    for number, ((_, rows), first) in enumerate(zip(partitions.splits, partitions.first_rows, strict=True)):
        half, centre = scale, 0.0
        if combine == Combine.ADD:
            half = scale / math.sqrt(len(partitions))
        elif combine == Combine.MULT and number > 0:
            half, centre = factor / 2, factor
        start, stop = (min(max(row - first_row, 0), shard.shape[0]) for row in (first, first + rows))
        fill_uniform(shard[start:stop], seed, table, half, first_row + start, first_column, centre)
    shard[max(partitions.rows - first_row, 0) :] = 0  # rows that no bucket has
