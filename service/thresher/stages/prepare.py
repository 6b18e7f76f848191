"""Prepare: raw files become `<run>/data/`."""

from __future__ import annotations

import shutil
from typing import Any

from thresher.budget import budget_params
from thresher.data.formats import open_source
from thresher.data.prepare import prepare
from thresher.progress import Progress
from thresher.rundir import RunDir, read_json
from thresher.spec import Spec
from thresher.stages.frame import building, inputs_of, run_lease

FORMAT = 1  # of the prepared data; a higher one makes older data anew


def inputs(spec: Spec) -> dict[str, Any]:
    """What the prepared data are made from: the spec's data section, the seed, and the state of each raw file.

    Raises:
        ValueError: if a file is not there.
    """
    states = []
    for file in open_source(spec.data, spec.seed).files:
        state = file.stat()
        states.append([str(file.resolve()), state.st_size, state.st_mtime_ns])
    return {"format": FORMAT, **inputs_of(spec, ["data"]), "files": states}


def run(spec: Spec) -> None:
    """Prepare the data of a spec, unless they are there already.

    Raises:
        ValueError: if spec and data do not fit; lists every difference that the first rows show. Or if a budget cannot
            be met by tables of this size: better said now than after the training.
    """
    with run_lease(spec, "prepare") as run_dir:
        _prepare(spec, run_dir)
        _check_budgets(spec, read_json(run_dir.data / "meta.json")["fields"])


def _check_budgets(spec: Spec, fields: list[dict[str, Any]]) -> None:
    ids = {field["name"]: field["rows"] for field in fields}
    total_params = sum(ids.values()) * spec.model.dim
    budgets = [own for own in spec.prune.budgets if not isinstance(own, str)]  # bytes count what the search builds, too
    kept = [(budget, budget_params(budget, total_params)) for budget in budgets]
    if spec.search.method == "pep" and spec.search.partitions:
        from thresher.methods.compositional import check_pruned, to_prune  # with torch, which else nothing here needs

        stacked = to_prune(fields, spec.model.dim, spec.search).params(ids)
        for budget, params in kept:
            check_pruned(budget, params, stacked, spec.search)


def _prepare(spec: Spec, run_dir: RunDir) -> None:
    made_from = inputs(spec)
    with building("prepare", run_dir.data, made_from) as work:
        if work is None:
            return
        for left in work.iterdir():  # half of a run that was cut off is of no use
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        with Progress(run_dir.path, stage="prepare", total=None, unit="row") as progress:
            prepare(spec, work, progress.update)
        if inputs(spec) != made_from:
            raise ValueError(f"{spec.data.path}: a file changed while it was read; run prepare again")
