"""Turn what the search found into schemes: exactly the parameters that stay, a scheme for each budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from thresher.budget import Budget, budget_bytes, budget_name
from thresher.embedding.table_plan import FieldTable, TablePlan
from thresher.methods import compositional
from thresher.methods.columns import Columns, mde, uniform
from thresher.methods.scheme import describe, describe_masked, describe_narrow, describe_shared, write_scheme
from thresher.methods.serving_bytes import ServingBytes
from thresher.methods.shared_rows import composition_of
from thresher.methods.sseds import choose
from thresher.progress import Progress
from thresher.rundir import RunDir, read_json
from thresher.spec import Spec
from thresher.stages.frame import building, inputs_of, run_lease

Tables = dict[str, dict[str, Any]]


def run(spec: Spec) -> None:
    """Write `schemes/<budget>/` for every budget.

    Raises:
        ValueError: if a mask does not hold its budget to the parameter, or nothing can stay under a budget.
    """
    with (
        run_lease(spec, "prune") as run_dir,
        Progress(run_dir.path, "prune", len(spec.prune.budgets), "budget") as progress,
    ):
        meta = read_json(run_dir.data / "meta.json")
        inputs = inputs_of(spec, ["model", "search", "prune", "export"], search=run_dir.search)
        sizes = ServingBytes(spec, meta, run_dir)
        make = {"pep": _masked, "magnitude": _masked}.get(spec.search.method, _narrow)
        if spec.search.method in compositional.METHODS:
            make = _composed
        for done, budget in enumerate(spec.prune.budgets, start=1):
            with building("prune", run_dir.scheme(budget_name(budget)), inputs) as work:
                if work is not None:
                    make(spec, meta, run_dir, sizes, budget, work)
            progress.update(done)


def _masked(
    spec: Spec, meta: Mapping[str, Any], run_dir: RunDir, sizes: ServingBytes, budget: Budget, work: Path
) -> None:
    """The search took masks: single entries stay."""
    plan = compositional.to_prune(meta["fields"], spec.model.dim, spec.search)
    name = budget_name(budget)
    by_name = load_file(run_dir.search / "masks" / f"{name}.safetensors")
    packed = {field["name"]: by_name[field["name"]] for field in meta["fields"]}  # in the model's order
    tables = {}
    for field in meta["fields"]:
        table = field["name"]
        composition = composition_of(plan.fields[table], table, field["rows"])
        tables[table] = describe_masked(packed[table], spec.model.dim, composition)
    kept = sum(table["kept"] for table in tables.values())
    most_bytes = budget_bytes(budget)
    if most_bytes is not None:
        if sizes.masked(plan, packed) > most_bytes:
            raise ValueError(f"{run_dir.search}: the mask for budget {name} takes more bytes; run search again")
    elif kept != (wanted := sizes.masked_params(budget, plan)):
        raise ValueError(
            f"{run_dir.search}: the mask for budget {name} keeps {kept} parameters, not {wanted}; run search again"
        )
    write_scheme(work, _describe(spec, meta, budget, tables, kept, ""), packed)


def _narrow(
    spec: Spec, meta: Mapping[str, Any], run_dir: RunDir, sizes: ServingBytes, budget: Budget, work: Path
) -> None:
    """Fields get fewer columns."""
    rows = {field["name"]: field["rows"] for field in meta["fields"]}
    columns_within = _columns_within(spec, rows, run_dir)

    def plan(columns: Columns) -> TablePlan:
        # Uniform tables make a smaller model; others keep its width, and narrow tables go through projections.
        dim = max(columns.values()) if spec.search.method == "uniform" else spec.model.dim
        return TablePlan(dim, {name: FieldTable(d) for name, d in columns.items() if d})

    wanted = sizes.params_within(budget, lambda params: sizes.unmasked(plan(columns_within(params)[0])))
    columns, why = columns_within(wanted)
    tables = {name: describe_narrow(rows[name], d, spec.model.dim) for name, d in columns.items()}
    write_scheme(work, _describe(spec, meta, budget, tables, wanted, why) | {"dim": plan(columns).dim}, None)


def _columns_within(spec: Spec, rows: Mapping[str, int], run_dir: RunDir) -> Callable[[int], tuple[Columns, str]]:
    """How the method shares out a number of parameters."""
    search, dim = spec.search, spec.model.dim
    if search.method == "uniform":
        return lambda params: uniform(rows, dim, params)
    if search.method == "mde":
        return lambda params: mde(rows, dim, params, search.alpha)
    found = read_json(run_dir.search / "saliency.json")
    saliency_FD: NDArray[np.float64] = np.array([found[name] for name in rows])
    return lambda params: choose(saliency_FD, rows, params, search.rank)


def _composed(
    spec: Spec, meta: Mapping[str, Any], run_dir: RunDir, sizes: ServingBytes, budget: Budget, work: Path
) -> None:
    """Ids share the rows of buckets."""
    del run_dir
    rows, dim = {field["name"]: field["rows"] for field in meta["fields"]}, spec.model.dim

    def choose(params: int) -> tuple[dict[str, FieldTable], str]:
        return compositional.choose(meta["fields"], dim, params, spec.search)

    wanted = sizes.params_within(budget, lambda params: sizes.unmasked(TablePlan(dim, choose(params)[0])))
    fields, why = choose(wanted)
    tables = {
        name: describe_shared(name, rows[name], table) if table.is_shared else describe_narrow(rows[name], dim, dim)
        for name, table in fields.items()
    }
    write_scheme(work, _describe(spec, meta, budget, tables, wanted, why), None)


def _describe(
    spec: Spec, meta: Mapping[str, Any], budget: Budget, tables: Tables, wanted: int, why: str
) -> dict[str, Any]:
    total_params = sum(field["rows"] for field in meta["fields"]) * spec.model.dim
    return describe(budget, spec.search.method, tables, spec.model.dim, total_params, wanted, why)
