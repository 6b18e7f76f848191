"""Data-parallel tables: every rank holds them whole and makes every step with the ids of all ranks.

An all-reduce of their dense gradients would cost as much as the table has rows. Here backward gathers what the batch
touched, ids and upstream gradients of all ranks in the order of the ranks, and every rank runs the same fused update
over the whole batch. So the replicas stay equal bit for bit, and thresholds and optimizer work as on one rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseSparseFeaturesDist,
    EmbeddingShardingContext,
)
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.sharding.dp_sharding import (
    BaseDpEmbeddingSharding,
    DpPooledEmbeddingDist,
    DpSparseFeaturesDist,
)
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.embedding.fused import FusedEmbeddingBag
from thresher.kernels.ops import Group


class ReplicatedEmbeddingBag(FusedEmbeddingBag):
    """The tables that every rank holds whole, in one group of flat tensors."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup,
        device: torch.device | None,
        sharding_type: ShardingType | None,
    ) -> None:
        super().__init__(config, pg, device, sharding_type)
        self._counted = pg.rank() == 0

    def _lookup(self, indices: Tensor, offsets: Tensor, shared: Tensor | None) -> Tensor:
        result: Tensor = _Lookup.apply(self.group.anchor, shared, self.group, self._pg, indices, offsets)  # type: ignore[no-untyped-call]
        return result

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Nothing sharded: the collection's own parameters and buffers stand in the state dict as they are."""
        del prefix, keep_vars
        return {} if destination is None else destination


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        thresholds: Tensor | None,
        group: Group,
        pg: dist.ProcessGroup,
        indices: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        del anchor  # an input that asks for a gradient, so that backward is called although the weights do not
        ctx.group, ctx.pg = group, pg
        ctx.save_for_backward(indices, offsets, *([] if thresholds is None else [thresholds]))
        return group.lookup(indices, offsets, thresholds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group: Group = ctx.group
        indices, offsets, *saved = ctx.saved_tensors
        if get_gradient_division():  # as TorchRec does where gradients travel to the ranks that hold a shard
            grad = grad / ctx.pg.size()
        indices, offsets, grad = gather_batch(indices, offsets, grad, len(group.feature_tables), ctx.pg)
        thresholds = saved[0].detach().requires_grad_() if saved else None
        with torch.enable_grad():  # the group updates itself in the backward of a lookup
            group.lookup(indices, offsets, thresholds).backward(grad)
        # The gradient of replicated thresholds is whole on every rank; their sum over the ranks shall count it once.
        own = thresholds.grad if thresholds is not None and ctx.pg.rank() == 0 else None
        return None, own, None, None, None, None


def gather_batch(
    indices: Tensor, offsets: Tensor, grad: Tensor, features: int, pg: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The batch of all ranks, each feature's bags in the order of the ranks.

    Every rank must call it as often as the others, also without samples.

    Args:
        indices: int64 [L], row numbers, feature by feature, bag by bag.
        offsets: int64 [features · B + 1], where each bag begins in `indices`.
        grad: [B, D], of the pooled vectors; B and L may differ between ranks.
        features: how many.
        pg: the ranks.

    Returns:
        `indices`, `offsets` and `grad` of the Σ B samples of all ranks.
    """
    if pg.size() == 1:
        return indices, offsets, grad
    lengths = offsets.diff()
    sizes = torch.tensor([lengths.numel(), indices.numel()], device=indices.device)
    counts = [part.tolist() for part in _gather(sizes, [2] * pg.size(), pg)]  # of bags and of ids
    numbers = _gather(torch.cat([lengths, indices]), [bags + ids for bags, ids in counts], pg)
    width = grad.shape[1]
    grads = _gather(grad.flatten(), [bags // features * width for bags, _ in counts], pg)
    lengths_RFB = [part[:bags].view(features, -1) for part, (bags, _) in zip(numbers, counts, strict=True)]
    ids_RF = [
        part[bags:].split(lengths_FB.sum(1).tolist())
        for part, (bags, _), lengths_FB in zip(numbers, counts, lengths_RFB, strict=True)
    ]
    all_indices = torch.cat([ids_F[feature] for feature in range(features) for ids_F in ids_RF])
    all_offsets = torch.nn.functional.pad(torch.cat(lengths_RFB, dim=1).flatten().cumsum(0), (1, 0))
    return all_indices, all_offsets, torch.cat([part.view(-1, width) for part in grads])


def _gather(own: Tensor, sizes: list[int], pg: dist.ProcessGroup) -> list[Tensor]:
    """The ranks' flat tensors of some sizes; gloo gathers only equal ones, so they travel padded to the largest."""
    padded = own.new_zeros(max(sizes))
    padded[: own.numel()] = own
    gathered = own.new_empty(pg.size() * padded.numel())
    dist.all_gather_into_tensor(gathered, padded, group=pg)
    return [part[:size] for part, size in zip(gathered.view(pg.size(), -1), sizes, strict=True)]


class _ReplicatedLookup(GroupedPooledEmbeddingsLookup):
    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> ReplicatedEmbeddingBag:
        del env
        return ReplicatedEmbeddingBag(config, pg, device, sharding_type)


class ReplicatedSharding(
    BaseDpEmbeddingSharding[EmbeddingShardingContext, KeyedJaggedTensor, torch.Tensor, torch.Tensor]
):
    """TorchRec's data-parallel sharding, which stays clear of DDP: our kernel itself keeps the replicas equal."""

    def create_input_dist(self, device: torch.device | None = None) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        """Ids stay where they are."""
        del device
        return DpSparseFeaturesDist()

    def create_lookup(self, device: torch.device | None = None, *_: Any) -> GroupedPooledEmbeddingsLookup:
        """Our kernel over the tables."""
        return _ReplicatedLookup(
            self._grouped_embedding_configs, device=device, pg=self._env.process_group, env=self._env
        )

    def create_output_dist(
        self, device: torch.device | None = None
    ) -> BaseEmbeddingDist[EmbeddingShardingContext, Tensor, Tensor]:
        """Vectors are where they are wanted."""
        del device
        return DpPooledEmbeddingDist()
