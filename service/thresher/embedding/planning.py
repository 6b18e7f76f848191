"""TorchRec's planner with what it must know of our tables: which shardings they may have, their bytes, their cost."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.estimator.annotations import backward_compute, bwd_comms
from torchrec.distributed.planner.estimator.config import EmbeddingPerfEstimatorConfig
from torchrec.distributed.planner.estimator.estimator import DataParallelEvaluator, EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.estimator.types import (
    EstimatorPerfCoefficients,
    PerfCoefficient,
    PerfCoefficientConfig,
    ShardPerfContext,
)
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    CollectiveType,
    ParameterConstraints,
    Shard,
    SharderDataMap,
    ShardEstimator,
    ShardingOption,
    Storage,
)
from torchrec.distributed.types import ShardingPlan, ShardingType

from thresher.embedding.collection import EmbeddingBagCollection
from thresher.embedding.compact import kept_entries
from thresher.embedding.representation import (
    Masked,
    Representation,
    RowOptimizer,
    SoftThreshold,
    composed_of,
    entries_of,
)
from thresher.embedding.sharding import Sharder
from thresher.embedding.sharding_types import COLUMN_SPLIT, ROW_SPLIT, SHARDING_TYPES, allowed_types, refusal
from thresher.kernels.layout import BLOCK_ROWS, STATES, Shared

# On one node they are row-wise and column-wise under another name.
_MANY_NODES = (
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
)
_CACHE_LINE = 16  # columns of float32; narrower blocks would fetch the same lines on several ranks


def make_plan(
    model: nn.Module,
    sharding: str | None,
    *,
    world_size: int,
    local_world_size: int,
    device_type: str,
    batch_size: int,
) -> ShardingPlan:
    """Where each table's parts go. Every rank makes the same plan by itself, and fails by itself.

    Args:
        model: has the collections somewhere inside.
        sharding: TorchRec's name of the sharding type of all tables; None to choose for each table.
        world_size: ranks.
        local_world_size: ranks on a node.
        device_type: cpu or cuda.
        batch_size: samples a step on each rank.

    Raises:
        ValueError: if a table cannot have the sharding type.
    """
    constraints = {}
    collections = [module for module in model.modules() if isinstance(module, EmbeddingBagCollection)]
    for collection, config in ((own, config) for own in collections for config in own.embedding_bag_configs()):
        representation, optimizer = collection.representations[config.name], collection.optimizer
        if sharding is None:
            types = _worth_choosing(representation, optimizer, config.embedding_dim, world_size, local_world_size)
        elif problem := refusal(representation, optimizer, sharding):
            raise ValueError(f"table {config.name}, sharding {sharding}: {problem}")
        else:
            types = [sharding]
        constraints[config.name] = ParameterConstraints(
            sharding_types=types, compute_kernels=[EmbeddingComputeKernel.FUSED.value]
        )
    topology = Topology(world_size=world_size, local_world_size=local_world_size, compute_device=device_type)
    enumerator = Enumerator(
        topology,
        batch_size,
        constraints,
        estimator=[CostEstimator(topology, constraints), StorageEstimator(topology, constraints)],
        narrowest=_CACHE_LINE if sharding is None else 1,
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=enumerator,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),  # for the dense part and buffers
        constraints=constraints,
        debug=False,
    )
    root = logging.getLogger()
    root.addFilter(_expected)
    try:
        return planner.plan(model, [Sharder()])
    finally:
        root.removeFilter(_expected)


def _expected(record: logging.LogRecord) -> bool:
    # TorchRec says so of every data-parallel table, which has none.
    return not record.getMessage().startswith("Sharding spec not found")


def _worth_choosing(
    representation: Representation, optimizer: RowOptimizer, columns: int, world_size: int, local_world_size: int
) -> list[str]:
    """What a table may have, without what would be another name for the same here."""
    if world_size == 1:
        return [ShardingType.TABLE_WISE.value]
    types = allowed_types(representation, optimizer)
    if world_size == local_world_size:
        types = [kind for kind in types if kind not in _MANY_NODES]
    if columns < 2 * _CACHE_LINE:
        types = [kind for kind in types if kind not in COLUMN_SPLIT]
    return types


class Enumerator(EmbeddingEnumerator):
    """TorchRec's, but in the same order on every rank, and with columns cut for our kernel.

    TorchRec's blocks of columns are multiples of 4, and 128 at least: limits of FBGEMM, which ours has not.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints],
        estimator: list[ShardEstimator],
        narrowest: int,
    ) -> None:
        super().__init__(topology, batch_size, constraints, estimator)
        self._narrowest = narrowest

    def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], sharder_key: str = "") -> list[str]:
        # TorchRec's come out of a set of strings, whose order differs between processes; so would plans.
        found = super()._filter_sharding_types(name, allowed_sharding_types, sharder_key)
        return sorted(found, key=SHARDING_TYPES.index)

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Cut columns, count what stands for an id, then estimate."""
        parts = {
            ShardingType.COLUMN_WISE.value: self._world_size,
            ShardingType.TABLE_COLUMN_WISE.value: self._local_world_size,
            ShardingType.GRID_SHARD.value: self._world_size // self._local_world_size,
        }
        for option in sharding_options:
            if option.sharding_type in parts:
                columns = option.tensor.shape[1]
                blocks = max(1, min(parts[option.sharding_type], columns // self._narrowest))
                option.shards = _cut_columns(option.shards, columns, blocks)
            composed = composed_of(_representation(option))
            if composed and option.sharding_type in ROW_SPLIT:
                rows = len(composed.partitions[option.name])  # which ranks get in place of an id
                option.input_lengths = [rows * length for length in option.input_lengths]
        super().populate_estimates(sharding_options)


def _representation(option: ShardingOption) -> Representation:
    collection = option.module[1]
    assert isinstance(collection, EmbeddingBagCollection)
    return collection.representations[option.name]


def _cut_columns(shards: Sequence[Shard], columns: int, blocks: int) -> list[Shard]:
    """The row parts of a table's first block, for each of some blocks of columns, as even as can be."""
    rows = [(shard.size[0], shard.offset[0]) for shard in shards if shard.offset[1] == 0]
    bounds = [columns * block // blocks for block in range(blocks + 1)]
    return [
        Shard(size=[size, stop - start], offset=[first_row, start])
        for start, stop in pairwise(bounds)
        for size, first_row in rows
    ]


def state_bytes(
    rows: int, columns: int, representation: Representation, optimizer: RowOptimizer, kept: int | None = None
) -> int:
    """Bytes that a shard holds beside the values of a full table, or fewer than those if it is masked.

    Args:
        rows: of the shard, those that lie side by side each for itself.
        columns: of such a row.
        representation: of the table.
        optimizer: of the table.
        kept: entries that a masked shard keeps.
    """
    states = STATES[optimizer.rule]
    entries, own = rows * columns if kept is None else kept, entries_of(representation)
    found = sum(4 * (rows if one_a_row else entries) for _, one_a_row in states)
    if isinstance(own, SoftThreshold):
        found += rows  # whether training saw them
        if own.shared == Shared.ROW:
            found += 4 * rows * (1 + len(states))
        elif own.shared == Shared.ELEMENT:
            found += 4 * entries + sum(4 * (rows if one_a_row else entries) for _, one_a_row in states)
    elif isinstance(own, Masked):
        masks, starts = rows * -(-columns // 8), 8 * (-(-rows // BLOCK_ROWS) + 1)
        found += masks + starts - 4 * (rows * columns - entries)
    return found


class StorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's bytes of values and batch, and ours of thresholds, masks and optimizer."""

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Set the storage of every shard."""
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            representation, optimizer = _representation(option), option.module[1].optimizer
            composed, own = composed_of(representation), entries_of(representation)
            beside = composed.beside(option.name) if composed else 1
            for shard in option.shards:
                (rows, columns), kept = shard.size, None
                if isinstance(own, Masked):
                    kept = kept_entries(own.masks, option.name, shard.offset[0], rows)
                more = state_bytes(rows * beside, columns // beside, representation, optimizer, kept)
                if option.sharding_type == ShardingType.DATA_PARALLEL.value:
                    more += self._gathered_bytes(option)
                on_gpu = self._topology.compute_device == "cuda"
                shard.storage += Storage(hbm=more if on_gpu else 0, ddr=0 if on_gpu else more, ssd=0)

    def _gathered_bytes(self, option: ShardingOption) -> int:
        """The ids and gradients of all ranks, which a data-parallel table's backward brings together."""
        ids = sum(option.input_lengths) * option.batch_size
        vectors = option.num_inputs * option.batch_size
        return int(self._topology.world_size * (8 * ids + 4 * vectors * option.tensor.shape[1]))


def reads_of(representation: Representation, table: str, sharding_type: str) -> float:
    """Bytes that a lookup in the table reads for each byte of a vector, with thresholds and masks beside the values."""
    composed, entries, found = composed_of(representation), entries_of(representation), 1.0
    if isinstance(entries, SoftThreshold) and entries.shared == Shared.ELEMENT:
        found = 2.0
    elif isinstance(entries, Masked):
        found = 1.25
    if composed:
        rows = len(composed.partitions[table])
        # Where rows are on several ranks, the rows of an id's buckets count as so many ids.
        found *= (1.0 if sharding_type in ROW_SPLIT else float(rows)) / composed.beside(table)
    return found


class CostEstimator(ShardEstimator):
    """TorchRec's estimator of time, which knows one cost of a lookup, for tables that differ in it."""

    def __init__(self, topology: Topology, constraints: dict[str, ParameterConstraints]) -> None:
        self._topology = topology
        self._constraints = constraints

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Set the time of every shard."""
        by_reads: dict[float, list[ShardingOption]] = {}
        for option in sharding_options:
            reads = reads_of(_representation(option), option.name, option.sharding_type)
            by_reads.setdefault(reads, []).append(option)
        for reads, options in by_reads.items():
            EmbeddingPerfEstimatorFactory.create_with_config(
                KernelCost(reads), topology=self._topology, constraints=self._constraints
            ).estimate(options, sharder_data_map)


class KernelCost(EmbeddingPerfEstimatorConfig):
    """TorchRec's cost model, changed where our kernel is known to differ.

    The penalties for few columns are of FBGEMM's CUDA blocks, and gone. Data-parallel tables exchange ids and gradients
    of the batch, not of the table, and every rank makes the step of the whole batch. TorchRec's ratio of backward to
    forward and its bandwidths stay: they do not tell the optimizers apart, and nobody has measured them for our kernel.

    Args:
        reads: bytes that a lookup reads for each byte of a vector.
    """

    _use_block_usage_penalty = False
    _use_min_dim_for_lookup = False

    def __init__(self, reads: float) -> None:
        forward = PerfCoefficient(
            input_read_size_multiplier=1.0,
            lookup_size_multiplier=reads,
            embedding_output_multiplier=1.0,
            hash_size_multiplier=0.0,
        )
        self.coefficients = PerfCoefficientConfig(default=EstimatorPerfCoefficients(fwd=forward, bwd=None))

    @bwd_comms(sharding_type=ShardingType.DATA_PARALLEL.value)  # type: ignore[untyped-decorator]
    def gather(self, ctx: ShardPerfContext) -> float:
        """Time to bring ids and gradients of all ranks together."""
        own = ctx.batch_inputs * ctx.input_data_type_size + ctx.batch_outputs * ctx.emb_dim * ctx.output_data_type_size
        bandwidth = ctx.comms_bandwidths.get_bw(ctx.world_size, ctx.local_world_size, CollectiveType.ALL_GATHER)
        return float(own * ctx.world_size / bandwidth)

    @backward_compute(sharding_type=ShardingType.DATA_PARALLEL.value)  # type: ignore[untyped-decorator]
    def replicated_update(self, ctx: ShardPerfContext) -> float:
        """Time of lookup and update of the whole batch."""
        forward = DataParallelEvaluator()._default_fwd_comp(ctx, self)
        return float(forward * ctx.world_size * (1 + ctx.bwd_compute_multiplier))
