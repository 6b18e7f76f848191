"""How a rank's part of a table's state stands in state dicts, so that it loads on other ranks and shardings.

What is split over ranks is a ShardedTensor that knows the whole; what every rank holds alike is a plain tensor.
torch.distributed.checkpoint reads either from what the other wrote, and writes what several ranks hold once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torchrec.distributed.embedding_types import ShardedEmbeddingTable


def state_of(
    parts: Sequence[tuple[ShardedEmbeddingTable, Tensor]], one_a_row: bool, pg: dist.ProcessGroup | None
) -> Tensor | ShardedTensor:
    """Some state of a table, of which this rank has parts.

    Args:
        parts: the rank's shards of the table with their state, [local rows, local columns or values a row].
        one_a_row: whether the state has one value a row instead of one an entry, or, where rows lie side by side
            (`Composed.beside`), one for each of those.
        pg: process group of the sharding.
    """
    table, local = parts[0]
    if table.global_metadata is None:  # every rank holds the whole table
        return local
    own = [(part.local_metadata, tensor) for part, tensor in parts]
    return sharded_like(table.global_metadata, one_a_row, local.dtype, own, pg)


def sharded_like(
    values: ShardedTensorMetadata,
    one_a_row: bool,
    dtype: torch.dtype,
    own: Sequence[tuple[ShardMetadata, Tensor]],
    pg: dist.ProcessGroup | None,
) -> ShardedTensor:
    """Some state of a table as a whole, sharded like its values.

    Of tables split by columns every block of columns has the same one value a row. Each rank names the block it has
    itself, so that all load it; as the blocks' parts carry equal names, a checkpoint holds one of them.

    Args:
        values: how the values [rows, columns] are sharded.
        one_a_row: see `state_of`.
        dtype: of the state.
        own: this rank's parts, where in the values they lie and the state itself; may be none.
        pg: process group of the sharding.
    """
    metadata, places = copy.deepcopy((values, [place for place, _ in own]))  # TorchRec's share parts with the plan
    tensors = [tensor for _, tensor in own]
    if one_a_row:
        block = places[0].shard_offsets[1] if places else 0
        metadata.shards_metadata = [part for part in metadata.shards_metadata if part.shard_offsets[1] == block]
        places, tensors = places[:1], tensors[:1]
        width = tensors[0].shape[1] if tensors else 1
        for part in [*metadata.shards_metadata, *places]:
            part.shard_sizes, part.shard_offsets = [part.shard_sizes[0], width], [part.shard_offsets[0], 0]
        metadata.size = torch.Size([metadata.size[0], width])
    shards = [Shard(tensor, place) for tensor, place in zip(tensors, places, strict=True)]
    metadata.tensor_properties = TensorProperties(dtype=dtype)
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, sharded_tensor_metadata=metadata, process_group=pg
    )


def own_parts(value: Tensor | ShardedTensor) -> list[Tensor]:
    """This rank's tensors of some state."""
    return [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
