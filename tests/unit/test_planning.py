"""What the planner knows of our tables: which shardings they may have, their bytes, and one plan on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from tests.masks import RandomMasks
from thresher.embedding.collection import EmbeddingBagCollection
from thresher.embedding.partitions import Partitions
from thresher.embedding.planning import (
    CostEstimator,
    Enumerator,
    KernelCost,
    StorageEstimator,
    make_plan,
    reads_of,
    state_bytes,
)
from thresher.embedding.representation import (
    Composed,
    Dense,
    Masked,
    Representation,
    RowOptimizer,
    SoftThreshold,
    entries_of,
)
from thresher.embedding.sharding import Sharder, collection_of
from thresher.embedding.sharding_types import COLUMN_SPLIT, SHARDING_TYPES, allowed_types
from thresher.kernels import layout
from thresher.kernels.layout import Combine, Optimizer

DENSE = Dense()
GRANULARITIES = ["global", "table", "dimension", "table_dimension", "feature", "feature_dimension"]
REPRESENTATIONS: list[Representation] = [Dense(), Masked(RandomMasks(18)), *(SoftThreshold(g) for g in GRANULARITIES)]  # type: ignore[arg-type]

BUCKETS = dict.fromkeys("ab", Partitions.quotient_remainder(1_000_000, 49_000))  # of 49,021 rows
COMPOSED: list[Representation] = [Composed(BUCKETS, combine) for combine in Combine] + [
    Composed(BUCKETS, combine, entries)
    for combine, entries in itertools.product(
        (Combine.ADD, Combine.MULT), (Masked(RandomMasks(18)), SoftThreshold("feature"), SoftThreshold())
    )
]


def collection_with(
    representation: Representation = DENSE, rule: Optimizer = Optimizer.ADAM, rows: int = 20_000, dim: int = 18
) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=rows, embedding_dim=dim) for name in "ab"
    ]
    return EmbeddingBagCollection(tables, representation, RowOptimizer(rule))


def plan_of(collection: EmbeddingBagCollection, sharding: str | None, ranks: int = 4, per_node: int = 2) -> Any:
    plan: ShardingPlan = make_plan(
        nn.ModuleDict({"tables": collection}), sharding,
        world_size=ranks, local_world_size=per_node, device_type="cpu", batch_size=64,
    )  # fmt: skip
    return plan.plan["tables"]


def options(collection: EmbeddingBagCollection, sharding: str) -> list[ShardingOption]:
    topology = Topology(world_size=4, local_world_size=2, compute_device="cpu")
    constraints = {name: ParameterConstraints(sharding_types=[sharding]) for name in "ab"}
    enumerator = Enumerator(topology, 64, constraints, [StorageEstimator(topology, constraints)], narrowest=1)
    found: list[ShardingOption] = enumerator.enumerate(nn.ModuleDict({"tables": collection}), [Sharder()])
    return found


@pytest.fixture(scope="module")
def env() -> Iterator[ShardingEnv]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ShardingEnv.from_process_group(dist.group.WORLD)
    dist.destroy_process_group()


def test_what_the_columns_of_a_row_share_forbids_splitting_them() -> None:
    for representation in REPRESENTATIONS:
        for rule in Optimizer:
            by_row = representation == SoftThreshold("feature") or isinstance(representation, Masked)
            shared = by_row or rule == Optimizer.ROWWISE_ADAGRAD
            expected = set(SHARDING_TYPES) - (set(COLUMN_SPLIT) if shared else set())
            assert set(allowed_types(representation, RowOptimizer(rule))) == expected


@pytest.mark.parametrize("sharding", COLUMN_SPLIT)
@pytest.mark.parametrize(
    ("representation", "rule", "mend"),
    [
        (SoftThreshold("feature"), Optimizer.ADAM, "granularity feature_dimension"),
        (Dense(), Optimizer.ROWWISE_ADAGRAD, "the optimizer adagrad"),
        (Masked(RandomMasks(18)), Optimizer.ADAM, "row_wise"),
    ],
)
def test_a_refusal_names_table_sharding_and_mend(
    sharding: str, representation: Representation, rule: Optimizer, mend: str, env: ShardingEnv
) -> None:
    collection = collection_with(representation, rule)
    with pytest.raises(ValueError, match=f"table a, sharding {sharding}: .*take one of table_wise.*{mend}"):
        plan_of(collection, sharding)
    by_hand = {name: ParameterSharding(sharding, "fused", [0]) for name in "ab"}
    with pytest.raises(ValueError, match=f"table a, sharding {sharding}: .*take one of table_wise.*{mend}"):
        Sharder().shard(collection, by_hand, env, torch.device("cpu"))


def test_an_unknown_sharding_is_named() -> None:
    with pytest.raises(ValueError, match="sharding by_hand: there is no such sharding; take one of table_wise"):
        plan_of(collection_with(), "by_hand")


@pytest.mark.parametrize("rule", Optimizer)
@pytest.mark.parametrize("representation", REPRESENTATIONS + COMPOSED, ids=str)
def test_estimated_bytes_are_the_allocated_ones(
    representation: Representation, rule: Optimizer, env: ShardingEnv
) -> None:
    dim = 18
    collection = collection_with(representation, rule, 50_000, dim)
    rows = collection.embedding_bag_configs()[0].num_embeddings
    beside = representation.beside("a") if isinstance(representation, Composed) else 1
    plan = plan_of(collection, "table_wise", ranks=1, per_node=1)
    sharded = Sharder().shard(collection, plan, env, torch.device("cpu"))
    (kernel,) = collection_of(nn.ModuleList([sharded])).kernels()
    group = kernel.group
    tensors = [group.weights, *group.weight_states, group.thresholds, *group.threshold_states, group.seen]
    masked = isinstance(entries_of(representation), Masked)
    tensors += [group.mask[: -layout.MASK_PADDING], group.starts] if masked else []
    allocated = sum(tensor.nbytes for tensor in tensors)
    expected = [
        4 * rows * dim + state_bytes(rows * beside, dim // beside, representation, collection.optimizer, kept)
        for kept in ([own.numel() for own in kernel.weights] if masked else [None, None])
    ]
    assert sum(expected) == allocated
    for sharding in allowed_types(representation, collection.optimizer):
        copies = 4 if sharding == "data_parallel" else 1
        estimated = sum(shard.storage.ddr for option in options(collection, sharding) for shard in option.shards)
        batch = 0.05 * copies * 3 * 4 * 2 * rows * dim  # a twentieth of full tables with Adam
        assert estimated == pytest.approx(copies * allocated, abs=batch)
        assert estimated >= copies * allocated


@pytest.mark.parametrize(
    ("sharding", "widths"),
    [("column_wise", [4, 5, 4, 5]), ("table_column_wise", [9, 9]), ("grid_shard", [9, 9, 9, 9])],
)
def test_columns_are_cut_evenly_and_of_any_width(sharding: str, widths: list[int]) -> None:
    for parameter in plan_of(collection_with(), sharding).values():
        shards = parameter.sharding_spec.shards
        assert sorted(shard.shard_sizes[1] for shard in shards) == sorted(widths)
        assert sum(rows * columns for rows, columns in (shard.shard_sizes for shard in shards)) == 20_000 * 18


def test_automatic_plans_keep_to_what_is_allowed() -> None:
    for representation in REPRESENTATIONS + COMPOSED:
        for rule in Optimizer:
            plan = plan_of(collection_with(representation, rule, dim=64), None)
            allowed = allowed_types(representation, RowOptimizer(rule))
            assert all(parameter.sharding_type in allowed for parameter in plan.values())


def test_one_rank_has_whole_tables() -> None:
    assert {p.sharding_type for p in plan_of(collection_with(), None, ranks=1, per_node=1).values()} == {"table_wise"}


def test_copies_that_do_not_fit_are_not_planned() -> None:
    plan = plan_of(collection_with(rows=330_000_000), None)  # of 71 GB each, Adam's moments included
    assert {parameter.sharding_type for parameter in plan.values()} <= set(SHARDING_TYPES) - {"data_parallel"}
    with pytest.raises(PlannerError):
        plan_of(collection_with(rows=330_000_000), "data_parallel")


def test_tables_that_fit_nowhere_are_an_error() -> None:
    with pytest.raises(PlannerError):
        plan_of(collection_with(rows=20_000_000_000), None)


def test_tables_cost_what_is_read_of_them() -> None:
    assert [reads_of(own, "a", "row_wise") for own in (Dense(), SoftThreshold())] == [1.0, 2.0]
    add, _, concat, masked_add, _, learned_add, *_ = COMPOSED
    assert reads_of(masked_add, "a", "table_wise") == 2.5
    assert reads_of(learned_add, "a", "row_wise") == 2.0
    assert reads_of(add, "a", "table_wise") == 2.0
    assert reads_of(concat, "a", "table_wise") == 1.0
    assert reads_of(add, "a", "row_wise") == 1.0  # of each of two rows that travel instead of an id
    assert reads_of(concat, "a", "row_wise") == 0.5  # and which are half as wide
    assert [option.input_lengths for option in options(collection_with(add), "row_wise")] == [[2.0], [2.0]]
    assert [option.input_lengths for option in options(collection_with(add), "table_wise")] == [[1.0], [1.0]]
    assert KernelCost(2.0).coefficients.default.fwd.lookup_size_multiplier == 2.0


def test_each_table_has_the_cost_of_its_own_representation() -> None:
    """TorchRec's estimator has one cost for all tables."""

    def seconds(representations: Mapping[str, Representation]) -> list[float]:
        tables = [EmbeddingBagConfig(name=n, feature_names=[n], num_embeddings=9000, embedding_dim=64) for n in "ab"]
        collection = EmbeddingBagCollection(tables, representations)
        topology = Topology(world_size=4, local_world_size=2, compute_device="cpu")
        constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in "ab"}
        enumerator = Enumerator(topology, 64, constraints, [CostEstimator(topology, constraints)], narrowest=1)
        found = enumerator.enumerate(nn.ModuleDict({"tables": collection}), [Sharder()])
        return [option.shards[0].perf.fwd_compute for option in found]

    plain, soft = Dense(), SoftThreshold()
    (cheap, _), (_, dear) = seconds({"a": plain, "b": plain}), seconds({"a": soft, "b": soft})
    assert dear > 1.2 * cheap
    assert seconds({"a": plain, "b": soft}) == [cheap, dear]


def test_shardings_are_enumerated_in_one_order() -> None:
    """TorchRec takes them out of a set of strings, whose order differs between processes; plans could follow it."""
    topology = Topology(world_size=4, local_world_size=2, compute_device="cpu")
    constraints = {name: ParameterConstraints(sharding_types=list(SHARDING_TYPES[::-1])) for name in "ab"}
    enumerator = Enumerator(topology, 64, constraints, [StorageEstimator(topology, constraints)], narrowest=1)
    found = enumerator.enumerate(nn.ModuleDict({"tables": collection_with()}), [Sharder()])
    assert [option.sharding_type for option in found] == [*SHARDING_TYPES, *SHARDING_TYPES]
