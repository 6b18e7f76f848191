"""Write the compact tables of the baseline and of every budget."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from thresher import rundir
from thresher.budget import Budget, budget_name
from thresher.embedding.rows import table_rows
from thresher.methods.scheme import read_scheme
from thresher.progress import Progress
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages.frame import building, inputs_of, run_lease
from thresher.tables import Writer
from thresher.train.build import Job
from thresher.train.group import process_group
from thresher.train.trained import load_trained


def run(spec: Spec) -> None:
    """Write `tables/baseline/` and `tables/<budget>/`."""
    with process_group(spec) as ranks, run_lease(spec, "export", ranks) as run_dir:
        meta = rundir.read_json(run_dir.data / "meta.json")
        budgets: list[Budget | None] = [None, *spec.prune.budgets]
        with Progress(run_dir.path, "export", len(budgets), "model", enabled=ranks.first) as progress:
            for done, budget in enumerate(budgets, start=1):
                name = "baseline" if budget is None else budget_name(budget)
                model = run_dir.baseline if budget is None else run_dir.model(name)
                inputs = inputs_of(spec, ["export"], data=run_dir.data, model=model)
                with building("export", run_dir.tables(name), inputs, ranks) as work:
                    if work is not None:
                        kept = None if budget is None else read_scheme(run_dir.scheme(name))["tables"]
                        job = load_trained(spec, meta, ranks, run_dir, budget)
                        _write(spec, meta, run_dir, job, budget, kept, work)
                progress.update(done)


def _write(
    spec: Spec,
    meta: Mapping[str, Any],
    run_dir: RunDir,
    job: Job,
    budget: Budget | None,
    kept: Mapping[str, Any] | None,
    work: Path,
) -> None:
    """Stream every table's rows from the ranks that hold them to the first, which writes."""
    writer = None
    if job.ranks.first:
        shutil.rmtree(work)  # what an interrupted export left; tables are written from the start
        writer = Writer(
            work,
            model=spec.model.title,
            seed=spec.seed,
            budget=budget,
            spec_fingerprint=rundir.fingerprint(spec.model_dump(mode="json")),
        )
    for field in meta["fields"]:
        name, rows = field["name"], field["rows"]
        dim = kept[name]["columns"] if kept else spec.model.dim
        if not dim:
            continue  # the field left the model
        chunks = table_rows(job.collection, name)
        if writer is None:
            for _ in chunks:
                pass
            continue
        with writer.table(
            name, rows=rows, dim=dim, kept=kept[name]["kept"] if kept else rows * dim, dtype=spec.export.dtype
        ) as table:
            for values_ND, mask_ND in chunks:
                table.write(values_ND, mask_ND)
        writer.field(
            name,
            table=name,
            kind=field["kind"],
            encoding=field["encoding"],
            pooling=field["pooling"],
            keys=_vocabulary(run_dir, field),
        )
    if writer is not None:
        writer.dense({name: p.detach().cpu().numpy() for name, p in job.dense.items()})
        writer.finish()


def _vocabulary(run_dir: RunDir, field: Mapping[str, Any]) -> Any:
    """The keys of a field in the order of its rows, without the OOV row; none for a hashed field."""
    path = run_dir.data / "vocabulary" / f"{field['name']}.parquet"
    if not path.is_file():
        return None
    keys = pq.read_table(path, columns=["key"])["key"]
    return keys.to_numpy() if str(keys.type) == "int64" else keys.to_pylist()
