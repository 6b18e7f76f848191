"""Train the uniform model: the baseline of every comparison."""

from __future__ import annotations

from pathlib import Path

from thresher import rundir
from thresher.budget import Budget
from thresher.data.loader import Loader
from thresher.embedding.table_plan import TablePlan
from thresher.progress import Progress
from thresher.spec import Spec
from thresher.stages.frame import building, inputs_of, run_lease
from thresher.train.build import build
from thresher.train.group import Ranks, process_group
from thresher.train.loop import Trainer, fit


def run(spec: Spec) -> None:
    """Write `baseline/`: the checkpoint of the best validation, and history.json."""
    with process_group(spec) as ranks, run_lease(spec, "train", ranks) as run_dir:
        inputs = inputs_of(spec, ["model", "train"], data=run_dir.data)
        with building("train", run_dir.baseline, inputs, ranks) as work:
            if work is None:
                return
            meta = rundir.read_json(run_dir.data / "meta.json")
            plan = TablePlan.uniform([field["name"] for field in meta["fields"]], spec.model.dim)
            job = build(spec, meta, ranks, plan, spec.train, table_seed=spec.seed, dense_seed=spec.seed)
            training, validation = loaders(spec, run_dir, ranks)
            total = spec.train.epochs * training.steps_per_epoch
            with Progress(run_dir.path, "train", total, "step", enabled=ranks.first) as progress:
                trainer = fit(job, training, validation, work / "checkpoints", progress)
            if ranks.first:
                rundir.write_json(work / "history.json", trainer.history)
                write_model(work, trainer, budget=None, method="uniform")


def write_model(work: Path, trainer: Trainer, budget: Budget | None, method: str) -> None:
    """Say which checkpoint of a finished training is the model, and how it came to be."""
    rundir.write_json(
        work / "model.json",
        {
            "step": trainer.best_step,  # of the checkpoint
            "steps": trainer.step,
            "budget": budget,
            "method": method,
            "seconds": round(trainer.seconds, 3),
        },
    )


def loaders(spec: Spec, run_dir: rundir.RunDir, ranks: Ranks) -> tuple[Loader, Loader]:
    """Shuffled training samples, and validation samples in order."""
    shared = {
        "batch_size": spec.train.batch_size,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "seed": spec.seed,
    }
    return (
        Loader(run_dir.data, "train", shuffle=True, **shared),
        Loader(run_dir.data, "validation", shuffle=False, **shared),
    )
