"""The stages on two ranks: the same kinds of files, and the tables of the models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.conftest import make_spec
from tests.distributed.ranks import free_port, run_ranks
from tests.pipeline.exported import exported_ids
from thresher import rundir, tables
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages import evaluate, export, prepare, prune, retrain, search, train
from thresher.train.group import process_group
from thresher.train.trained import load_trained

pytestmark = pytest.mark.timeout(600)


def run_stages(spec: Spec, ports: list[int]) -> None:
    """What follows `prepare`, each stage in a process group of its own; one at an address that was in use hangs."""
    for stage, port in zip((train, search, retrain, export, evaluate), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        if stage is retrain and os.environ["RANK"] == "0":
            prune.run(spec)
        stage.run(spec)


@pytest.mark.parametrize("sharding", ["table_row_wise", "column_wise", "data_parallel"])
def test_two_ranks_export_what_they_trained(sharding: str, tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path / "run",
        train={"batch_size": 2000, "epochs": 1},
        search={"epochs": 1, "check_every": 5},
        prune={"budgets": [0.1]},
        export={"dtype": "fp32"},
        runtime={"run_dir": str(tmp_path / "run"), "sharding": sharding},
    )
    prepare.run(spec)
    run_ranks(2, run_stages, spec, [free_port() for _ in range(5)])

    run = RunDir(tmp_path / "run")
    kept = {row["budget"]: row["kept_params"] for row in rundir.read_json(run.metrics)}
    total = rundir.read_json(run.metrics)[0]["total_params"]
    assert kept == {None: total, 0.1: total // 10}
    meta = rundir.read_json(run.data / "meta.json")
    other = spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"sharding": "auto"})})
    with process_group(other) as ranks:  # one rank now
        for budget, name in [(None, "baseline"), (0.1, "0.1")]:
            exported = tables.load(run.tables(name))
            job: Any = load_trained(other, meta, ranks, run, budget)
            for kernel in job.collection.kernels():
                for part in kernel.parts():
                    ids = exported_ids(exported, run.data, part.name, np.arange(part.table.rows))
                    one_hot = exported.fields[part.name].kind != "multi"
                    bags = ids if one_hot else (ids, np.arange(part.table.rows + 1))
                    found = exported.embed({part.name: bags})[part.name]
                    assert np.array_equal(found, kernel.dense_rows(part, 0, len(ids))[0].numpy())
