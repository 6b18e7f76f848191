"""Masks that ranks took of their shards, brought together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from thresher.methods.scheme import save_masks
from thresher.tables.format import pack_masks, unpack_masks


@dataclass(frozen=True)
class ShardMask:
    """What stays of one shard.

    Attributes:
        name: of the table.
        table: its place among all tables.
        first_row: row of the whole table at which the shard begins.
        first_column: column of the whole table at which the shard begins.
        mask_ND: bool.
    """

    name: str
    table: int
    first_row: int
    first_column: int
    mask_ND: Tensor


def write_masks(path: Path, shards: Sequence[ShardMask]) -> None:
    """Bring the masks from all ranks to the first, as bits, and write them to a file. All ranks call it."""
    whole = gather_masks(shards)
    if whole is not None:
        save_masks(path, whole)


def gather_masks(shards: Sequence[ShardMask], everywhere: bool = False) -> dict[str, NDArray[np.uint8]] | None:
    """Bring the masks from all ranks together. All ranks call it.

    Args:
        shards: this rank's.
        everywhere: give them to every rank, not only to the first.

    Returns:
        By table uint8 [N, ⌈D/8⌉]: bit j mod 8 of byte j div 8 says whether column j stays. None where not asked for.
    """
    own = [
        (s.table, s.first_row, s.first_column, s.name, s.mask_ND.shape[1], pack_masks(s.mask_ND.cpu().numpy()))
        for s in shards
    ]
    gathered: list[Any] | None = [None] * dist.get_world_size() if everywhere or dist.get_rank() == 0 else None
    if everywhere:
        dist.all_gather_object(gathered, own)
    else:
        dist.gather_object(own, gathered, dst=0)
    if gathered is None:
        return None
    parts: dict[str, dict[int, list[tuple[int, NDArray[np.uint8]]]]] = {}  # by table and first row, blocks of columns
    for _, first_row, _, name, columns, packed in sorted(
        (part for rank in gathered for part in rank), key=lambda part: part[:3]
    ):
        parts.setdefault(name, {}).setdefault(first_row, []).append((columns, packed))
    return {name: np.concatenate([_beside(blocks) for blocks in rows.values()]) for name, rows in parts.items()}


def _beside(blocks: list[tuple[int, NDArray[np.uint8]]]) -> NDArray[np.uint8]:
    """Packed masks of some rows, from those of blocks of their columns."""
    if len(blocks) == 1:
        return blocks[0][1]
    return pack_masks(np.concatenate([unpack_masks(packed, columns) for columns, packed in blocks], axis=1))
