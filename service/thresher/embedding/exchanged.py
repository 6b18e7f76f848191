"""Composed tables whose rows are on several ranks and whose vectors are no sums of rows: the rows travel, each once.

TorchRec sends ids to the ranks that hold their rows, and adds up what these look up: enough for sums (`bucket_rows`).
A product, or rows side by side, is made where all rows of an id are. So ids stay on their rank, which asks the others
for the different rows that its batch needs, makes and pools its vectors, and sends back each row's gradient; the
owner updates with those of all ranks. Ids share the rows of a composed table, so few travel: of U different ones in a
batch of a rank, U row numbers there, U rows back and U gradients.

Shapes: T tables, U different rows of a table in a batch, L ids, K partitions, D columns of a row, S shards on a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torchrec.distributed.comm_ops import get_gradient_division
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import (
    BaseEmbeddingDist,
    BaseSparseFeaturesDist,
    EmbeddingShardingContext,
    EmbeddingShardingInfo,
    group_tables,
)
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.sharding.dp_sharding import (
    BaseDpEmbeddingSharding,
    DpPooledEmbeddingDist,
    DpSparseFeaturesDist,
)
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.embedding.fused import KERNEL, TablePart
from thresher.embedding.lookup import PooledLookup
from thresher.embedding.representation import Composed, composed_of
from thresher.kernels import layout, reference
from thresher.kernels.layout import Combine
from thresher.kernels.ops import Group


@dataclass(frozen=True)
class _Shard:
    """A part of a table, in rows of buckets.

    Attributes:
        rank: that holds it.
        table: place of the table in the sharding.
        first_row: row of the whole table at which it begins.
        rows: of the part.
        first_column: column of a whole row at which it begins.
        columns: of the part.
    """

    rank: int
    table: int
    first_row: int
    rows: int
    first_column: int
    columns: int


class _Owned:
    """A shard that this rank holds: its rows can be read and updated by themselves."""

    def __init__(self, group: Group, part: TablePart) -> None:
        self._group, self._table = group, part.table

    def rows(self, rows_U: Tensor) -> Tensor:
        """Some rows, float32 [U, D]."""
        return layout.elements(self._group.weights, self._table)[rows_U].float()

    def update(self, grad_UD: Tensor, rows_U: Tensor) -> None:
        """Update rows by their gradients; those of equal rows are added. The group's count of steps stays."""
        group, table = self._group, self._table
        states = [
            layout.per_row(state, table) if one_a_row else layout.elements(state, table)
            for state, (_, one_a_row) in zip(group.weight_states, layout.STATES[group.optimizer], strict=True)
        ]
        alone = replace(
            group, weights=layout.elements(group.weights, table).flatten(), rows=[table.rows], dims=[table.dim],
            weight_states=[state.flatten() for state in states], feature_tables=[0], partitions=[],
            combine=Combine.ADD, mean=False, step=group.step.clone(),
        )  # fmt: skip
        offsets = torch.arange(rows_U.numel() + 1, device=rows_U.device)
        alone.update(grad_UD, rows_U, offsets, None, None, 0.0, sample_weight_grad=False)


@dataclass(frozen=True)
class _Route:
    """Which rows of a batch are where.

    Attributes:
        slices: of each shard of all ranks, which of the rows that its table needs.
        asked: by source rank and own shard, the rows of the shard that the source needs.
    """

    slices: list[slice]
    asked: list[list[Tensor]]


