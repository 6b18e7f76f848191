"""The stages on two ranks with row-wise shards: the same kinds of files, and the tables of the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.conftest import make_spec
from tests.distributed.ranks import run_ranks
from thresher import rundir, tables
from thresher.kernels import reference
from thresher.rundir import RunDir
from thresher.stages import evaluate, export, prepare, prune, retrain, search, train
from thresher.train.group import process_group
from thresher.train.trained import load_trained

pytestmark = pytest.mark.timeout(600)


def test_two_row_wise_ranks_export_what_they_trained(tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path / "run",
        train={"batch_size": 2000, "epochs": 1},
        search={"epochs": 1, "check_every": 5},
        prune={"budgets": [0.1]},
        export={"dtype": "fp32"},
        runtime={"run_dir": str(tmp_path / "run"), "sharding": "row_wise"},
    )
    prepare.run(spec)
    for stage in (train, search):  # a stage has processes of its own, as under torchrun
        run_ranks(2, stage.run, spec)
    prune.run(spec)
    for stage in (retrain, export, evaluate):
        run_ranks(2, stage.run, spec)

    run = RunDir(tmp_path / "run")
    kept = {row["budget"]: row["kept_params"] for row in rundir.read_json(run.metrics)}
    total = rundir.read_json(run.metrics)[0]["total_params"]
    assert kept == {None: total, 0.1: total // 10}
    meta = rundir.read_json(run.data / "meta.json")
    with process_group(spec) as ranks:  # one rank now
        for budget, name in [(None, "baseline"), (0.1, "0.1")]:
            exported = tables.load(run.tables(name))
            job: Any = load_trained(spec, meta, ranks, run, budget)
            for kernel in job.collection.kernels():
                for part, table, _ in kernel.shards():
                    ids = np.arange(part.rows)
                    one_hot = exported.fields[table].kind != "multi"
                    found = exported.embed({table: ids if one_hot else (ids, np.arange(part.rows + 1))})[table]
                    assert np.array_equal(found, reference.elements(kernel.group.weights, part).numpy())
