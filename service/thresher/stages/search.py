"""Search with PEP: learn the thresholds, and take a mask as each budget is reached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from thresher import rundir
from thresher.embedding.representation import SoftThreshold
from thresher.methods.gathering import gather_masks
from thresher.methods.pep import Pressure, TableShard, start_thresholds
from thresher.methods.scheme import save_masks
from thresher.progress import Progress
from thresher.spec import Spec
from thresher.stages.frame import building, inputs_of, run_lease
from thresher.stages.train import loaders
from thresher.train.build import build
from thresher.train.group import process_group
from thresher.train.loop import Trainer, fit


def run(spec: Spec) -> None:
    """Write `search/`: the last checkpoint, masks/<budget>.safetensors, history.json and search.json."""
    with process_group(spec) as ranks, run_lease(spec, "search", ranks) as run_dir:
        inputs = inputs_of(spec, ["model", "train", "search", "prune"], data=run_dir.data)
        with building("search", run_dir.search, inputs, ranks) as work:
            if work is None:
                return
            meta = rundir.read_json(run_dir.data / "meta.json")
            train = spec.train.model_copy(update={"epochs": spec.search.epochs})
            representation = SoftThreshold(
                granularity=spec.search.granularity,
                init=spec.search.threshold_init,
                learning_rate=spec.search.threshold_learning_rate,
                weight_decay=spec.search.threshold_weight_decay,
            )
            job = build(spec, meta, ranks, representation, train, table_seed=spec.seed, dense_seed=spec.seed)
            counts = {f["name"]: np.load(run_dir.data / "counts" / f"{f['name']}.npy") for f in meta["fields"]}
            start_thresholds(job.collection, spec.search, counts)
            training, validation = loaders(spec, run_dir, ranks)
            total = train.epochs * training.steps_per_epoch
            pressure = Pressure(
                job.collection,
                spec.search,
                spec.prune.budgets,
                total_params=sum(field["rows"] for field in meta["fields"]) * spec.model.dim,
                total_steps=total,
                take=lambda budget, shards, masks: _write_masks(work, budget, shards, masks),
            )

            def before_step(trainer: Trainer, loss: float) -> None:
                pressure(trainer.search, trainer.step, loss)

            with Progress(run_dir.path, "search", total, "step", enabled=ranks.first) as progress:
                trainer = fit(
                    job, training, validation, work / "checkpoints", progress, before_step=before_step, stop_early=False
                )
            if ranks.first:
                for budget in trainer.search["stalled"]:
                    print(f"search: sparsity stalled above budget {budget}; its mask is taken by ranking", flush=True)  # noqa: T201
                rundir.write_json(work / "history.json", trainer.search["history"])
                rundir.write_json(
                    work / "search.json",
                    {"step": trainer.step, "stalled": trainer.search["stalled"], "validation": trainer.history},
                )


def _write_masks(work: Path, budget: str, shards: list[TableShard], masks: list[Tensor]) -> None:
    """Bring a budget's masks from all ranks to the first, as bits, and write them."""
    whole = gather_masks(shards, masks)
    if whole is not None:
        save_masks(work / "masks" / f"{budget}.safetensors", whole)