class _Exchange:
    """Brings rows from the ranks that hold them, and gradients back; all ranks call it together.

    Args:
        shards: of all ranks, rank after rank.
        dims: columns of each table's rows.
        owned: this rank's, in the order of `shards`.
        groups: this rank's groups of tables.
        pg: the ranks.
    """

    def __init__(
        self, shards: Sequence[_Shard], dims: Sequence[int], owned: list[_Owned], groups: list[Group],
        pg: dist.ProcessGroup,
    ) -> None:  # fmt: skip
        self._shards, self._dims, self._owned, self._groups, self._pg = shards, dims, owned, groups, pg
        self._by_rank = [[shard for shard in shards if shard.rank == rank] for rank in range(pg.size())]
        self._own = self._by_rank[pg.rank()]

    def route(self, rows_TU: Sequence[Tensor]) -> _Route:
        """Tell the others which of their rows this rank needs.

        Args:
            rows_TU: of each table, rising.
        """
        device = rows_TU[0].device
        slices, wanted = [], []
        for shard in self._shards:
            rows_U = rows_TU[shard.table]
            ends = torch.tensor([shard.first_row, shard.first_row + shard.rows], device=device)
            slices.append(slice(*torch.searchsorted(rows_U, ends).tolist()))
            wanted.append(rows_U[slices[-1]] - shard.first_row)
        counts = torch.tensor([part.numel() for part in wanted], device=device)
        shards = [len(own) for own in self._by_rank]
        theirs = self._send(counts, shards, [len(self._own)] * self._pg.size())
        counts_RS = theirs.view(self._pg.size(), len(self._own)).tolist()
        sizes = [sum(part.tolist()) for part in counts.split(shards)]
        rows = self._send(torch.cat(wanted), sizes, [sum(counts_S) for counts_S in counts_RS])
        parts = iter(rows.split([count for counts_S in counts_RS for count in counts_S]))
        return _Route(slices, [[next(parts) for _ in self._own] for _ in counts_RS])

    def fetch(self, route: _Route, rows_TU: Sequence[Tensor]) -> list[Tensor]:
        """The rows of each table, float32 [U, D]."""
        found = [
            owned.rows(rows).flatten() for asked in route.asked for owned, rows in zip(self._owned, asked, strict=True)
        ]
        flat = torch.cat([torch.empty(0, device=rows_TU[0].device), *found])
        sizes = [
            sum(rows.numel() * shard.columns for rows, shard in zip(asked, self._own, strict=True))
            for asked in route.asked
        ]
        parts = self._send(flat, sizes, self._sizes(route)).split(self._entries(route))
        tables = [flat.new_empty(rows.numel(), dim) for rows, dim in zip(rows_TU, self._dims, strict=True)]
        for shard, where, part in zip(self._shards, route.slices, parts, strict=True):
            _part(tables[shard.table], shard, where).copy_(part.view(-1, shard.columns))
        return tables

    def update(self, route: _Route, grads_TUD: Sequence[Tensor]) -> None:
        """Send the gradients of each table's rows [U, D] to the ranks that hold them, and update there."""
        found = [
            _part(grads_TUD[shard.table], shard, where).flatten()
            for shard, where in zip(self._shards, route.slices, strict=True)
        ]
        sizes = [
            [rows.numel() * shard.columns for rows, shard in zip(asked, self._own, strict=True)]
            for asked in route.asked
        ]
        received = self._send(torch.cat(found), self._sizes(route), [sum(own) for own in sizes])
        parts_RS = [part.split(own) for part, own in zip(received.split([sum(s) for s in sizes]), sizes, strict=True)]
        for number, (owned, shard) in enumerate(zip(self._owned, self._own, strict=True)):
            rows_U = torch.cat([asked[number] for asked in route.asked])
            owned.update(torch.cat([parts[number] for parts in parts_RS]).view(-1, shard.columns), rows_U)
        for group in self._groups:
            group.step += 1

    def _entries(self, route: _Route) -> list[int]:
        """Values that this rank needs of each shard."""
        return [
            (where.stop - where.start) * shard.columns for shard, where in zip(self._shards, route.slices, strict=True)
        ]

    def _sizes(self, route: _Route) -> list[int]:
        """Values that this rank needs of each rank."""
        entries = iter(self._entries(route))
        return [sum(next(entries) for _ in own) for own in self._by_rank]

    def _send(self, flat: Tensor, sizes: list[int], theirs: list[int]) -> Tensor:
        """Send stretches of a flat tensor to the ranks in turn; gives those of the ranks to this one."""
        received = flat.new_empty(sum(theirs))
        dist.all_to_all_single(received, flat, theirs, sizes, group=self._pg)
        return received


def _part(table_UD: Tensor, shard: _Shard, where: slice) -> Tensor:
    return table_UD[where, shard.first_column : shard.first_column + shard.columns]


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, exchange: _Exchange, *rows_TU: Tensor) -> tuple[Tensor, ...]:
        del anchor  # an input that asks for a gradient, so that backward is called on ranks that hold no weights too
        ctx.exchange = exchange
        ctx.route = exchange.route(rows_TU)
        return tuple(exchange.fetch(ctx.route, rows_TU))

    @staticmethod
    def backward(ctx: Any, *grads_TUD: Tensor) -> tuple[Tensor | None, ...]:
        if get_gradient_division():  # as TorchRec does where gradients travel to the ranks that hold a shard
            grads_TUD = tuple(grad / dist.get_world_size(ctx.exchange._pg) for grad in grads_TUD)
        ctx.exchange.update(ctx.route, grads_TUD)
        return None, None, *(None for _ in grads_TUD)


