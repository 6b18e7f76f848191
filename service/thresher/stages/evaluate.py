"""Score the models on validation and test, at the precision in which they are served."""

from __future__ import annotations

from typing import Any

import torch

from thresher import rundir
from thresher.budget import Budget, budget_name
from thresher.data.loader import Loader
from thresher.embedding.path import PathTable
from thresher.methods.scheme import read_scheme
from thresher.progress import Progress
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages.frame import run_lease
from thresher.tables import load
from thresher.train.build import Job
from thresher.train.evaluation import evaluate
from thresher.train.group import Ranks, process_group
from thresher.train.trained import load_trained

_SPLITS = ("validation", "test")


def run(spec: Spec) -> None:
    """Write `metrics.json`: a row for the baseline and each budget, on validation and on test."""
    with process_group(spec) as ranks, run_lease(spec, "evaluate", ranks) as run_dir:
        meta = rundir.read_json(run_dir.data / "meta.json")
        total_params = sum(field["rows"] for field in meta["fields"]) * spec.model.dim
        budgets: list[Budget | None] = [None, *spec.prune.budgets]
        rows: list[dict[str, Any]] = []
        total = len(budgets) * len(_SPLITS)
        with Progress(run_dir.path, "evaluate", total, "split", enabled=ranks.first) as progress:
            for budget in budgets:
                job = load_trained(spec, meta, ranks, run_dir, budget)
                round_tables(job, spec.export.dtype)
                for split in _SPLITS:
                    rows.append(_row(spec, run_dir, ranks, job, budget, split, total_params))
                    progress.update(len(rows), auc=rows[-1]["auc"])
        if ranks.first:
            rundir.write_json(run_dir.metrics, rows)


@torch.no_grad()
def round_tables(job: Job, dtype: str) -> None:
    """Give the tables the values that their exported form holds."""
    narrow = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype)
    if narrow is not None:
        for kernel in job.collection.kernels():
            kernel.group.weights.copy_(kernel.group.weights.to(narrow))
        for module in job.model.modules():
            if isinstance(module, PathTable):  # its maps are in the dense part, which is exported as it is
                module.table.copy_(module.table.to(narrow))


def _row(
    spec: Spec, run_dir: RunDir, ranks: Ranks, job: Job, budget: Budget | None, split: str, total_params: int
) -> dict[str, Any]:
    loader = Loader(
        run_dir.data,
        split,
        batch_size=spec.train.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=spec.seed,
        shuffle=False,
    )
    score = evaluate(job, loader)
    name = "baseline" if budget is None else budget_name(budget)
    model = run_dir.baseline if budget is None else run_dir.model(name)
    trained = rundir.read_json(model / "model.json")
    tables = load(run_dir.tables(name))
    return {
        "model": spec.model.title,
        "method": trained["method"],
        "budget": budget,
        "seed": spec.seed,
        "split": split,
        "auc": score.auc,
        "logloss": score.logloss,
        "kept_params": total_params if budget is None else read_scheme(run_dir.scheme(name))["kept_params"],
        "total_params": total_params,
        "table_bytes": tables.table_bytes,
        "total_bytes": tables.total_bytes,
        "seconds": trained["seconds"],
    }
