"""Write the compact tables of the baseline and of every budget."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from thresher import rundir
from thresher.budget import Budget, budget_name
from thresher.embedding.fused import FusedEmbeddingBag, TablePart
from thresher.embedding.representation import Masked
from thresher.embedding.table_plan import TablePlan, path_name, projection_name
from thresher.methods.scheme import read_scheme
from thresher.methods.shared_rows import composition_of
from thresher.progress import Progress
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages.frame import building, inputs_of, run_lease
from thresher.tables import Writer
from thresher.train.build import Job
from thresher.train.group import Ranks, process_group
from thresher.train.trained import load_trained, model_plan

_CHUNK_ROWS = 1 << 16

Rows = tuple[NDArray[np.float32], NDArray[np.bool_] | None]


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
                        plan = model_plan(spec, meta, run_dir, budget)
                        job = load_trained(spec, meta, ranks, run_dir, budget)
                        _write(spec, meta, run_dir, job, budget, plan, kept, work)
                progress.update(done)


def _write(
    spec: Spec,
    meta: Mapping[str, Any],
    run_dir: RunDir,
    job: Job,
    budget: Budget | None,
    plan: TablePlan,
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
        name = field["name"]
        if name not in plan.fields:
            continue  # the field left the model
        own = plan.fields[name]
        rows, columns = own.shape(name, field["rows"])
        apart = job.dense.get(f"{path_name(job.fields_at, name)}.table")
        chunks = _table_rows(job, name, job.ranks) if apart is None else iter([(_numpy(apart), None)])
        if writer is None:
            for _ in chunks:
                pass
            continue
        masked = kept is not None and isinstance(own.representation, Masked)
        params = kept[name]["kept"] if kept and masked else rows * columns
        with writer.table(name, rows=rows, dim=columns, kept=params, dtype=spec.export.dtype) as table:
            for values_ND, mask_ND in _first_rows(chunks, rows):
                table.write(values_ND, mask_ND)
        projection = projection_name(job.fields_at, name)
        writer.field(
            name,
            table=name,
            kind=field["kind"],
            encoding=field["encoding"],
            pooling=field["pooling"],
            keys=_vocabulary(run_dir, field),
            composition=composition_of(own, name, field["rows"], job.fields_at),
            projection=projection if projection in job.dense else None,
        )
    if writer is not None:
        tables = plan.exported_apart(job.fields_at)
        writer.dense({name: _numpy(p) for name, p in job.dense.items() if name not in tables})
        writer.finish()


def _table_rows(job: Job, table: str, ranks: Ranks) -> Iterator[Rows]:
    """A table's rows in order, on the first rank; the other ranks send theirs and get nothing."""
    own = {
        (part.first_row, part.first_column): (kernel, part)
        for kernel in job.collection.kernels()
        for part in kernel.parts()
        if part.name == table and part.counted
    }
    spans: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks.world_size)]
    dist.all_gather_object(spans, [(row, part.table.rows, column) for (row, column), (_, part) in own.items()])
    in_order = sorted((*span, rank) for rank, parts in enumerate(spans) for span in parts)
    for (first, count), blocks in groupby(in_order, key=lambda span: span[:2]):
        owners = [(column, owner) for _, _, column, owner in blocks]
        for start in range(0, count, _CHUNK_ROWS):
            found = [_to_first(_cut(own.get((first, column)), start), owner, ranks) for column, owner in owners]
            if ranks.first:
                yield _beside(found)


def _cut(held: tuple[FusedEmbeddingBag, TablePart] | None, start: int) -> Rows | None:
    """A chunk of a part's rows, where this rank has it."""
    if held is None:
        return None
    kernel, part = held
    values, kept = kernel.dense_rows(part, start, start + _CHUNK_ROWS)
    return values.cpu().numpy(), None if kept is None else kept.cpu().numpy()


def _beside(blocks: list[Rows]) -> Rows:
    """Rows from blocks of their columns."""
    if len(blocks) == 1:
        return blocks[0]
    masks = [mask for _, mask in blocks if mask is not None]
    values = np.concatenate([values for values, _ in blocks], axis=1)
    return values, np.concatenate(masks, axis=1) if masks else None


def _to_first(rows: Rows | None, owner: int, ranks: Ranks) -> Rows:
    if owner != 0:
        box: list[Any] = [rows]
        if ranks.rank == owner:
            dist.send_object_list(box, dst=0)
        elif ranks.first:
            dist.recv_object_list(box, src=owner)
        rows = box[0]
    return rows  # type: ignore[return-value]


def _numpy(parameter: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = parameter.detach().cpu().numpy()
    return found


def _first_rows(chunks: Iterable[Rows], rows: int) -> Iterator[Rows]:
    """Rows without those at the end that no bucket has: what the side-by-side rows of `concat` fill up."""
    for values, mask in chunks:
        yield values[:rows], None if mask is None else mask[:rows]
        rows -= len(values[:rows])


def _vocabulary(run_dir: RunDir, field: Mapping[str, Any]) -> Any:
    """The keys of a field in the order of its rows, without the OOV row; none for a hashed field."""
    path = run_dir.data / "vocabulary" / f"{field['name']}.parquet"
    if not path.is_file():
        return None
    keys = pq.read_table(path, columns=["key"])["key"]
    return keys.to_numpy() if str(keys.type) == "int64" else keys.to_pylist()
