"""A sharded table's rows in order, as lookups give them, streamed from the ranks that hold them to the first."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from thresher.embedding.fused import FusedEmbeddingBag, TablePart
from thresher.embedding.sharding import ShardedCollection

_CHUNK_ROWS = 1 << 16

Rows = tuple[NDArray[np.float32], NDArray[np.bool_] | None]  # values [rows, D]; which of them stay, or none for all


def table_rows(collection: ShardedCollection, table: str) -> Iterator[Rows]:
    """A table's rows in order, on the first rank; the other ranks send theirs and get nothing.

    Every rank must exhaust it, as often and in the same order as the others.
    """
    own = {
        (part.first_row, part.first_column): (kernel, part)
        for kernel in collection.kernels()
        for part in kernel.parts()
        if part.name == table and part.counted
    }
    spans: list[list[tuple[int, int, int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(spans, [(row, part.table.rows, column) for (row, column), (_, part) in own.items()])
    in_order = sorted((*span, rank) for rank, parts in enumerate(spans) for span in parts)
    for (first, count), blocks in groupby(in_order, key=lambda span: span[:2]):
        owners = [(column, owner) for _, _, column, owner in blocks]
        for start in range(0, count, _CHUNK_ROWS):
            found = [_to_first(_cut(own.get((first, column)), start), owner) for column, owner in owners]
            if dist.get_rank() == 0:
                yield _beside(found)


def _cut(held: tuple[FusedEmbeddingBag, TablePart] | None, start: int) -> Rows | None:
    """A chunk of a part's rows, where this rank has it."""
    if held is None:
        return None
    kernel, part = held
    values, kept = kernel.dense_rows(part, start, start + _CHUNK_ROWS)
    return values.cpu().numpy(), None if kept is None else kept.cpu().numpy()


def _beside(blocks: list[Rows]) -> Rows:
    """Rows from blocks of their columns."""
    if len(blocks) == 1:
        return blocks[0]
    masks = [mask for _, mask in blocks if mask is not None]
    values = np.concatenate([values for values, _ in blocks], axis=1)
    return values, np.concatenate(masks, axis=1) if masks else None


def _to_first(rows: Rows | None, owner: int) -> Rows:
    if owner != 0:
        box: list[Any] = [rows]
        if dist.get_rank() == owner:
            dist.send_object_list(box, dst=0)
        elif dist.get_rank() == 0:
            dist.recv_object_list(box, src=owner)
        rows = box[0]
    return rows  # type: ignore[return-value]
