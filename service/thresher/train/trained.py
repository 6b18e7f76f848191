"""A trained model, loaded from a run directory onto the ranks of this job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thresher import rundir
from thresher.embedding.representation import Dense, Masked, Representation
from thresher.methods.scheme import MASKS, SchemeMasks
from thresher.rundir import RunDir
from thresher.spec import Spec, budget_name
from thresher.train import checkpoint
from thresher.train.build import Job, build
from thresher.train.group import Ranks


def load_trained(spec: Spec, meta: Mapping[str, Any], ranks: Ranks, run: RunDir, budget: float | int | None) -> Job:
    """The baseline (`budget` None), or the model retrained under a budget, with its best weights.

    Raises:
        ValueError: if its checkpoint is missing or broken.
    """
    folder = run.baseline if budget is None else run.model(budget_name(budget))
    representation: Representation = Dense()
    if budget is not None:
        representation = Masked(SchemeMasks(run.scheme(budget_name(budget)) / MASKS))
    job = build(spec, meta, ranks, representation, spec.train, table_seed=spec.seed, dense_seed=spec.seed)
    step = rundir.read_json(folder / "model.json")["step"]
    checkpoint.load(job, checkpoint.at(folder / "checkpoints", step), optimizers=False)
    return job
