"""Data-parallel tables: every rank holds them whole and makes every step with the ids of all ranks.

An all-reduce of their dense gradients would cost as much as the table has rows. Here backward gathers what the batch
touched, ids and upstream gradients of all ranks in the order of the ranks, and every rank runs the same fused update
over the whole batch. So the replicas stay equal bit for bit, and thresholds and optimizer work as on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
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

    def _lookup(self, indices: Tensor, offsets: Tensor, factors: Tensor | None, shared: Tensor | None) -> Tensor:
        result: Tensor = _Lookup.apply(  # type: ignore[no-untyped-call]
            self.group.anchor, shared, factors, self.group, self._pg, indices, offsets
        )
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
        factors: Tensor | None,
        group: Group,
        pg: dist.ProcessGroup,
        indices: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        del anchor  # an input that asks for a gradient, so that backward is called although the weights do not
        ctx.group, ctx.pg, ctx.pressure = group, pg, group.pressure
        ctx.save_for_backward(indices, offsets, thresholds, factors)
        return group.lookup(indices, offsets, factors, thresholds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group: Group = ctx.group
        indices, offsets, thresholds, factors = ctx.saved_tensors
        if get_gradient_division():  # as TorchRec does where gradients travel to the ranks that hold a shard
            grad = grad / ctx.pg.size()
        batch = gather_batch(indices, offsets, factors, grad, len(group.feature_tables), ctx.pg)
        wanted = ctx.needs_input_grad[2]
        threshold_grad, factor_grad = group.update(
            batch.grad, batch.indices, batch.offsets, batch.factors, thresholds, ctx.pressure, wanted
        )
        # The gradient of replicated thresholds is whole on every rank; their sum over the ranks shall count it once.
        counted = threshold_grad.numel() > 0 and ctx.pg.rank() == 0
        own = factor_grad[batch.own_ids] if wanted else None
        return None, threshold_grad if counted else None, own, None, None, None, None


@dataclass(frozen=True)
class Batch:
    """The batch of all ranks.

    Attributes:
        indices: ids [L], feature by feature, bag by bag, each feature's bags in the order of the ranks.
        offsets: int64 [features · B + 1], where each bag begins in `indices`.
        factors: sample weights [L], or none.
        grad: [B, D], of the pooled vectors.
        own_ids: places in `indices` of this rank's ids.
    """

    indices: Tensor
    offsets: Tensor
    factors: Tensor | None
    grad: Tensor
    own_ids: Tensor


def gather_batch(
    indices: Tensor, offsets: Tensor, factors: Tensor | None, grad: Tensor, features: int, pg: dist.ProcessGroup
) -> Batch:
    """Bring the batch of all ranks together; every rank must call it as often as the others, also without samples.

    Args:
        indices: ids [L], feature by feature, bag by bag.
        offsets: [features · B + 1], where each bag begins in `indices`.
        factors: sample weights [L], or none.
        grad: [B, D], of the pooled vectors; B and L may differ between ranks.
        features: how many.
        pg: the ranks.
    """
    if pg.size() == 1:
        return Batch(indices, offsets, factors, grad, torch.arange(indices.numel(), device=indices.device))
    lengths = offsets.long().diff()
    sizes = torch.tensor([lengths.numel(), indices.numel()], device=indices.device)
    counts = [part.tolist() for part in _gather(sizes, [2] * pg.size(), pg)]  # of bags and of ids
    numbers = _gather(torch.cat([lengths, indices.long()]), [bags + ids for bags, ids in counts], pg)
    width = grad.shape[1]
    grads = _gather(grad.flatten(), [bags // features * width for bags, _ in counts], pg)
    lengths_RFB = [part[:bags].view(features, -1) for part, (bags, _) in zip(numbers, counts, strict=True)]
    ids_RF = [lengths_FB.sum(1).tolist() for lengths_FB in lengths_RFB]
    ids = [part[bags:] for part, (bags, _) in zip(numbers, counts, strict=True)]
    owners = [torch.full((n,), rank == pg.rank(), device=indices.device) for rank, (_, n) in enumerate(counts)]
    return Batch(
        indices=_by_feature(ids, ids_RF),
        offsets=torch.nn.functional.pad(torch.cat(lengths_RFB, dim=1).flatten().cumsum(0), (1, 0)),
        factors=None if factors is None else _by_feature(_gather(factors, [n for _, n in counts], pg), ids_RF),
        grad=torch.cat([part.view(-1, width) for part in grads]),
        own_ids=_by_feature(owners, ids_RF).nonzero().flatten(),
    )


def _by_feature(parts_R: list[Tensor], counts_RF: list[list[int]]) -> Tensor:
    """What the ranks have of each feature, feature after feature, in the order of the ranks."""
    parts_RF = [part.split(counts) for part, counts in zip(parts_R, counts_RF, strict=True)]
    return torch.cat([parts_F[feature] for feature in range(len(counts_RF[0])) for parts_F in parts_RF])


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
