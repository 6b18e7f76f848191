"""Search: what the method must look at or train to know what stays. Methods that need neither leave a note."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from thresher import rundir
from thresher.budget import Budget, budget_bytes, budget_name
from thresher.embedding.representation import SoftThreshold
from thresher.embedding.table_plan import TablePlan
from thresher.methods.compositional import to_prune
from thresher.methods.magnitude import magnitude_masks
from thresher.methods.masks import ShardMask, gather_masks, write_masks
from thresher.methods.pep import Pressure, start_thresholds
from thresher.methods.serving_bytes import ServingBytes
from thresher.methods.sseds import saliency
from thresher.progress import Progress
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages.frame import building, inputs_of, run_lease
from thresher.stages.train import loaders
from thresher.train.build import build
from thresher.train.group import Ranks, process_group
from thresher.train.loop import Trainer, fit
from thresher.train.trained import load_trained

LOOKS_AT_BASELINE = frozenset({"magnitude", "sseds"})


def run(spec: Spec) -> None:
    """Write `search/`: search.json, and what the method found: masks/<budget>.safetensors, or saliency.json."""
    with process_group(spec) as ranks, run_lease(spec, "search", ranks) as run_dir:
        upstream = {"data": run_dir.data}
        if spec.search.method in LOOKS_AT_BASELINE:
            upstream["baseline"] = run_dir.baseline
        inputs = inputs_of(spec, ["model", "train", "search", "prune", "export"], **upstream)
        with building("search", run_dir.search, inputs, ranks) as work:
            if work is None:
                return
            meta = rundir.read_json(run_dir.data / "meta.json")
            search = {"pep": _pep, "magnitude": _magnitude, "sseds": _sseds}.get(spec.search.method, _nothing)
            found = search(spec, meta, run_dir, ranks, work)
            if ranks.first:
                rundir.write_json(work / "search.json", {"method": spec.search.method, **found})


def _pep(spec: Spec, meta: Mapping[str, Any], run_dir: RunDir, ranks: Ranks, work: Path) -> dict[str, Any]:
    """Learn the thresholds, and take a mask as each budget is reached."""
    train = spec.train.model_copy(update={"epochs": spec.search.epochs})
    representation = SoftThreshold(
        granularity=spec.search.granularity,
        init=spec.search.threshold_init,
        learning_rate=spec.search.threshold_learning_rate,
        weight_decay=spec.search.threshold_weight_decay,
    )
    plan = to_prune(meta["fields"], spec.model.dim, spec.search, representation)
    sizes = ServingBytes(spec, meta, run_dir)
    budgets = {budget_name(budget): budget for budget in spec.prune.budgets}
    kept = {name: sizes.masked_params(budget, plan) for name, budget in budgets.items()}
    job = build(spec, meta, ranks, plan, train, table_seed=spec.seed, dense_seed=spec.seed)
    start_thresholds(job.collection, spec.search, _counts(meta, run_dir))
    training, validation = loaders(spec, run_dir, ranks)
    total = train.epochs * training.steps_per_epoch
    pressure = Pressure(
        job.collection,
        spec.search,
        kept,
        total_params=plan.params(sizes.rows),
        total_steps=total,
        take=lambda budget, masks_of: _write_masks(work, budgets[budget], plan, sizes, kept[budget], masks_of),
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
    return {
        "step": trainer.step,
        "stalled": trainer.search["stalled"],
        "validation": trainer.history,
        "seconds": round(trainer.seconds, 3),
    }


def _magnitude(spec: Spec, meta: Mapping[str, Any], run_dir: RunDir, ranks: Ranks, work: Path) -> dict[str, Any]:
    """Rank the uniform model's values."""
    began = time.monotonic()
    job = load_trained(spec, meta, ranks, run_dir, None)
    counts, sizes = _counts(meta, run_dir), ServingBytes(spec, meta, run_dir)
    plan = to_prune(meta["fields"], spec.model.dim, spec.search)
    masks_of = partial(magnitude_masks, job.collection, counts)
    for budget in spec.prune.budgets:
        _write_masks(work, budget, plan, sizes, sizes.masked_params(budget, plan), masks_of)
    return {"seconds": round(time.monotonic() - began, 3)}


def _sseds(spec: Spec, meta: Mapping[str, Any], run_dir: RunDir, ranks: Ranks, work: Path) -> dict[str, Any]:
    """One pass over a few batches of training samples."""
    job = load_trained(spec, meta, ranks, run_dir, None)
    training, _ = loaders(spec, run_dir, ranks)
    batches = list(islice(training.epoch(0), spec.search.batches))
    began = time.monotonic()
    found_FD, count = saliency(job, batches)
    seconds = time.monotonic() - began
    trained = rundir.read_json(run_dir.baseline / "model.json")
    step_s = trained["seconds"] / max(trained["steps"], 1)
    if ranks.first:
        names = [field["name"] for field in meta["fields"]]
        rundir.write_json(work / "saliency.json", dict(zip(names, found_FD.tolist(), strict=True)))
    return {
        "batches": count,
        "seconds": round(seconds, 4),
        "training_steps_worth": round(seconds / step_s, 2) if step_s else None,
    }


def _nothing(*_: Any) -> dict[str, Any]:
    return {"seconds": 0.0}


def _write_masks(
    work: Path,
    budget: Budget,
    plan: TablePlan,
    sizes: ServingBytes,
    params: int,
    masks_of: Callable[[int], list[ShardMask]],
) -> None:
    """Write the masks of a budget.

    Where it is in bytes, `params` of them fit wherever they are; what rows that keep nothing save goes to further
    entries, until less than a hundredth of them would fit still.
    """
    wanted = budget_bytes(budget)
    if wanted is not None:
        low, high = params, plan.params(sizes.rows) + 1
        while high - low > max(1, low // 100):
            middle = (low + high) // 2
            masks = gather_masks(masks_of(middle))
            box = [masks is None or sizes.masked(plan, masks) <= wanted]
            dist.broadcast_object_list(box, src=0)
            low, high = (middle, high) if box[0] else (low, middle)
        params = low
    write_masks(work / "masks" / f"{budget_name(budget)}.safetensors", masks_of(params))


def _counts(meta: Mapping[str, Any], run_dir: RunDir) -> dict[str, NDArray[np.int64]]:
    """Training occurrences of each id, by field."""
    return {f["name"]: np.load(run_dir.data / "counts" / f"{f['name']}.npy") for f in meta["fields"]}
