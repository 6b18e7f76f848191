"""Write the compact tables of the baseline and of every budget."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from thresher import rundir
from thresher.budget import Budget, budget_name
from thresher.data.examples import read_raw
from thresher.data.vocabulary import read_keys
from thresher.embedding.representation import Masked, entries_of
from thresher.embedding.rows import Rows, table_rows
from thresher.embedding.table_plan import TablePlan, path_name, projection_name
from thresher.methods.scheme import read_scheme
from thresher.methods.shared_rows import composition_of
from thresher.progress import Progress
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages.frame import building, inputs_of, run_lease
from thresher.stages.golden import write_golden
from thresher.tables import Writer
from thresher.tables.format import ONNX
from thresher.train.build import Job, dense_graph, dense_part
from thresher.train.group import Ranks, process_group
from thresher.train.trained import load_trained, model_plan


def run(spec: Spec) -> None:
    """Write `tables/baseline/` and `tables/<budget>/`."""
    with process_group(spec) as ranks, run_lease(spec, "export", ranks) as run_dir:
        meta = rundir.read_json(run_dir.data / "meta.json")
        budgets: list[Budget | None] = [None, *spec.prune.budgets]
        with Progress(run_dir.path, "export", len(budgets), "model", enabled=ranks.first) as progress:
            for done, budget in enumerate(budgets, start=1):
                export_model(spec, meta, run_dir, ranks, budget)
                progress.update(done)


def export_model(spec: Spec, meta: Mapping[str, Any], run_dir: RunDir, ranks: Ranks, budget: Budget | None) -> None:
    """Write the tables of the baseline (`budget` None), or of the model under a budget, unless they are up to date.

    Raises:
        ValueError: if the exported tables score otherwise than the trained model.
    """
    name = "baseline" if budget is None else budget_name(budget)
    model = run_dir.baseline if budget is None else run_dir.model(name)
    inputs = inputs_of(spec, ["export"], data=run_dir.data, model=model)
    with building("export", run_dir.tables(name), inputs, ranks) as work:
        if work is not None:
            raw = read_raw(run_dir.data)
            kept = None if budget is None else read_scheme(run_dir.scheme(name))["tables"]
            plan = model_plan(spec, meta, run_dir, budget)
            job = load_trained(spec, meta, ranks, run_dir, budget)
            _write(spec, meta, run_dir, job, budget, plan, kept, raw["fields"], work)
            write_golden(spec, meta, job, raw["examples"], work)


def _write(
    spec: Spec,
    meta: Mapping[str, Any],
    run_dir: RunDir,
    job: Job,
    budget: Budget | None,
    plan: TablePlan,
    kept: Mapping[str, Any] | None,
    raw: Mapping[str, Any],
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
        name = field["name"]
        if name not in plan.fields:
            continue  # the field left the model
        own = plan.fields[name]
        rows, columns = own.shape(name, field["rows"])
        apart = job.dense.get(f"{path_name(job.fields_at, name)}.table")
        chunks = table_rows(job.collection, name) if apart is None else iter([(_numpy(apart), None)])
        if writer is None:
            for _ in chunks:
                pass
            continue
        masked = kept is not None and isinstance(entries_of(own.representation), Masked)
        composition = composition_of(own, name, field["rows"], job.fields_at)
        keys = read_keys(run_dir.data / "vocabulary" / f"{name}.parquet")
        with writer.table(
            name,
            dim=columns,
            rows_by_kept=kept[name]["rows_by_kept"] if kept and masked else [0] * columns + [rows],
            dtype=spec.export.dtype,
            layout=spec.export.layout,
            renumber=keys is not None and composition is None,
        ) as table:
            for values_ND, mask_ND in _first_rows(chunks, rows):
                table.write(values_ND, mask_ND)
        projection = projection_name(job.fields_at, name)
        writer.field(
            name,
            table=name,
            kind=field["kind"],
            encoding=field["encoding"],
            pooling=field["pooling"],
            keys=keys,
            composition=composition,
            projection=projection if projection in job.dense else None,
            **raw[name],
        )
    if writer is not None:
        tensors = dict(job.model.named_buffers()) | job.dense
        writer.dense({stored.name: _numpy(tensors[stored.name]) for stored in dense_part(spec, meta, plan)[0]})
        graph, why_not = dense_graph(spec, meta, plan)
        if why_not:
            print(f"export: no {ONNX}, so these tables cannot score: {why_not}", flush=True)  # noqa: T201
        writer.graph(graph, {name: raw[name]["column"] for name in meta["dense"]})
        writer.finish()


def _numpy(parameter: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = parameter.detach().cpu().numpy()
    return found


def _first_rows(chunks: Iterable[Rows], rows: int) -> Iterator[Rows]:
    """Rows without those at the end that no bucket has: what the side-by-side rows of `concat` fill up."""
    for values, mask in chunks:
        yield values[:rows], None if mask is None else mask[:rows]
        rows -= len(values[:rows])
