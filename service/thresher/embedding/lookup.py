"""Where TorchRec's pooled lookup gets its kernels from: ours, under every sharding type."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.types import ShardingEnv, ShardingType

from thresher.embedding.fused import FusedEmbeddingBag


class PooledLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's lookup of a rank's shards, with a `FusedEmbeddingBag` for each group of tables."""

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup | None,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> FusedEmbeddingBag:
        del env
        return FusedEmbeddingBag(config, pg, device, sharding_type)
