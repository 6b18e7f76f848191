"""What ranks do in the distributed tests; importable by the processes that run it."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingEnv,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.masks import RandomMasks
from thresher.data.loader import Loader
from thresher.embedding.collection import EmbeddingBagCollection
from thresher.embedding.partitions import Partitions
from thresher.embedding.planning import make_plan
from thresher.embedding.replicated import gather_batch
from thresher.embedding.representation import Composed, Dense, Masked, Representation, SoftThreshold
from thresher.embedding.sharding import Sharder
from thresher.embedding.table_plan import FieldTable, TablePlan
from thresher.kernels import layout
from thresher.kernels.layout import Combine
from thresher.methods.pep import exact_masks, table_shards
from thresher.rundir import read_json
from thresher.spec import Spec
from thresher.train import checkpoint
from thresher.train.build import Job, build
from thresher.train.evaluation import evaluate
from thresher.train.group import Ranks, process_group
from thresher.train.loop import train_step

STEPS = 10
Case = tuple[str, str, str]  # representation, update rule of the tables, sharding


def representation_of(name: str, dim: int, rows: dict[str, int]) -> Representation | dict[str, Representation]:
    """`dense`, `masked`, a granularity, or a combine, beside which the smallest tables stay plain.

    A combine may be `of` one of the others: `mult of masked`.
    """
    combine, _, entries = name.partition(" of ")
    if combine in ("add", "mult", "concat"):
        own: Any = representation_of(entries or "dense", dim, rows)
        partitions = {table: partitions_of(combine, n) for table, n in rows.items() if n > 9}
        composed = Composed(partitions, Combine[combine.upper()], own)
        return {table: composed if table in partitions else own for table in rows}
    if name in ("dense", "masked"):
        return Dense() if name == "dense" else Masked(RandomMasks(dim))
    return SoftThreshold(granularity=name, init=-4.0, learning_rate=0.01)  # type: ignore[arg-type]


def partitions_of(combine: str, n: int) -> Partitions:
    """Two for the smaller tables and three for the others; five to share five columns."""
    if combine == "concat":
        return Partitions.chinese_remainder(n, [2, 3, 5, 7, 11])
    return Partitions.quotient_remainder(n, 16) if n < 900 else Partitions.chinese_remainder(n, [11, 13, 17])


def make_job(spec: Spec, data: Path, ranks: Ranks, name: str) -> Job:
    """A model with the seed's initial values; under the sharding `mixed` with a plan of its own."""
    with ExitStack() as stack:
        if spec.runtime.sharding == "mixed":
            stack.enter_context(mock.patch("thresher.train.build.make_plan", mixed_plan))
        meta = read_json(data / "meta.json")
        rows = {field["name"]: field["rows"] for field in meta["fields"]}
        representation = representation_of(name, spec.model.dim, rows)
        own = representation if isinstance(representation, dict) else dict.fromkeys(rows, representation)
        plan = TablePlan(spec.model.dim, {table: FieldTable(spec.model.dim, own[table]) for table in rows})
        return build(spec, meta, ranks, plan, spec.train, spec.seed, spec.seed)


def mixed_plan(model: nn.Module, *_: Any, **__: Any) -> ShardingPlan:
    """For 2 ranks: the tables in turn on every rank, on the second only, and in blocks of columns, two on one rank."""
    plan = EmbeddingModuleShardingPlan()
    ((path, collection),) = (
        (path, module) for path, module in model.named_modules() if isinstance(module, EmbeddingBagCollection)
    )
    for number, config in enumerate(collection.embedding_bag_configs()):
        kind, ranks, widths = [
            (ShardingType.DATA_PARALLEL, [0, 1], [5, 5]),
            (ShardingType.TABLE_WISE, [1], [5]),
            (ShardingType.COLUMN_WISE, [1, 0, 1], [2, 1, 2]),
        ][number % 3]
        starts = itertools.accumulate([0, *widths])
        spec = (
            EnumerableShardingSpec(
                [
                    ShardMetadata([0, start], [config.num_embeddings, width], f"rank:{rank}/cpu")
                    for rank, width, start in zip(ranks, widths, starts, strict=False)
                ]
            )
            if kind != ShardingType.DATA_PARALLEL
            else None
        )
        plan[config.name] = ParameterSharding(kind.value, "fused", ranks, spec)
    return ShardingPlan({path: plan})


def with_sharding(spec: Spec, sharding: str) -> Spec:
    """The spec under another sharding."""
    return spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"sharding": sharding})})


def with_rule(spec: Spec, rule: str, far: float = 20.0) -> Spec:
    """The spec with another update rule; SGD steps far, so that a gradient of the wrong size shows."""
    rate = far if rule == "sgd" else 1e-3
    train = spec.train.model_copy(update={"embedding_optimizer": rule, "embedding_learning_rate": rate})
    return spec.model_copy(update={"train": train})


