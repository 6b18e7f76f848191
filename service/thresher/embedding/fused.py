"""TorchRec's `fused` compute kernel, ours: storage of a rank's shards, and lookup with the update in its backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.types import ShardingType
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.embedding.initial import fill_uniform
from thresher.embedding.representation import Masked, SoftThreshold, TableKernel
from thresher.embedding.state import state_of
from thresher.kernels import reference
from thresher.kernels.ops import STATES, Group, Shared

KERNEL = "thresher"  # key of our TableKernel in TorchRec's fused_params


@dataclass(frozen=True)
class TablePart:
    """A shard in its group and in the whole table.

    Attributes:
        table: where it lies in the group's flat tensors.
        name: of the table.
        first_row: row of the whole table at which the shard begins.
        first_column: column of the whole table at which the shard begins.
        columns: of the whole table.
        counted: whether this rank speaks for the shard: of a table that every rank holds only the first does.
    """

    table: reference.Table
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
        if config.is_weighted:
            raise ValueError("weighted bags have no kernel yet; build the collection with is_weighted=False")
        representation, optimizer = self.kernel.representation, self.kernel.optimizer
        learned = isinstance(representation, SoftThreshold)
        shared = representation.shared if isinstance(representation, SoftThreshold) else Shared.NONE
        rows, dims = self._local_rows, self._local_cols
        size = {Shared.ROW: sum(rows), Shared.ELEMENT: sum(n * d for n, d in zip(rows, dims, strict=True))}
        tables = reference.tables_of(rows, dims)

        def states(one_a_row: bool) -> list[Tensor]:
            return [
                torch.zeros(size[Shared.ROW if one_a_row or one else Shared.ELEMENT], device=device)
                for _, one in STATES[optimizer.rule]
            ]

        self.group = Group(
            weights=torch.empty(size[Shared.ELEMENT], device=device),
            weight_states=states(one_a_row=False),
            thresholds=torch.full((size.get(shared, 0),), representation.init if learned else 0.0, device=device),
            threshold_states=states(one_a_row=shared == Shared.ROW) if shared in size else [],
            mask=torch.ones(
                size[Shared.ELEMENT] if isinstance(representation, Masked) else 0, dtype=torch.bool, device=device
            ),
            seen=torch.zeros(sum(rows) if learned else 0, dtype=torch.bool, device=device),
            rows=rows,
            dims=dims,
            feature_tables=self._feature_table_map,
            shared=shared,
            mean=self._pooling == PoolingMode.MEAN,
            optimizer=optimizer.rule,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            threshold_learning_rate=representation.learning_rate if learned else 0.0,
            threshold_weight_decay=representation.weight_decay if learned else 0.0,
            eps=optimizer.eps,
            anchor=torch.empty(0, device=device, requires_grad=True),
        )
        self.weights = [reference.elements(self.group.weights, table) for table in tables]
        self.shared_thresholds: list[nn.Parameter] = []  # the collection's own replicated parameters, a table each
        self._param_per_table: dict[str, nn.Parameter] = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            parameter = nn.Parameter(weight)
            parameter._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
            self._param_per_table.setdefault(name, parameter)  # one stands for all blocks of columns that it has
        self._fused_optimizer = _RowOptimizer(self, tables, pg)
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
        """Each table's shard [N, D], a view of the flat storage."""
        return self.weights

    def parts(self) -> Iterator[TablePart]:
        """The shards, in the order of the group."""
        for table, shard, first_row, first_column in zip(
            reference.tables_of(self.group.rows, self.group.dims),
            self._config.embedding_tables,
            self._row_offset,
            self._col_offset,
            strict=True,
        ):
            yield TablePart(table, shard.name, first_row, first_column, shard.embedding_dim, self._counted)

    def shared_of(self, part: TablePart) -> Tensor:
        """The replicated thresholds of a shard, [1] or one for each of its columns."""
        s = self.shared_thresholds[part.table.number]
        return s.narrow(0, part.first_column, part.table.dim) if self.group.shared == Shared.COLUMN else s

    def row_states(self) -> Iterator[tuple[ShardedEmbeddingTable, dict[str, Tensor]]]:
        """What a table's shard holds beside its values: `threshold`, `seen` or `mask`, [N, 1] or [N, D] views."""
        group = self.group
        for table, shard in zip(
            reference.tables_of(group.rows, group.dims), self._config.embedding_tables, strict=True
        ):
            found = {}
            if group.thresholds.numel():
                found["threshold"] = reference.thresholds_of(group.thresholds, table, group.shared)
            if group.seen.numel():
                found["seen"] = reference.per_row(group.seen, table)
            if group.mask.numel():
                found["mask"] = reference.elements(group.mask, table)
            yield shard, found

    def init_parameters(self) -> None:
        """Fill the shards with the values that the seed gives their rows and columns."""
        for weight, name, first_row, first_column in zip(
            self.weights, self.names, self._row_offset, self._col_offset, strict=True
        ):
            fill_uniform(weight, self.kernel.seed, name, self.kernel.init_scale, first_row, first_column)

    def forward(self, features: KeyedJaggedTensor, vbe_output: None = None, vbe_output_offsets: None = None) -> Tensor:
        """Pooled vectors [B, Σ D] of this rank's features."""
        if vbe_output is not None or vbe_output_offsets is not None or features.variable_stride_per_key():
            raise ValueError("batch sizes that differ between features have no kernel yet; give each the same stride")
        shared = torch.cat([self.shared_of(part) for part in self.parts()]) if self.shared_thresholds else None
        return self._lookup(features.values().long(), features.offsets().long(), shared)

    def _lookup(self, indices: Tensor, offsets: Tensor, shared: Tensor | None) -> Tensor:
        return self.group.lookup(indices, offsets, shared)

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

    def __init__(self, kernel: FusedEmbeddingBag, tables: list[reference.Table], pg: dist.ProcessGroup | None) -> None:
        self._group = group = kernel.group
        names = STATES[group.optimizer]
        params: dict[str, Tensor | ShardedTensor] = {}
        state: dict[Tensor | ShardedTensor, dict[str, Any]] = {}
        shards = zip(kernel.config.embedding_tables, tables, kernel.weights, strict=True)
        for table, group_of in groupby(shards, key=lambda shard: shard[0].name):  # blocks of columns lie side by side
            blocks = list(group_of)

            def whole(flat: Tensor, one_a_row: bool, blocks: Sequence[Any] = blocks) -> Tensor | ShardedTensor:
                view = reference.per_row if one_a_row else reference.elements
                return state_of([(shard, view(flat, place)) for shard, place, _ in blocks], one_a_row, pg)

            entries: dict[str, Any] = {f"{table}.step": group.step}
            for (name, one_a_row), flat in zip(names, group.weight_states, strict=True):
                entries[f"{table}.{name}"] = whole(flat, one_a_row)
            if group.threshold_states:
                for (name, one_a_row), flat in zip(names, group.threshold_states, strict=True):
                    entries[f"{table}.threshold_{name}"] = whole(flat, one_a_row or group.shared == Shared.ROW)
            param = params[f"{table}.weight"] = state_of([(s, w) for s, _, w in blocks], False, pg)
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
