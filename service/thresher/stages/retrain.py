"""Retrain what is left: initial values times the mask, and what was pruned stays exactly 0."""

from __future__ import annotations

from pathlib import Path

from thresher import rundir
from thresher.budget import budget_name
from thresher.methods.scheme import read_scheme, table_plan
from thresher.progress import Progress
from thresher.rundir import RunDir
from thresher.spec import Spec, TrainSpec
from thresher.stages.frame import building, inputs_of, run_lease
from thresher.stages.train import loaders, write_model
from thresher.train import checkpoint
from thresher.train.build import build
from thresher.train.group import process_group
from thresher.train.loop import fit

_OTHER_SEED = 1 << 32  # apart from all seeds that a spec may give


def run(spec: Spec) -> None:
    """Write `models/<budget>/` for every budget: the checkpoint of the best validation, and history.json."""
    with process_group(spec) as ranks, run_lease(spec, "retrain", ranks) as run_dir:
        meta = rundir.read_json(run_dir.data / "meta.json")
        train = retrain_spec(spec)
        training, validation = loaders(spec, run_dir, ranks)
        steps = train.epochs * training.steps_per_epoch
        table_seed = spec.seed if spec.retrain.init == "rewind" else spec.seed + _OTHER_SEED
        dense_seed = spec.seed if spec.retrain.dense == "rewind" else spec.seed + _OTHER_SEED
        with Progress(
            run_dir.path, "retrain", steps * len(spec.prune.budgets), "step", enabled=ranks.first
        ) as progress:
            for number, budget in enumerate(spec.prune.budgets):
                name = budget_name(budget)
                scheme = run_dir.scheme(name)
                inputs = inputs_of(spec, ["model", "train", "retrain"], data=run_dir.data, scheme=scheme)
                with building("retrain", run_dir.model(name), inputs, ranks) as work:
                    if work is None:
                        continue
                    job = build(spec, meta, ranks, table_plan(scheme), train, table_seed, dense_seed)
                    if spec.retrain.dense == "keep":
                        checkpoint.load_dense(job, _left_by_the_search(spec, run_dir))
                    trainer = fit(job, training, validation, work / "checkpoints", progress, done_before=number * steps)
                    if ranks.first:
                        rundir.write_json(work / "history.json", trainer.history)
                        write_model(work, trainer, budget, read_scheme(scheme)["method"])


def _left_by_the_search(spec: Spec, run_dir: RunDir) -> Path:
    """The checkpoint of the model that the method looked at last: its own, or, where it trained none, the baseline."""
    trained = run_dir.search if spec.search.method == "pep" else run_dir.baseline
    name = "search.json" if spec.search.method == "pep" else "model.json"
    return checkpoint.at(trained / "checkpoints", rundir.read_json(trained / name)["step"])


def retrain_spec(spec: Spec) -> TrainSpec:
    """How the retraining trains: as the baseline, but for what the spec says of it."""
    own = spec.retrain.model_dump(include={"epochs", "embedding_learning_rate", "embedding_weight_decay"})
    return spec.train.model_copy(update={key: value for key, value in own.items() if value is not None})
