"""What ranks do in the distributed tests; importable by the processes that run it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thresher.data.loader import Loader
from thresher.embedding.representation import Dense, Masked, Representation, SoftThreshold
from thresher.methods.pep import exact_masks, table_shards
from thresher.rundir import read_json
from thresher.spec import Spec
from thresher.train import checkpoint
from thresher.train.build import Job, build
from thresher.train.evaluation import evaluate
from thresher.train.group import Ranks, process_group
from thresher.train.loop import train_step

STEPS = 12


def representation_of(name: str) -> Representation:
    """`dense`, `masked`, or a granularity."""
    if name in ("dense", "masked"):
        return Dense() if name == "dense" else Masked()
    return SoftThreshold(granularity=name, init=-4.0, learning_rate=0.01)  # type: ignore[arg-type]


def make_job(spec: Spec, data: Path, ranks: Ranks, name: str) -> Job:
    """A model with the seed's initial values."""
    return build(spec, read_json(data / "meta.json"), ranks, representation_of(name), spec.train, spec.seed, spec.seed)


def with_sharding(spec: Spec, sharding: str) -> Spec:
    """The spec under another sharding."""
    return spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"sharding": sharding})})


def loader(spec: Spec, data: Path, ranks: Ranks, split: str) -> Loader:
    """A split, shuffled if it is the training split."""
    return Loader(
        data, split, batch_size=spec.train.batch_size, rank=ranks.rank, world_size=ranks.world_size,
        seed=spec.seed, shuffle=split == "train",
    )  # fmt: skip


def global_loss(ranks: Ranks, value: float) -> float:
    """Mean loss over the samples of all ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / ranks.world_size


def losses(spec: Spec, data: Path, cases: list[tuple[str, str]]) -> dict[tuple[str, str], list[float]]:
    """The first losses for each (representation, sharding), with half of the pressure's way gone."""
    found = {}
    with process_group(spec) as ranks:
        for name, sharding in cases:
            job = make_job(with_sharding(spec, sharding), data, ranks, name)
            plan = job.collection.module_sharding_plan.values()
            assert {parameter.sharding_type.removesuffix("_shard") for parameter in plan} == {sharding}
            for kernel in job.collection.kernels():
                kernel.group.pressure = 0.5
            values: list[float] = []
            for step, batch in enumerate(loader(spec, data, ranks, "train").epoch(0)):
                if step == STEPS:
                    break
                values.append(global_loss(ranks, train_step(job, batch, step)))
            found[name, sharding] = values
    return found


def save_trained(spec: Spec, data: Path, names: list[str], folder: Path) -> dict[str, Any]:
    """For each representation train 20 steps, save, evaluate, and train 5 more."""
    found = {}
    with process_group(spec) as ranks:
        for name in names:
            job = make_job(spec, data, ranks, name)
            batches = loader(spec, data, ranks, "train").epoch(0)
            for step in range(20):
                train_step(job, next(batches), step)
            checkpoint.save(job, folder / name, 20, {}, keep=set())
            score = evaluate(job, loader(spec, data, ranks, "validation"))
            found[name] = score, [global_loss(ranks, train_step(job, next(batches), 20 + i)) for i in range(5)]
    return found


def load_trained(spec: Spec, data: Path, names: list[str], folder: Path) -> dict[str, Any]:
    """Load what `save_trained` saved, evaluate, and train the 5 steps that follow."""
    found = {}
    with process_group(spec) as ranks:
        for name in names:
            job = make_job(spec.model_copy(update={"seed": 99}), data, ranks, name)
            path = checkpoint.newest(folder / name)
            assert path is not None
            checkpoint.load(job, path)
            score = evaluate(job, loader(spec, data, ranks, "validation"))
            batches = loader(spec, data, ranks, "train").epoch(0, start_step=20)
            found[name] = score, [global_loss(ranks, train_step(job, next(batches), 20 + i)) for i in range(5)]
    return found


def masks(spec: Spec, data: Path, name: str, kept: int) -> dict[str, Any]:
    """Masks of a briefly trained model, whole tables put together from the ranks' shards."""
    with process_group(spec) as ranks:
        job = make_job(spec, data, ranks, name)
        batches = loader(spec, data, ranks, "train").epoch(0)
        for step in range(3):
            train_step(job, next(batches), step)
        shards = table_shards(job.collection)
        own = [(s.name, s.first_row, m.numpy()) for s, m in zip(shards, exact_masks(shards, 1.0, kept), strict=True)]
        gathered: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(gathered, own)
        parts: dict[str, Any] = {}
        for table, _, mask in sorted((part for rank in gathered for part in rank), key=lambda p: p[:2]):
            parts.setdefault(table, []).append(mask)
        return copy.deepcopy(parts)
