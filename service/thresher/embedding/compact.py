"""Compact storage of masked tables: only the entries that stay have values and optimizer state.

In state dicts the kept entries of a table are one flat tensor, row after row. Ranks that hold some of the rows hold a
stretch of it, so a checkpoint loads on other ranks and under every sharding that leaves rows whole. The masks come from
their source and are in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from thresher.embedding.representation import MaskSource
from thresher.kernels import layout
from thresher.kernels.layout import Table

_CHUNK_ROWS = 1 << 16  # bounds the temporary tensors


def pack_tables(source: MaskSource, tables: Sequence[tuple[Table, str, int]]) -> tuple[Tensor, Tensor]:
    """Masks and starts of a group of shards, as `kernels.layout` wants them.

    Args:
        source: of the masks.
        tables: each shard's place in the group, its table's name, and the row at which it begins.

    Raises:
        ValueError: if a mask has not the shape of its table.
    """
    masks, starts, first = [], [], 0
    for table, name, first_row in tables:
        packed = source.packed(name, first_row, table.rows)
        if packed.shape != (table.rows, table.mask_bytes):
            raise ValueError(
                f"mask of table {name}: {list(packed.shape)} bytes came for rows {first_row} and up, but "
                f"{[table.rows, table.mask_bytes]} are wanted; take a scheme made for these tables"
            )
        masks.append(packed.flatten())
        starts.append(layout.starts_of(packed, table.dim, first))
        first = int(starts[-1][-1])
    return torch.cat([*masks, torch.zeros(layout.MASK_PADDING, dtype=torch.uint8)]), torch.cat(starts)


def fill_kept(kept: Tensor, mask: Tensor, table: Table, fill: Callable[[Tensor, int], None]) -> None:
    """Fill a shard's kept entries with the values that a full table would have there.

    Args:
        kept: the entries.
        mask: of the group.
        table: the shard's place in the group.
        fill: gives full rows of the shard [r, D] their values, from the row of a number on.
    """
    done = 0
    packed = layout.masks_of(mask, table)
    for start in range(0, table.rows, _CHUNK_ROWS):
        bits = layout.unpack_masks(packed[start : start + _CHUNK_ROWS], table.dim)
        values = torch.empty(bits.shape, device=kept.device)
        fill(values, start)
        own = values[bits]
        kept[done : done + own.numel()] = own
        done += own.numel()


def flat_state_of(table: ShardedEmbeddingTable, local: Tensor, source: MaskSource, pg: dist.ProcessGroup | None) -> (
    Tensor | ShardedTensor
):  # fmt: skip
    """Some state of this rank's kept entries as its part of the whole table's.

    Args:
        table: the shard.
        local: the state [kept entries of the shard].
        source: of the masks.
        pg: process group of the sharding.
    """
    if table.global_metadata is None:  # every rank holds the whole table
        return local
    assert table.local_metadata is not None
    return flat_sharded(table.global_metadata, table.name, local.dtype, [(table.local_metadata, local)], source, pg)


def flat_sharded(
    values: ShardedTensorMetadata,
    name: str,
    dtype: torch.dtype,
    own: Sequence[tuple[ShardMetadata, Tensor]],
    source: MaskSource,
    pg: dist.ProcessGroup | None,
) -> ShardedTensor:
    """The kept entries of a table as a whole, of which each rank has a stretch.

    Args:
        values: how the rows of the full table are sharded.
        name: of the table.
        dtype: of the state.
        own: this rank's part, where in the full table it lies and the state itself; may be none.
        source: of the masks.
        pg: process group of the sharding.
    """
    stretches, first = {}, 0
    for shard in sorted(values.shards_metadata, key=lambda shard: shard.shard_offsets[0]):
        row, rows = shard.shard_offsets[0], shard.shard_sizes[0]
        count = kept_entries(source, name, row, rows)
        stretches[row] = ShardMetadata([first], [count], shard.placement)
        first += count
    metadata = ShardedTensorMetadata(list(stretches.values()), torch.Size([first]), TensorProperties(dtype=dtype))
    shards = [Shard(local, stretches[place.shard_offsets[0]]) for place, local in own]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, sharded_tensor_metadata=metadata, process_group=pg
    )


@lru_cache(maxsize=4096)
def kept_entries(source: MaskSource, table: str, first_row: int, rows: int) -> int:
    """Entries that some rows of a table keep. It reads their masks; the answer is asked for once a state."""
    count = 0
    for start in range(first_row, first_row + rows, _CHUNK_ROWS):
        packed = source.packed(table, start, min(_CHUNK_ROWS, first_row + rows - start))
        count += int(layout.unpack_masks(packed, 8 * packed.shape[1]).sum())
    return count
