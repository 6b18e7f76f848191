"""A collection with composed tables on one rank: it computes its definition, and says what does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.masks import RandomMasks
from thresher.embedding.bucket_rows import bucket_rows
from thresher.embedding.collection import EmbeddingBagCollection
from thresher.embedding.partitions import Partitions
from thresher.embedding.planning import make_plan
from thresher.embedding.representation import Composed, Dense, Masked, Representation, RowOptimizer, SoftThreshold
from thresher.embedding.sharding import Sharder
from thresher.embedding.sharding_types import SHARDING_TYPES, allowed_types
from thresher.embedding.state import own_parts
from thresher.kernels import layout
from thresher.kernels.layout import Combine, Optimizer
from thresher.methods.pep import table_shards

PARTITIONS = {
    "a": Partitions.quotient_remainder(100, 12),
    "b": Partitions.chinese_remainder(50, [3, 4, 5]),
    "c": Partitions.remainder(7),
}
IDS = {"a": 100, "b": 50, "c": 30, "plain": 9}
DIM, BATCH, STEPS = 6, 16, 10


@pytest.fixture(scope="module")
def env() -> Iterator[ShardingEnv]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ShardingEnv.from_process_group(dist.group.WORLD)
    dist.destroy_process_group()


def collection_of(
    representations: Mapping[str, Representation], rule: Optimizer = Optimizer.SGD, seed: int = 0, dim: int = DIM
) -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(
            name=name, feature_names=[f"{name} ids"], num_embeddings=IDS[name], embedding_dim=dim,
            pooling=PoolingType.MEAN if name == "b" else PoolingType.SUM,
        )
        for name in representations
    ]  # fmt: skip
    optimizer = RowOptimizer(rule, learning_rate=0.5, eps=1e-10)
    return EmbeddingBagCollection(tables, representations, optimizer, seed=seed, init_scale=0.5)


def mixed(combine: Combine) -> dict[str, Representation]:
    composed = Composed(PARTITIONS, combine)
    return {"a": composed, "plain": Dense(), "b": composed, "c": composed}


def shard(collection: EmbeddingBagCollection, env: ShardingEnv, sharding: str | None = None) -> Any:
    plan = make_plan(
        nn.ModuleDict({"tables": collection}), sharding,
        world_size=1, local_world_size=1, device_type="cpu", batch_size=BATCH,
    )  # fmt: skip
    return Sharder().shard(collection, plan.plan["tables"], env, torch.device("cpu"))  # type: ignore[arg-type]


def batch(names: list[str], seed: int) -> tuple[KeyedJaggedTensor, dict[str, list[Tensor]]]:
    """Bags of up to 3 ids, as TorchRec wants them and as lists."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {name: torch.randint(0, 4, (BATCH,), generator=generator) for name in names}
    ids = {name: torch.randint(0, IDS[name], (int(lengths[name].sum()),), generator=generator) for name in names}
    features = KeyedJaggedTensor(
        keys=[f"{name} ids" for name in names],
        values=torch.cat([ids[name] for name in names]),
        lengths=torch.cat([lengths[name] for name in names]),
    )
    return features, {name: list(ids[name].split(lengths[name].tolist())) for name in names}