class ExchangedLookup(PooledLookup):
    """This rank's vectors, from rows that may be on any rank; bags are summed.

    Args:
        tables: all tables of the sharding, whole.
        shards: their parts on all ranks, rank after rank.
        grouped_configs: of this rank's parts.
        pg: the ranks.
        device: of the tables.
    """

    def __init__(
        self,
        tables: Sequence[ShardedEmbeddingTable],
        shards: Sequence[_Shard],
        grouped_configs: list[GroupedEmbeddingConfig],
        pg: dist.ProcessGroup,
        device: torch.device | None,
    ) -> None:
        super().__init__(grouped_configs, device=device, pg=pg, sharding_type=ShardingType.ROW_WISE)
        self._tables = tables
        representations = [_composed(table) for table in tables]
        self._splits = [own.partitions[table.name] for own, table in zip(representations, tables, strict=True)]
        self._combines = [own.combine for own in representations]
        dims = [table.local_cols // own.beside(table.name) for own, table in zip(representations, tables, strict=True)]
        place = {table.name: number for number, table in enumerate(tables)}
        parts = {
            (place[part.name], part.first_row, part.first_column): _Owned(kernel.group, part)
            for kernel in self._emb_modules
            for part in kernel.parts()
        }
        own = [shard for shard in shards if shard.rank == pg.rank()]
        owned = [parts[shard.table, shard.first_row, shard.first_column] for shard in own]
        self._exchange = _Exchange(shards, dims, owned, [kernel.group for kernel in self._emb_modules], pg)
        self._anchor = torch.empty(0, device=device, requires_grad=True)

    def forward(self, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Vectors [B, Σ D] of this rank's samples, summed over each bag."""
        ids_F = iter(sparse_features.values().long().split(sparse_features.length_per_key()))
        ids_TF = [[next(ids_F) for _ in table.feature_names] for table in self._tables]
        rows_TU, inverse_TLK = [], []
        for partitions, ids in zip(self._splits, ids_TF, strict=True):
            rows_U, inverse_LK = partitions.rows_of(torch.cat(ids)).unique(return_inverse=True)
            rows_TU.append(rows_U)
            inverse_TLK.append(inverse_LK)
        fetched_TUD = _Fetch.apply(self._anchor, self._exchange, *rows_TU)  # type: ignore[no-untyped-call]
        vectors_F = [
            part
            for fetched_UD, inverse_LK, combine, ids in zip(
                fetched_TUD, inverse_TLK, self._combines, ids_TF, strict=True
            )
            for part in reference.combined(fetched_UD[inverse_LK], combine).split([own.numel() for own in ids])
        ]
        lengths_FB = sparse_features.lengths().view(len(vectors_F), -1)
        return torch.cat([_pool(own, lengths_B) for own, lengths_B in zip(vectors_F, lengths_FB, strict=True)], dim=1)


def _pool(vectors_LD: Tensor, lengths_B: Tensor) -> Tensor:
    bags_L = torch.repeat_interleave(lengths_B.long(), output_size=vectors_LD.shape[0])
    return vectors_LD.new_zeros(lengths_B.numel(), vectors_LD.shape[1]).index_add(0, bags_L, vectors_LD)


class ExchangedSharding(
    BaseDpEmbeddingSharding[EmbeddingShardingContext, KeyedJaggedTensor, torch.Tensor, torch.Tensor]
):
    """Sharding under any plan that keeps ids where they are; it is to TorchRec as if every rank held the tables."""

    def __init__(
        self, sharding_infos: list[EmbeddingShardingInfo], env: ShardingEnv, device: torch.device | None = None
    ) -> None:
        super().__init__(sharding_infos, env, device)
        self._plans = {info.embedding_config.name: info.param_sharding for info in sharding_infos}

    def create_input_dist(self, device: torch.device | None = None) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        """Ids stay where they are."""
        del device
        return DpSparseFeaturesDist()

    def create_lookup(self, device: torch.device | None = None, *_: Any) -> GroupedPooledEmbeddingsLookup:
        """The lookup, with our kernel over the shards of this rank."""
        tables, shards, own = self.embedding_tables(), [], []
        for number, table in enumerate(tables):
            parts = self._plans[table.name].sharding_spec.shards
            beside = _composed(table).beside(table.name)
            for part in parts:
                (row, column), (rows, columns) = part.shard_offsets, part.shard_sizes
                rank = part.placement.rank()
                shards.append(_Shard(rank, number, row * beside, rows * beside, column, columns // beside))
                if rank == self._env.rank:
                    size = torch.Size([table.num_embeddings, table.embedding_dim])
                    whole = ShardedTensorMetadata(shards_metadata=parts, size=size)
                    own.append(
                        replace(table, local_rows=rows, local_cols=columns, local_metadata=part, global_metadata=whole)
                    )
        shards.sort(key=lambda shard: shard.rank)
        (grouped,) = group_tables([own])
        return ExchangedLookup(tables, shards, grouped, self._env.process_group, device)

    def create_output_dist(
        self, device: torch.device | None = None
    ) -> BaseEmbeddingDist[EmbeddingShardingContext, Tensor, Tensor]:
        """Vectors are where they are wanted."""
        del device
        return DpPooledEmbeddingDist()


def _composed(table: ShardedEmbeddingTable) -> Composed:
    assert table.fused_params is not None
    found = composed_of(table.fused_params[KERNEL].representation)
    assert found is not None
    return found