def loader(spec: Spec, data: Path, ranks: Ranks, split: str) -> Loader:
    """A split, shuffled if it is the training split."""
    train = split == "train"
    return Loader(
        data, split, batch_size=spec.train.batch_size if train else 2400, rank=ranks.rank, world_size=ranks.world_size,
        seed=spec.seed, shuffle=train,
    )  # fmt: skip


def global_loss(ranks: Ranks, value: float) -> float:
    """Mean loss over the samples of all ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / ranks.world_size


def losses(spec: Spec, data: Path, cases: list[Case]) -> dict[Case, tuple[list[float], list[float]]]:
    """The last losses of an epoch in each case, halfway up the pressure, and the last gradient of shared thresholds.

    The gradient stands for itself, as Adam forgives one of the wrong size.
    """
    found = {}
    with process_group(spec) as ranks:
        assert_batches_of_any_size_are_gathered(ranks)
        for name, rule, sharding in cases:
            far = 2.0 if name.startswith("mult") else 20.0  # products diverge sooner
            job = make_job(with_rule(with_sharding(spec, sharding), rule, far), data, ranks, name)
            kinds = {plan.sharding_type.removesuffix("_shard") for plan in job.collection.module_sharding_plan.values()}
            assert kinds == {sharding} or sharding == "mixed"
            for kernel in job.collection.kernels():
                kernel.group.pressure = 0.5
            values: list[float] = []
            training = loader(spec, data, ranks, "train")
            for step, batch in enumerate(training.epoch(0, start_step=training.steps_per_epoch - STEPS)):
                values.append(global_loss(ranks, train_step(job, batch, step)))
            grads = [p.grad for p in job.collection.shared_thresholds.values()]
            found[name, rule, sharding] = values, [float(g) for grad in grads for g in grad]
            if sharding == "data_parallel":
                assert_replicas_are_equal(job)
    return found


def assert_batches_of_any_size_are_gathered(ranks: Ranks) -> None:
    """Rank r has r samples of two features, bags of 0, 1, … ids, so that the first rank has none."""

    def batch(rank: int) -> tuple[list[list[list[int]]], Tensor]:
        bags = [[[100 * feature + 10 * rank + bag] * bag for bag in range(rank)] for feature in range(2)]
        return bags, torch.full((rank, 3), float(rank))

    def flat(bags: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
        every = [bag for feature in bags for bag in feature]
        offsets = torch.tensor([0, *itertools.accumulate(map(len, every))])
        return torch.tensor([number for bag in every for number in bag], dtype=torch.int64), offsets

    own, grad = batch(ranks.rank)
    ids, offsets = flat(own)
    found = gather_batch(ids, offsets, ids.float() / 2, grad, 2, dist.group.WORLD)
    batches = [batch(rank) for rank in range(ranks.world_size)]
    all_ids, all_offsets = flat([[bag for bags, _ in batches for bag in bags[feature]] for feature in range(2)])
    assert found.factors is not None
    assert torch.equal(found.indices, all_ids)
    assert torch.equal(found.offsets, all_offsets)
    assert torch.equal(found.factors, all_ids.float() / 2)
    assert torch.equal(found.grad, torch.cat([grad for _, grad in batches]))
    assert torch.equal(found.indices[found.own_ids], ids)


def assert_replicas_are_equal(job: Job) -> None:
    """Bit for bit, with all of their state."""
    for kernel in job.collection.kernels():
        group = kernel.group
        for tensor in (group.weights, *group.weight_states, group.thresholds, *group.threshold_states, group.seen):
            first = tensor.clone()
            dist.broadcast(first, src=0)
            assert torch.equal(first, tensor)


def seen_entries(job: Job) -> int:
    """Entries of all tables whose rows training saw; every block of a row's columns must know it."""
    found = torch.zeros(1, dtype=torch.int64)
    for kernel in job.collection.kernels():
        for part in kernel.parts():
            if kernel.group.seen.numel() and part.counted:
                found += layout.per_row(kernel.group.seen, part.table).sum() * part.table.dim
    dist.all_reduce(found)
    return int(found)


def save_trained(spec: Spec, data: Path, cases: list[tuple[str, str]], folder: Path) -> dict[tuple[str, str], Any]:
    """For each representation and sharding train 20 steps, save, look, and train 3 more."""
    found = {}
    with process_group(spec) as ranks:
        for name, sharding in cases:
            job = make_job(with_sharding(spec, sharding), data, ranks, name)
            batches = loader(spec, data, ranks, "train").epoch(0)
            for step in range(20):
                train_step(job, next(batches), step)
            checkpoint.save(job, folder / sharding / name, 20, {}, keep=set())
            found[name, sharding] = look_and_train_on(spec, data, ranks, job)
    return found


