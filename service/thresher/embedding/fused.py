"""TorchRec's `fused` compute kernel, ours: storage of a rank's shards, and lookup with the update in its backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import data_type_to_dtype
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.embedding.compact import fill_kept, flat_state_of, pack_tables
from thresher.embedding.initial import fill_composed, fill_uniform
from thresher.embedding.representation import Masked, SoftThreshold, TableKernel, composed_of, entries_of
from thresher.embedding.state import state_of
from thresher.kernels import layout, memory, reference
from thresher.kernels.layout import STATES, Combine, Shared
from thresher.kernels.ops import Group

KERNEL = "thresher"  # key of our TableKernel in TorchRec's fused_params


@dataclass(frozen=True)
class TablePart:
    """A shard in its group and in the whole table.

    Attributes:
        table: where it lies in the group's flat tensors.
        name: of the table.
        first_row: row of the whole table at which the shard begins; of rows that lie side by side each counts.
        first_column: column of the whole table at which the shard begins.
        columns: of the whole table.
        counted: whether this rank speaks for the shard: of a table that every rank holds only the first does.
    """

    table: layout.Table
    name: str
    first_row: int
    first_column: int
    columns: int
    counted: bool


class FusedEmbeddingBag(BaseBatchedEmbeddingBag[Tensor], FusedOptimizerModule):
    """The shards of a rank that share representation, optimizer and pooling, in one group of flat tensors."""

    _counted = True

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        sharding_type: ShardingType | None,
    ) -> None:
        super().__init__(config, pg, device, sharding_type)
        assert config.fused_params is not None
        self.kernel: TableKernel = config.fused_params[KERNEL]
        optimizer, composed = self.kernel.optimizer, composed_of(self.kernel.representation)
        own = entries_of(self.kernel.representation)
        learned = own if isinstance(own, SoftThreshold) else None
        shared = learned.shared if learned else Shared.NONE
        rows, dims = self._local_rows, self._local_cols
        stored = layout.tables_of(rows, dims)  # as TorchRec has them
        partitions: list[int] = []
        if composed:
            beside = [composed.beside(name) for name in self.names]
            rows = [n * k for n, k in zip(rows, beside, strict=True)]
            dims = [d // k for d, k in zip(dims, beside, strict=True)]
            if sharding_type is None:  # else rows are on several ranks, and an id came as the rows of its buckets
                for name in self.names:
                    splits = composed.partitions[name].splits
                    partitions += [len(splits), *chain(*splits)]
        tables = layout.tables_of(rows, dims)
        entries = sum(n * d for n, d in zip(rows, dims, strict=True))
        mask, starts = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        if isinstance(own, Masked):
            mask, starts = pack_tables(own.masks, list(zip(tables, self.names, self._row_offset, strict=True)))
            entries = int(starts[-1])
        size = {Shared.ROW: sum(rows), Shared.ELEMENT: entries}

        def states(one_a_row: bool) -> list[Tensor]:
            return [
                memory.zeros(size[Shared.ROW if one_a_row or one else Shared.ELEMENT], device=device)
                for _, one in STATES[optimizer.rule]
            ]

        self.group = Group(
            weights=memory.empty(entries, dtype=data_type_to_dtype(config.data_type), device=device),
            weight_states=states(one_a_row=False),
            thresholds=memory.empty(size.get(shared, 0), device=device).fill_(learned.init if learned else 0.0),
            threshold_states=states(one_a_row=shared == Shared.ROW) if shared in size else [],
            mask=mask.to(device),
            starts=starts.to(device),
            seen=memory.zeros(sum(rows) if learned else 0, dtype=torch.bool, device=device),
            rows=rows,
            dims=dims,
            feature_tables=self._feature_table_map,
            shared=shared,
            mean=self._pooling == PoolingMode.MEAN,
            optimizer=optimizer.rule,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            threshold_learning_rate=learned.learning_rate if learned else 0.0,
            threshold_weight_decay=learned.weight_decay if learned else 0.0,
            eps=optimizer.eps,
            partitions=partitions,
            combine=composed.combine if composed else Combine.ADD,
            anchor=torch.empty(0, device=device, requires_grad=True),
        )
        self.weights = [self.values_of(self.group.weights, table) for table in stored]
        self.shared_thresholds: list[nn.Parameter] = []  # the collection's own replicated parameters, a table each
        self._param_per_table: dict[str, nn.Parameter] = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            parameter = nn.Parameter(weight)
            parameter._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
            self._param_per_table.setdefault(name, parameter)  # one stands for all blocks of columns that it has
        self._fused_optimizer = _RowOptimizer(self, stored, tables, pg)
        self.init_parameters()

    @property
    def names(self) -> list[str]:
        """Names of the tables, in the order of the group."""
        return [table.name for table in self._config.embedding_tables]

    @property
    def emb_module(self) -> Any:
        """TorchRec asks it for the weights."""
        return self

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        """The optimizer that runs inside backward, for its state and learning rate."""
        return self._fused_optimizer

    def split_embedding_weights(self) -> list[Tensor]:
        """Each table's shard as TorchRec has it, [rows, columns] or its kept entries; a view of the flat storage."""
        return self.weights

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The shards, for TorchRec's bookkeeping; kept entries it does not understand, the collection names those."""
        if self.group.mask.numel():
            return {} if destination is None else destination
        found: dict[str, Any] = super().state_dict(destination, prefix, keep_vars)
        return found

    def values_of(self, flat: Tensor, table: layout.Table) -> Tensor:
        """View of a table's values or their state: [N, D], or, where storage is compact, [kept entries]."""
        group = self.group
        return layout.kept_of(flat, group.starts, table) if group.mask.numel() else layout.elements(flat, table)

    def dense_rows(self, part: TablePart, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Rows of a shard as lookups give them, float32 [rows, D], and which entries stay, or none where all do."""
        group, table = self.group, part.table
        rows = torch.arange(start, min(stop, table.rows), device=group.weights.device)
        values = reference.Rows(table, rows, group.mask, group.starts).read(group.weights)
        if group.mask.numel():
            return values, layout.unpack_masks(layout.masks_of(group.mask, table)[rows], table.dim)
        if group.shared != Shared.NONE:
            s = self.thresholds_of(part)
            own = s[rows] if group.shared in (Shared.ROW, Shared.ELEMENT) else s
            values = reference.soft_threshold(values, torch.sigmoid(own + group.pressure))
        return values, None

    def parts(self) -> Iterator[TablePart]:
        """The shards, in the order of the group."""
        for table, shard, first_row, first_column in zip(
            layout.tables_of(self.group.rows, self.group.dims),
            self._config.embedding_tables,
            self._row_offset,
            self._col_offset,
            strict=True,
        ):
            beside = shard.local_cols // table.dim
            yield TablePart(table, shard.name, first_row * beside, first_column, shard.embedding_dim, self._counted)

    def shared_of(self, part: TablePart) -> Tensor:
        """The replicated thresholds of a shard, [1] or one for each of its columns."""
        s = self.shared_thresholds[part.table.number]
        return s.narrow(0, part.first_column, part.table.dim) if self.group.shared == Shared.COLUMN else s

    def thresholds_of(self, part: TablePart) -> Tensor:
        """S of a shard that learns thresholds: [1, 1], [1, D], [N, 1] or [N, D]."""
        if self.shared_thresholds:
            return self.shared_of(part).detach().view(1, -1)
        return layout.thresholds_of(self.group.thresholds, part.table, self.group.shared)

    def row_states(self) -> Iterator[tuple[ShardedEmbeddingTable, dict[str, Tensor]]]:
        """What a table's shard holds beside its values: `threshold` and `seen`, [N, 1] or [N, D] views."""
        group = self.group
        for table, shard in zip(layout.tables_of(group.rows, group.dims), self._config.embedding_tables, strict=True):
            found = {}
            if group.shared in (Shared.ROW, Shared.ELEMENT):  # also where the rank has none of the group's rows
                found["threshold"] = layout.thresholds_of(group.thresholds, table, group.shared)
            if group.shared != Shared.NONE:
                found["seen"] = layout.per_row(group.seen, table)
            yield shard, found

    def init_parameters(self) -> None:
        """Fill the shards with the values that the seed gives their rows and columns."""
        for weight, part in zip(self.weights, self.parts(), strict=True):
            if self.group.mask.numel():
                fill_kept(weight, self.group.mask, part.table, partial(self._fill, part))
            else:
                self._fill(part, layout.elements(self.group.weights, part.table))

    def _fill(self, part: TablePart, rows: Tensor, first: int = 0) -> None:
        """Give some rows of a shard, from the one of a number on, the values that they have where all entries stay."""
        composed = composed_of(self.kernel.representation)
        where = (self.kernel.seed, part.name, self.kernel.init_scale, part.first_row + first, part.first_column)
        if composed:
            fill_composed(rows, composed.partitions[part.name], composed.combine, *where)
        else:
            fill_uniform(rows, *where)

    def forward(self, features: KeyedJaggedTensor, vbe_output: None = None, vbe_output_offsets: None = None) -> Tensor:
        """Pooled vectors [B, Σ D] of this rank's features."""
        del vbe_output, vbe_output_offsets  # of batch sizes that differ between features, which we refuse
        shared = torch.cat([self.shared_of(part) for part in self.parts()]) if self.shared_thresholds else None
        factors = features.weights() if self._config.is_weighted else None
        return self._lookup(features.values(), features.offsets(), factors, shared)

    def _lookup(self, indices: Tensor, offsets: Tensor, factors: Tensor | None, shared: Tensor | None) -> Tensor:
        return self.group.lookup(indices, offsets, factors, shared)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """None: the sharded collection names all tensors."""
        del prefix, recurse, remove_duplicate
        yield from ()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Each table's shard, marked as updated in backward."""
        del recurse, remove_duplicate
        for name, parameter in self._param_per_table.items():
            yield f"{prefix}.{name}.weight" if prefix else f"{name}.weight", parameter


class _RowOptimizer(FusedOptimizer):
    """State of the fused update as sharded tensors, so that a checkpoint loads under another sharding."""

    def __init__(
        self,
        kernel: FusedEmbeddingBag,
        stored: list[layout.Table],
        tables: list[layout.Table],
        pg: dist.ProcessGroup | None,
    ) -> None:
        self._group = group = kernel.group
        names = STATES[group.optimizer]
        params: dict[str, Tensor | ShardedTensor] = {}
        state: dict[Tensor | ShardedTensor, dict[str, Any]] = {}
        shards = zip(kernel.config.embedding_tables, stored, tables, strict=True)
        for table, group_of in groupby(shards, key=lambda shard: shard[0].name):  # blocks of columns lie side by side
            blocks = list(group_of)

            def whole(flat: Tensor, one_a_row: bool, blocks: Sequence[Any] = blocks) -> Tensor | ShardedTensor:
                if group.mask.numel() and not one_a_row:
                    own = entries_of(kernel.kernel.representation)
                    assert isinstance(own, Masked)
                    ((shard, place, _),) = blocks
                    return flat_state_of(shard, kernel.values_of(flat, place), own.masks, pg)
                parts = []
                for shard, place, rows in blocks:
                    if one_a_row:
                        parts.append((shard, layout.per_row(flat, rows).view(place.rows, place.dim // rows.dim)))
                    else:
                        parts.append((shard, layout.elements(flat, place)))
                return state_of(parts, one_a_row, pg)

            entries: dict[str, Any] = {f"{table}.step": group.step}
            for (name, one_a_row), flat in zip(names, group.weight_states, strict=True):
                entries[f"{table}.{name}"] = whole(flat, one_a_row)
            if group.threshold_states:
                for (name, one_a_row), flat in zip(names, group.threshold_states, strict=True):
                    entries[f"{table}.threshold_{name}"] = whole(flat, one_a_row or group.shared == Shared.ROW)
            param = params[f"{table}.weight"] = whole(group.weights, one_a_row=False)
            state[param] = entries
        super().__init__(params, state, [{"params": list(params.values()), "lr": group.learning_rate}])

    def step(self, closure: Any = None) -> None:
        """Take over a changed learning rate; the rows were updated in backward."""
        del closure
        (param_group,) = self.param_groups
        self._group.learning_rate = param_group["lr"]

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Nothing to do: rows have no gradient that stays."""
        del set_to_none
