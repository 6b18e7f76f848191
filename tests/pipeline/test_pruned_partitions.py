"""PEP on tables of partitions through the stages on real data: budgets, zeros, and that exports are the model's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed.ranks import free_port, run_ranks
from tests.pipeline.exported import exported_ids
from tests.pipeline.test_partitioned import assert_exported_vectors_are_the_models, run_stages, spec_for
from thresher import rundir, tables
from thresher.budget import Budget, budget_params
from thresher.embedding.representation import SoftThreshold
from thresher.methods.compositional import to_prune
from thresher.methods.scheme import table_plan
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages import evaluate, export, prepare, prune, report, retrain, search, train
from thresher.tables.format import unpack_masks
from thresher.train.build import build
from thresher.train.group import process_group

pytestmark = pytest.mark.timeout(600)

OPTIONS = {"method": "pep", "partitions": "quotient_remainder", "combine": "mult", "collisions": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with data and a baseline, which no option changes."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    for stage in (prepare, train):
        stage.run(spec_for(run_dir))
    return run_dir


def finish(trained: Path, run_dir: Path, budget: Budget, **options: Any) -> Spec:
    shutil.copytree(trained, run_dir)
    spec = spec_for(run_dir, budget, **OPTIONS | options)
    for stage in (search, prune, retrain, export, evaluate, report):
        stage.run(spec)
    return spec


@pytest.mark.parametrize(
    ("partitions", "combine", "granularity"),
    [
        ("quotient_remainder", "mult", "feature_dimension"),
        ("quotient_remainder", "add", "table"),
        ("mixed_radix", "mult", "dimension"),
        ("chinese_remainder", "add", "feature"),
        ("remainder", "mult", "feature_dimension"),
    ],
)
def test_the_budget_is_kept_and_exports_are_the_models(
    partitions: str, combine: str, granularity: str, trained: Path, tmp_path: Path
) -> None:
    options = {"partitions": partitions, "combine": combine, "granularity": granularity}
    spec = finish(trained, tmp_path / "run", 0.15, **options)
    run = RunDir(tmp_path / "run")
    scheme = rundir.read_json(run.scheme("0.15") / "scheme.json")
    assert scheme["kept_params"] == scheme["wanted_params"] == budget_params(0.15, scheme["total_params"])
    shared = {name: table for name, table in scheme["tables"].items() if "partitions" in table}
    assert {"user_id", "item_id"} <= set(shared) < set(scheme["tables"])
    stacked = sum(table["rows"] * table["dim"] for table in scheme["tables"].values())
    assert scheme["kept_params"] < stacked < 0.45 * scheme["total_params"]
    assert_exported_vectors_are_the_models(spec, 0.15)
    rows = [row for row in rundir.read_json(run.metrics) if row["budget"] is not None]
    assert [row["kept_params"] for row in rows] == [scheme["kept_params"]] * 2
    assert all(0.5 < row["auc"] < 0.9 for row in rows)
    assert run.report.is_file()
    found, masks = tables.load(run.tables("0.15")), load_file(run.scheme("0.15") / "masks.safetensors")
    for name, table in found.tables.items():
        values_ND = found._tables[name].lookup(exported_ids(found, run.data, name, np.arange(table.rows)))
        assert values_ND.shape == (scheme["tables"][name]["rows"], spec.model.dim)
        assert (values_ND[~unpack_masks(masks[name], spec.model.dim)] == 0).all()
        assert np.count_nonzero(values_ND) <= scheme["tables"][name]["kept"]
        composition = found.fields[name].composition
        assert (composition is not None) == (name in shared)
        if composition is not None:
            assert composition.combine == combine
            assert composition.ids == shared[name]["ids"]


def test_retraining_rewinds_to_what_the_search_started_from(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    spec = spec_for(tmp_path / "run", 0.15, **OPTIONS)
    for stage in (search, prune):
        stage.run(spec)
    run = RunDir(tmp_path / "run")
    meta = rundir.read_json(run.data / "meta.json")
    plans = [to_prune(meta["fields"], spec.model.dim, spec.search, SoftThreshold()), table_plan(run.scheme("0.15"))]
    rows: list[dict[str, Any]] = []
    with process_group(spec) as ranks:
        for plan in plans:
            job = build(spec, meta, ranks, plan, spec.train, spec.seed, spec.seed)
            for kernel in job.collection.kernels():
                kernel.group.pressure = -100.0  # thresholds of nothing
            rows.append(
                {
                    part.name: kernel.dense_rows(part, 0, part.table.rows)
                    for kernel in job.collection.kernels()
                    for part in kernel.parts()
                }
            )
    for name, (kept_ND, mask_ND) in rows[1].items():
        assert (kept_ND == rows[0][name][0] * mask_ND).all()
        assert mask_ND.any()


def test_a_budget_in_bytes_is_kept(trained: Path, tmp_path: Path) -> None:
    spec = finish(trained, tmp_path / "run", "60kB")
    found = tables.load(RunDir(tmp_path / "run").tables("60kB"))
    assert 55_000 < found.total_bytes <= 60_000
    assert_exported_vectors_are_the_models(spec, "60kB")


def test_a_budget_of_more_than_the_buckets_have_names_the_mend(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    message = (
        "prune.budgets: 0.5 keeps 7,142 parameters, but with search.collisions 3 the tables have no more than 4,864"
    )
    for stage in (prepare, search):
        with pytest.raises(ValueError, match=re.escape(message) + "; take fewer collisions"):
            stage.run(spec_for(tmp_path / "run", 0.5, **OPTIONS))
    with pytest.raises(ValueError, match=r"prune\.budgets: 79kB keeps .* take fewer collisions"):
        search.run(spec_for(tmp_path / "run", "79kB", **OPTIONS))


@pytest.mark.parametrize(("combine", "sharding"), [("mult", "auto"), ("mult", "column_wise"), ("add", "row_wise")])
def test_two_ranks_export_what_they_trained(combine: str, sharding: str, tmp_path: Path) -> None:
    spec = spec_for(tmp_path / "run", 0.15, **OPTIONS | {"combine": combine})
    spec = spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"ranks": 2, "sharding": sharding})})
    prepare.run(spec)
    run_ranks(2, run_stages, spec, [free_port() for _ in range(5)])
    one = spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"sharding": "auto"})})
    assert_exported_vectors_are_the_models(one, 0.15)
    scheme = rundir.read_json(RunDir(tmp_path / "run").scheme("0.15") / "scheme.json")
    assert scheme["kept_params"] == scheme["wanted_params"]