def load_trained(spec: Spec, data: Path, cases: list[tuple[str, str, str]], folder: Path) -> dict[Any, Any]:
    """For each representation, sharding that was saved and sharding: load, look, and train the 3 steps that follow."""
    found = {}
    with process_group(spec) as ranks:
        for name, saved, sharding in cases:
            job = make_job(with_sharding(spec.model_copy(update={"seed": 99}), sharding), data, ranks, name)
            path = checkpoint.newest(folder / saved / name)
            assert path is not None
            checkpoint.load(job, path)
            found[name, saved, sharding] = look_and_train_on(spec, data, ranks, job)
    return found


def look_and_train_on(spec: Spec, data: Path, ranks: Ranks, job: Job) -> tuple[int, float, list[float]]:
    """Entries that training saw, log loss of the validation samples, and the losses of steps 20 to 22."""
    seen = seen_entries(job)
    score = evaluate(job, loader(spec, data, ranks, "validation")).logloss
    batches = loader(spec, data, ranks, "train").epoch(0, start_step=20)
    return seen, score, [global_loss(ranks, train_step(job, next(batches), 20 + i)) for i in range(3)]


POOLED = {  # sharding on several ranks, where one has all tables table-wise; pooling; features
    "plain_mean": ("row_wise", PoolingType.MEAN, ["a", "shared"]),
    "plain_sum": ("row_wise", PoolingType.SUM, ["b"]),
    "whole_mean": ("table_wise", PoolingType.MEAN, ["c"]),
    "whole_sum": ("table_wise", PoolingType.SUM, ["d", "shared"]),
    "composed_mean": ("row_wise", PoolingType.MEAN, ["e"]),
    "composed_sum": ("table_row_wise", PoolingType.SUM, ["f"]),
}


def pooled(spec: Spec) -> dict[str, np.ndarray]:
    """This rank's share of 8 samples, looked up in tables that differ in sharding, pooling and representation."""
    composed = Composed(
        {name: Partitions.quotient_remainder(40, 7) for name in POOLED if name.startswith("composed")}, Combine.MULT
    )
    tables = [
        EmbeddingBagConfig(name=name, feature_names=features, num_embeddings=40, embedding_dim=4, pooling=pooling)
        for name, (_, pooling, features) in POOLED.items()
    ]
    own = {name: composed if name in composed.partitions else Dense() for name in POOLED}
    generator = torch.Generator().manual_seed(0)
    keys = ["shared", *"fedcba"]
    bags = {key: [torch.randint(0, 40, (i % 4,), generator=generator) for i in range(8)] for key in keys}
    with process_group(spec) as ranks:
        collection = EmbeddingBagCollection(tables, own, init_scale=1.0)
        model = nn.ModuleDict({"tables": collection})
        plan = EmbeddingModuleShardingPlan()
        for name, (kind, *_) in POOLED.items():
            of_kind = make_plan(
                model, kind if ranks.world_size > 1 else "table_wise", world_size=ranks.world_size,
                local_world_size=ranks.world_size, device_type="cpu", batch_size=8,
            )  # fmt: skip
            plan[name] = of_kind.plan["tables"][name]  # type: ignore[index]
        sharded = Sharder().shard(collection, plan, ShardingEnv.from_process_group(dist.group.WORLD), ranks.device)
        mine = [bag for key in keys for bag in bags[key][ranks.rank :: ranks.world_size]]
        out: Any = sharded(KeyedJaggedTensor(keys, torch.cat(mine), lengths=torch.tensor([len(bag) for bag in mine])))
        return {key: value.detach().numpy() for key, value in out.wait().to_dict().items()}


def masks(spec: Spec, data: Path, name: str, kept: int) -> dict[str, Any]:
    """Masks of a briefly trained model, whole tables put together from the ranks' parts."""
    with process_group(spec) as ranks:
        job = make_job(spec, data, ranks, name)
        batches = loader(spec, data, ranks, "train").epoch(0)
        for step in range(3):
            train_step(job, next(batches), step)
        shards = table_shards(job.collection)
        own = [
            (s.name, s.first_row, s.first_column, m.numpy())
            for s, m in zip(shards, exact_masks(shards, 1.0, kept), strict=True)
        ]
        gathered: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(gathered, own)
        whole = {
            c.name: np.zeros((c.num_embeddings, c.embedding_dim), bool) for c in job.collection._embedding_bag_configs
        }
        for table, row, column, mask in (part for rank in gathered for part in rank):
            whole[table][row : row + mask.shape[0], column : column + mask.shape[1]] = mask
        return whole
