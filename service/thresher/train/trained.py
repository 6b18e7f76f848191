"""A trained model, loaded from a run directory onto the ranks of this job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thresher import rundir
from thresher.budget import Budget, budget_name
from thresher.embedding.table_plan import TablePlan
from thresher.methods.scheme import table_plan
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.train import checkpoint
from thresher.train.build import Job, build
from thresher.train.group import Ranks


def load_trained(spec: Spec, meta: Mapping[str, Any], ranks: Ranks, run: RunDir, budget: Budget | None) -> Job:
    """The baseline (`budget` None), or the model retrained under a budget, with its best weights.

    Raises:
        ValueError: if its checkpoint is missing or broken.
    """
    if budget is None:
        folder, plan = run.baseline, TablePlan.uniform([f["name"] for f in meta["fields"]], spec.model.dim)
    else:
        folder, plan = run.model(budget_name(budget)), table_plan(run.scheme(budget_name(budget)))
    job = build(spec, meta, ranks, plan, spec.train, table_seed=spec.seed, dense_seed=spec.seed)
    step = rundir.read_json(folder / "model.json")["step"]
    checkpoint.load(job, checkpoint.at(folder / "checkpoints", step), optimizers=False)
    return job