def dense_vectors(name: str, combine: Combine, rows: Tensor, ids: Tensor) -> Tensor:
    """The definition: pick the rows of each id's buckets from the partitions' tables, and combine them."""
    if name == "plain":
        return rows[ids]
    first, parts = 0, []
    for divisor, modulus in PARTITIONS[name].splits:
        parts.append(rows[first : first + modulus][ids // divisor % modulus])
        first += modulus
    if combine == Combine.CONCAT:
        return torch.cat(parts, dim=1)
    return torch.stack(parts).sum(0) if combine == Combine.ADD else torch.stack(parts).prod(0)


def allowed() -> list[tuple[Combine, str]]:
    return [(own, kind) for own in Combine for kind in allowed_types(Composed(PARTITIONS, own), RowOptimizer())]


def test_what_is_allowed() -> None:
    found = {combine: {kind for own, kind in allowed() if own == combine} for combine in Combine}
    assert found[Combine.ADD] == found[Combine.MULT] == set(SHARDING_TYPES)
    assert found[Combine.CONCAT] == {"table_wise", "data_parallel", "row_wise", "table_row_wise"}


@pytest.mark.parametrize(("combine", "sharding"), allowed())
@pytest.mark.parametrize("rule", [Optimizer.SGD, Optimizer.ADAGRAD])
def test_ten_steps_equal_a_dense_computation(
    combine: Combine, rule: Optimizer, sharding: str, env: ShardingEnv
) -> None:
    representations = mixed(combine)
    sharded = shard(collection_of(representations, rule), env, sharding)
    names = list(representations)
    tables = {}
    for name in names:
        rows = sharded.embedding_bags[name].weight.detach().clone()
        beside = len(PARTITIONS[name]) if combine == Combine.CONCAT and name in PARTITIONS else 1
        tables[name] = nn.Parameter(rows.view(-1, DIM // beside))
    torch_rule = torch.optim.SGD if rule == Optimizer.SGD else torch.optim.Adagrad
    optimizer = torch_rule(tables.values(), lr=0.5)
    for step in range(STEPS):
        features, bags = batch(names, step)
        found = sharded(features)
        weight = torch.randn(BATCH, DIM * len(names), generator=torch.Generator().manual_seed(step))
        columns = []
        for name in names:
            pooled = [dense_vectors(name, combine, tables[name], ids).sum(0) for ids in bags[name]]
            counts = torch.tensor([[max(1, len(ids))] for ids in bags[name]])
            columns.append(torch.stack(pooled) / (counts if name == "b" else 1))
        expected = torch.cat(columns, dim=1)
        in_order = torch.cat([found[f"{name} ids"] for name in names], dim=1)
        torch.testing.assert_close(in_order, expected, rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        (expected.sigmoid() * weight).sum().backward()
        (in_order.sigmoid() * weight).sum().backward()
        optimizer.step()
    for name in names:
        rows = sharded.embedding_bags[name].weight
        torch.testing.assert_close(rows.reshape(tables[name].shape), tables[name], rtol=1e-4, atol=1e-5)


def test_composed_tables_are_one_group_beside_the_plain_ones(env: ShardingEnv) -> None:
    composed = Composed(PARTITIONS, Combine.ADD)
    sharded = shard(collection_of({"a": composed, "plain": Dense(), "c": composed}), env)
    assert [kernel.names for kernel in sharded.kernels()] == [["a", "c"], ["plain"]]


@pytest.mark.parametrize("combine", list(Combine))
def test_stored_rows_hold_the_buckets(combine: Combine) -> None:
    configs = {config.name: config for config in collection_of(mixed(combine)).embedding_bag_configs()}
    rows = {name: config.num_embeddings for name, config in configs.items()}
    expected = {"a": 12 + 9, "b": 3 + 4 + 5, "c": 7, "plain": 9}
    if combine == Combine.CONCAT:
        expected |= {"a": 11, "b": 4}  # two and three rows side by side
    assert rows == expected
    assert {config.embedding_dim for config in configs.values()} == {DIM}


@pytest.mark.parametrize("kinds", [("table_wise", "data_parallel"), ("data_parallel", "table_wise")])
def test_row_moments_of_rows_side_by_side_are_saved_and_loaded(
    kinds: tuple[str, str], env: ShardingEnv, tmp_path: Path
) -> None:
    """Row-wise Adagrad has a moment for each of them."""
    saved, loaded = (
        shard(collection_of(mixed(Combine.CONCAT), Optimizer.ROWWISE_ADAGRAD, seed), env, kind)
        for seed, kind in enumerate(kinds)
    )
    names = list(mixed(Combine.CONCAT))

    def states(sharded: ShardedEmbeddingBagCollection) -> dict[str, Any]:
        return {"model": sharded.state_dict(), "optimizer": sharded.fused_optimizer.state_dict()}

    def step(sharded: Any, seed: int) -> Tensor:
        out: Tensor = sharded(batch(names, seed)[0]).values()
        (out.square()).sum().backward()
        return out.detach()

    step(saved, 0)
    dcp.save(states(saved), checkpoint_id=tmp_path)
    state = states(loaded)
    (moments,) = own_parts(state["optimizer"]["state"]["embedding_bags.b.weight"]["b.sum"])
    assert moments.shape == (4, 3)
    dcp.load(state, checkpoint_id=tmp_path)
    loaded.load_state_dict(state["model"])
    loaded.fused_optimizer.load_state_dict(state["optimizer"])
    for seed in (1, 2):
        torch.testing.assert_close(step(loaded, seed), step(saved, seed))


def test_a_bag_of_ids_becomes_a_bag_of_rows_with_their_ids_weights() -> None:
    features = KeyedJaggedTensor(
        keys=["a", "plain", "b"],
        values=torch.tensor([99, 13, 5, 8, 49]),
        weights=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
        lengths=torch.tensor([2, 0, 1, 1, 0, 1]),
    )
    found = bucket_rows(features, [PARTITIONS["a"], None, PARTITIONS["b"]])
    assert found.keys() == ["a", "plain", "b"]
    assert found.lengths().tolist() == [4, 0, 1, 1, 0, 3]
    assert found.values().tolist() == [3, 12 + 8, 1, 12 + 1, 5, 8, 49 % 3, 3 + 49 % 4, 7 + 49 % 5]
    assert found.weights().tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0]


def test_batches_of_different_sizes_are_refused(env: ShardingEnv) -> None:
    sharded = shard(collection_of({"a": Composed(PARTITIONS, Combine.ADD), "plain": Dense()}), env)
    features = KeyedJaggedTensor(
        keys=["a ids", "plain ids"], values=torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[2], [1]], inverse_indices=(["a ids", "plain ids"], torch.tensor([[0, 1], [0, 0]])),
    )  # fmt: skip
    with pytest.raises(ValueError, match="give each the same stride"):
        sharded(features)


def test_thresholds_are_learned_beside_composed_tables(env: ShardingEnv) -> None:
    representations = {"plain": SoftThreshold("table"), "a": Composed(PARTITIONS, Combine.ADD)}
    sharded = shard(collection_of(representations), env)
    assert list(sharded.shared_thresholds) == ["plain"]
    assert [own.name for own in table_shards(sharded)] == ["plain"]
    assert [name for name in sharded.state_dict() if name.endswith("seen")] == ["embedding_bags.plain.seen"]
    sharded(batch(["plain", "a"], 0)[0]).values().sum().backward()
    assert sharded.shared_thresholds["plain"].grad is not None


@pytest.mark.parametrize(
    ("representations", "dim", "message"),
    [
        ({"plain": Composed(PARTITIONS, Combine.ADD)}, 6, "table plain is composed, but has no partitions; name them"),
        (
            {"a": Composed(PARTITIONS, Combine.CONCAT)}, 5,
            "table a, combine concat: 5 columns cannot be shared by 2 partitions; take a multiple of 2 columns",
        ),
        ({"a": SoftThreshold("feature"), "b": SoftThreshold("table")}, 6, "tables a, b have different SoftThresholds"),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_the_mend(representations: dict[str, Representation], dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        collection_of(representations, dim=dim)


def test_a_table_without_representation_is_named() -> None:
    tables = [EmbeddingBagConfig(name="a", feature_names=["a"], num_embeddings=9, embedding_dim=4)]
    with pytest.raises(ValueError, match=re.escape("table a has no representation; name one, such as Dense()")):
        EmbeddingBagCollection(tables, {})


@pytest.mark.parametrize(
    ("combine", "sharding", "message"),
    [
        (Combine.CONCAT, "column_wise", "take one of table_wise, data_parallel, row_wise, table_row_wise, or combine"),
        (Combine.CONCAT, "grid_shard", "combine concat has some of a vector's columns in each row"),
    ],
)
def test_a_refusal_names_table_sharding_and_mend(
    combine: Combine, sharding: str, message: str, env: ShardingEnv
) -> None:
    collection = collection_of({"plain": Dense(), "a": Composed(PARTITIONS, combine)})
    pattern = f"table a, sharding {sharding}: .*{re.escape(message)}" if "take" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern):
        shard(collection, env, sharding)
    by_hand = {name: ParameterSharding(sharding, "fused", [0]) for name in ("plain", "a")}
    with pytest.raises(ValueError, match=pattern):
        Sharder().shard(collection, by_hand, env, torch.device("cpu"))


def test_equal_composed_representations_are_one() -> None:
    first, second = (Composed(dict(PARTITIONS), Combine.ADD) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != Composed(PARTITIONS, Combine.MULT)


def test_a_feature_may_belong_to_a_composed_and_to_a_plain_table(env: ShardingEnv) -> None:
    """Its ids become rows for one of them only."""
    tables = [
        EmbeddingBagConfig(name=name, feature_names=["shared", f"{name} ids"], num_embeddings=50, embedding_dim=4)
        for name in ("plain", "b")
    ]
    representations = {"plain": Dense(), "b": Composed(PARTITIONS, Combine.ADD)}
    ids, lengths = torch.tensor([7, 49, 7, 0, 33, 21, 3]), torch.tensor([2, 0, 1, 1, 1, 2])
    found = []
    for kind in ("table_wise", "row_wise"):
        sharded = shard(EmbeddingBagCollection(tables, representations), env, kind)
        out = sharded(KeyedJaggedTensor(keys=["shared", "plain ids", "b ids"], values=ids, lengths=lengths))
        found.append(out.wait().to_dict())
    assert found[0].keys() == {"shared@plain", "shared@b", "plain ids", "b ids"}
    torch.testing.assert_close(found[0], found[1])


def test_masked_plain_and_composed_tables_stand_in_one_state_dict(env: ShardingEnv, tmp_path: Path) -> None:
    representations = {"a": Masked(RandomMasks(DIM)), "plain": Dense(), "b": Composed(PARTITIONS, Combine.MULT)}
    first, second = (shard(collection_of(representations, seed=seed), env) for seed in range(2))
    kept = int((layout.unpack_masks(RandomMasks(DIM).packed("a", 0, IDS["a"]), DIM)).sum())
    shapes = {name: own_parts(value)[0].shape for name, value in first.state_dict().items()}
    assert shapes == {
        "embedding_bags.a.weight": (kept,),
        "embedding_bags.plain.weight": (IDS["plain"], DIM),
        "embedding_bags.b.weight": (PARTITIONS["b"].rows, DIM),
    }
    dcp.save(first.state_dict(), checkpoint_id=tmp_path)
    state = second.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    second.load_state_dict(state)
    features, _ = batch(list(representations), 3)
    assert torch.equal(first(features).values(), second(features).values())
