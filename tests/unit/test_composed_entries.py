"""Composed tables whose rows learn thresholds or are masked: what they compute, how they start, their checkpoints."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.distributed.types import ShardingEnv

from tests.masks import RandomMasks
from tests.unit.test_composed import BATCH, DIM, IDS, PARTITIONS, batch, collection_of, dense_vectors, shard
from thresher.embedding.initial import fill_composed, fill_uniform
from thresher.embedding.representation import Composed, Dense, Masked, Representation, RowOptimizer, SoftThreshold
from thresher.embedding.sharding_types import ROW_SPLIT, SHARDING_TYPES, allowed_types
from thresher.embedding.state import own_parts
from thresher.kernels import layout, reference
from thresher.kernels.layout import Combine, Optimizer
from thresher.methods.pep import start_thresholds, table_shards
from thresher.spec import SearchSpec

STEPS, PRESSURE = 6, 0.2
GRANULARITIES = ["global", "table", "dimension", "table_dimension", "feature", "feature_dimension"]
MASKED = Masked(RandomMasks(DIM))
ROWS = {name: PARTITIONS[name].rows if name in PARTITIONS else n for name, n in IDS.items()}
SUMMED = [Combine.ADD, Combine.MULT]


@pytest.fixture(scope="module")
def env() -> Iterator[ShardingEnv]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ShardingEnv.from_process_group(dist.group.WORLD)
    dist.destroy_process_group()


def mixed(combine: Combine, entries: SoftThreshold | Masked) -> dict[str, Representation]:
    composed = Composed(PARTITIONS, combine, entries)
    return {"a": composed, "plain": entries, "b": composed, "c": composed}


def soft(granularity: Any) -> SoftThreshold:
    return SoftThreshold(granularity, init=-2.0, learning_rate=0.3)


def learned() -> list[tuple[str, Combine, str]]:
    return [
        (granularity, combine, kind)
        for granularity, combine in itertools.product(GRANULARITIES, SUMMED)
        for kind in allowed_types(Composed(PARTITIONS, combine, soft(granularity)), RowOptimizer())
    ]


def mask_of(name: str) -> Tensor:
    return layout.unpack_masks(RandomMasks(DIM).packed(name, 0, ROWS[name]), DIM)


def pooled(name: str, combine: Combine, rows: Tensor, bags: list[Tensor]) -> Tensor:
    sums = torch.stack([dense_vectors(name, combine, rows, ids).sum(0) for ids in bags])
    counts = torch.tensor([[max(1, len(ids))] for ids in bags])
    return sums / (counts if name == "b" else 1)


def step(sharded: Any, names: list[str], seed: int) -> tuple[Tensor, dict[str, list[Tensor]], Tensor]:
    """The vectors of a batch, its bags, and a factor for each column of the vectors."""
    features, bags = batch(names, seed)
    found = sharded(features)
    weight = torch.randn(BATCH, DIM * len(names), generator=torch.Generator().manual_seed(seed))
    return torch.cat([found[f"{name} ids"] for name in names], dim=1), bags, weight


@pytest.mark.parametrize(("granularity", "combine", "sharding"), learned())
def test_learned_thresholds_equal_a_dense_computation(
    granularity: str, combine: Combine, sharding: str, env: ShardingEnv
) -> None:
    representations = mixed(combine, soft(granularity))
    names = list(representations)
    sharded = shard(collection_of(representations), env, sharding)
    for kernel in sharded.kernels():
        kernel.group.pressure = PRESSURE
    values = {name: nn.Parameter(sharded.embedding_bags[name].weight.detach().clone()) for name in names}
    shapes = {"table": (1, 1), "table_dimension": (1, DIM)}
    s: dict[str, nn.Parameter] = {}
    for name in names:
        if granularity in ("global", "dimension"):
            s[name] = s.get(names[0], nn.Parameter(torch.full((1, DIM if granularity == "dimension" else 1), -2.0)))
        else:
            shape = shapes.get(granularity, (ROWS[name], 1 if granularity == "feature" else DIM))
            s[name] = nn.Parameter(torch.full(shape, -2.0))
    optimizer = torch.optim.SGD([{"params": list(values.values())}, {"params": list(set(s.values())), "lr": 0.3}], 0.5)
    replicated = torch.optim.SGD([*sharded.shared_thresholds.values(), nn.Parameter(torch.zeros(1))], 0.3)
    for seed in range(STEPS):
        in_order, bags, weight = step(sharded, names, seed)
        rows = {name: reference.soft_threshold(values[name], torch.sigmoid(s[name] + PRESSURE)) for name in names}
        expected = torch.cat([pooled(name, combine, rows[name], bags[name]) for name in names], dim=1)
        torch.testing.assert_close(in_order, expected, rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        replicated.zero_grad()
        (expected.sigmoid() * weight).sum().backward()
        (in_order.sigmoid() * weight).sum().backward()
        optimizer.step()
        replicated.step()
    for name in names:
        torch.testing.assert_close(sharded.embedding_bags[name].weight, values[name], rtol=1e-4, atol=1e-5)
        if not sharded.shared_thresholds:
            torch.testing.assert_close(sharded.embedding_bags[name].threshold, s[name].detach(), rtol=1e-4, atol=1e-5)
    for own, expected_s in zip(sharded.shared_thresholds.values(), dict.fromkeys(s.values()), strict=False):
        torch.testing.assert_close(own.detach(), expected_s.detach().flatten(), rtol=1e-4, atol=1e-5)
        assert not bool((own == -2.0).all())


@pytest.mark.parametrize(
    ("combine", "sharding"),
    [(own, kind) for own in SUMMED for kind in allowed_types(Composed(PARTITIONS, own, MASKED), RowOptimizer())],
)
def test_masked_rows_equal_a_dense_computation(combine: Combine, sharding: str, env: ShardingEnv) -> None:
    """They start as they do without masks, and what is pruned stays 0."""
    representations = mixed(combine, MASKED)
    names = list(representations)
    sharded = shard(collection_of(representations, Optimizer.ADAGRAD), env, sharding)
    tables = {name: nn.Parameter(torch.empty(ROWS[name], DIM)) for name in names}
    with torch.no_grad():
        for name, table in tables.items():
            if name in PARTITIONS:
                fill_composed(table, PARTITIONS[name], combine, 0, name, 0.5)
            else:
                fill_uniform(table, 0, name, 0.5)
            table *= mask_of(name)
            assert torch.equal(sharded.embedding_bags[name].weight, table[mask_of(name)])
    optimizer = torch.optim.Adagrad(tables.values(), lr=0.5)
    for seed in range(STEPS):
        in_order, bags, weight = step(sharded, names, seed)
        rows = {name: table * mask_of(name) for name, table in tables.items()}
        expected = torch.cat([pooled(name, combine, rows[name], bags[name]) for name in names], dim=1)
        torch.testing.assert_close(in_order, expected, rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        (expected.sigmoid() * weight).sum().backward()
        (in_order.sigmoid() * weight).sum().backward()
        optimizer.step()
    for kernel in sharded.kernels():
        for part in kernel.parts():
            found, kept = kernel.dense_rows(part, 0, part.table.rows)
            assert kept is not None
            assert torch.equal(kept, mask_of(part.name))
            assert bool((found[~kept] == 0).all())
            torch.testing.assert_close(found[kept], tables[part.name][kept].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", SUMMED)
@pytest.mark.parametrize(
    "entries", [soft("feature"), soft("feature_dimension"), soft("table_dimension"), MASKED], ids=str
)
def test_a_checkpoint_loads_under_another_sharding(
    entries: SoftThreshold | Masked, combine: Combine, env: ShardingEnv, tmp_path: Path
) -> None:
    representations = mixed(combine, entries)
    names = list(representations)

    def states(sharded: Any) -> dict[str, Any]:
        return {"model": sharded.state_dict(), "optimizer": sharded.fused_optimizer.state_dict()}

    def train(sharded: Any, seed: int) -> Tensor:
        found, _, weight = step(sharded, names, seed)
        (found.sigmoid() * weight).sum().backward()
        return found.detach()

    kinds = ("row_wise" if combine == Combine.ADD else "table_wise", "data_parallel")
    saved, loaded = (
        shard(collection_of(representations, Optimizer.ADAM, seed), env, kind) for seed, kind in enumerate(kinds)
    )
    for seed in range(3):
        train(saved, seed)
    dcp.save(states(saved), checkpoint_id=tmp_path)
    state = states(loaded)
    dcp.load(state, checkpoint_id=tmp_path)
    loaded.load_state_dict(state["model"])
    loaded.fused_optimizer.load_state_dict(state["optimizer"])
    if entries is MASKED:
        (kept,) = own_parts(saved.state_dict()["embedding_bags.a.weight"])
        assert kept.shape == (int(mask_of("a").sum()),)
    for seed in (3, 4):
        torch.testing.assert_close(train(loaded, seed), train(saved, seed))


@pytest.mark.parametrize("entries", [soft("feature_dimension"), MASKED], ids=str)
def test_what_is_allowed(entries: SoftThreshold | Masked) -> None:
    columns = {"column_wise", "table_column_wise", "grid_shard"}
    never = columns if entries is MASKED else set()
    for combine, refused in [(Combine.ADD, never), (Combine.MULT, never | set(ROW_SPLIT))]:
        found = allowed_types(Composed(PARTITIONS, combine, entries), RowOptimizer())
        assert set(found) == set(SHARDING_TYPES) - refused


@pytest.mark.parametrize("entries", [soft("feature"), MASKED], ids=str)
def test_products_of_rows_on_several_ranks_are_refused(entries: SoftThreshold | Masked, env: ShardingEnv) -> None:
    collection = collection_of(mixed(Combine.MULT, entries))
    with pytest.raises(
        ValueError, match=r"table a, .* combine mult sends rows .* take one of table_wise.* combine add"
    ):
        shard(collection, env, "row_wise")


@pytest.mark.parametrize("entries", [soft("feature"), MASKED], ids=str)
def test_rows_side_by_side_are_refused(entries: SoftThreshold | Masked) -> None:
    with pytest.raises(ValueError, match=re.escape("combine add or mult, or take entries Dense()")):
        Composed(PARTITIONS, Combine.CONCAT, entries)


def test_entries_tell_representations_apart() -> None:
    plain, learned = Composed(PARTITIONS, Combine.ADD), Composed(PARTITIONS, Combine.ADD, soft("feature"))
    assert plain == Composed(dict(PARTITIONS), Combine.ADD, Dense())
    assert plain != learned
    assert hash(learned) == hash(Composed(dict(PARTITIONS), Combine.ADD, soft("feature")))


def test_thresholds_start_lower_for_buckets_of_frequent_ids(env: ShardingEnv) -> None:
    counts = {name: np.arange(n) % 13 for name, n in IDS.items()}
    sharded = shard(collection_of(mixed(Combine.MULT, soft("feature"))), env)
    search = SearchSpec(granularity="feature", threshold_init=-9.0, frequency_prior=2.0)
    start_thresholds(sharded, search, counts)
    logs: dict[str, Any] = {}
    for name, count in counts.items():
        logs[name] = np.log1p(count)
        if name in PARTITIONS:
            sums = np.zeros(ROWS[name])
            for number in range(IDS[name]):
                sums[PARTITIONS[name].rows_of(torch.tensor([number]))[0]] += count[number]
            logs[name] = np.log1p(sums)
    mean = np.concatenate(list(logs.values())).mean()
    for own in table_shards(sharded):
        np.testing.assert_allclose(own.threshold[:, 0].numpy(), -9 - 2 * (logs[own.name] - mean), rtol=1e-5)
