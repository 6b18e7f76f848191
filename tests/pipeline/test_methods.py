"""Every method through all stages on real data: budgets, and exports that equal what was trained."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.conftest import make_spec
from tests.distributed.ranks import free_port, run_ranks
from tests.pipeline.exported import exported_ids
from thresher import rundir, tables
from thresher.data.loader import Loader
from thresher.models.fields import Fields
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages import evaluate, export, prepare, prune, report, retrain, search, train
from thresher.train import loop
from thresher.train.build import Job
from thresher.train.group import process_group
from thresher.train.loop import Trainer
from thresher.train.trained import load_trained

pytestmark = pytest.mark.timeout(600)

AFTER_TRAINING = [search, prune, retrain, export, evaluate]
METHODS = ["magnitude", "sseds", "mde", "uniform"]


def spec_for(run_dir: Path, method: str, **sections: Any) -> Spec:
    """A job of seconds."""
    return make_spec(
        run_dir,
        **{
            "train": {"batch_size": 2000, "epochs": 1},
            "search": {"method": method, "epochs": 1, "check_every": 5},
            "prune": {"budgets": [0.5]},
            "export": {"dtype": "fp32", "onnx": False},
        }
        | sections,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with data and the uniform model, which all methods share."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    spec = spec_for(folder, "uniform")
    for stage in (prepare, train):
        stage.run(spec)
    return folder


def assert_exports_equal(spec: Spec, budget: str) -> None:
    """What the exported tables give is what the trained model works with, for each field that stayed."""
    run = RunDir(Path(spec.runtime.run_dir))
    exported = tables.load(run.tables(budget))
    batch = next(Loader(run.data, "test", batch_size=500, rank=0, world_size=1, seed=3, shuffle=False).epoch(0))
    with process_group(spec) as ranks:
        job = load_trained(spec, rundir.read_json(run.data / "meta.json"), ranks, run, spec.prune.budgets[0])
        fields = next(module for module in job.model.modules() if isinstance(module, Fields))
        vectors = dict(zip(fields.names, fields(batch.sparse), strict=True))
    for name, field in exported.fields.items():
        jagged = batch.sparse[name]
        ids = exported_ids(exported, run.data, name, jagged.values().numpy())
        found = exported.embed({name: (ids, jagged.offsets().numpy()) if field.kind == "multi" else ids})[name]
        np.testing.assert_allclose(found, vectors[name].detach().numpy(), rtol=1e-6, atol=1e-7)
    assert set(exported.fields) == set(vectors)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_its_budget_and_exports_what_it_trained(method: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    spec = spec_for(tmp_path / "run", method)
    for stage in [*AFTER_TRAINING, report]:
        stage.run(spec)
    run = RunDir(tmp_path / "run")
    scheme = rundir.read_json(run.scheme("0.5") / "scheme.json")
    assert scheme["method"] == method
    assert scheme["wanted_params"] == scheme["total_params"] // 2
    assert bool(scheme["why_not_exact"]) == (scheme["kept_params"] != scheme["wanted_params"])
    assert 0.8 * scheme["wanted_params"] < scheme["kept_params"] <= scheme["wanted_params"]
    row = rundir.read_json(run.metrics)[-1]
    assert (row["method"], row["budget"], row["split"]) == (method, 0.5, "test")
    assert (row["kept_params"], row["total_params"]) == (scheme["kept_params"], scheme["total_params"])
    assert row["auc"] > 0.6
    assert_exports_equal(spec, "0.5")
    assert run.report.stat().st_size > 10_000


def test_magnitude_may_keep_the_dense_part_of_the_model_it_looked_at(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    spec = spec_for(tmp_path / "run", "magnitude", retrain={"dense": "keep"})
    started: list[dict[str, Any]] = []

    def fit(job: Job, *args: Any, **kwargs: Any) -> Trainer:
        started.append({name: parameter.detach().clone().numpy() for name, parameter in job.dense.items()})
        return loop.fit(job, *args, **kwargs)

    monkeypatch.setattr(retrain, "fit", fit)
    for stage in (search, prune, retrain):
        stage.run(spec)
    run = RunDir(tmp_path / "run")
    with process_group(spec) as ranks:
        left = load_trained(spec, rundir.read_json(run.data / "meta.json"), ranks, run, None).dense
    for name, parameter in left.items():
        assert np.array_equal(started[0][name], parameter.detach().numpy())


def test_fields_without_columns_leave_the_model(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    search_spec = {"method": "sseds", "rank": "saliency"}
    spec = spec_for(tmp_path / "run", "sseds", search=search_spec, prune={"budgets": [60]})
    for stage in AFTER_TRAINING:
        stage.run(spec)
    run = RunDir(tmp_path / "run")
    columns = {name: t["columns"] for name, t in rundir.read_json(run.scheme("60p") / "scheme.json")["tables"].items()}
    left = {name for name, d in columns.items() if d}
    assert 0 < len(left) < len(columns)
    assert set(tables.load(run.tables("60p")).fields) == left
    assert_exports_equal(spec, "60p")


def test_sseds_says_what_it_cost(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    search.run(spec_for(tmp_path / "run", "sseds"))
    found = rundir.read_json(tmp_path / "run" / "search" / "search.json")
    assert found["batches"] == 1
    assert 0 < found["seconds"] < 5
    assert found["training_steps_worth"] > 0


@pytest.mark.parametrize("method", ["pep", "magnitude", "sseds"])
@pytest.mark.parametrize("budget", ["60kB", "75kB"])
def test_a_budget_in_bytes_holds_for_all_files_together(
    budget: str, method: str, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    spec = spec_for(
        tmp_path / "run", method, prune={"budgets": [budget]}, retrain={"epochs": 1}, export={"dtype": "fp32"}
    )
    for stage in AFTER_TRAINING:
        stage.run(spec)
    row = rundir.read_json(RunDir(tmp_path / "run").metrics)[-1]
    wanted = int(budget[:2]) * 1000
    assert row["total_bytes"] <= wanted
    if (method, budget) != ("sseds", "60kB"):  # there the next column would bring the vocabulary of a further field
        assert row["total_bytes"] > (0.85 if method == "sseds" else 0.97) * wanted


def saliency_on(spec: Spec, port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    search.run(spec)


def test_sseds_finds_the_same_on_1_2_and_4_ranks(trained: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2, 4):
        shutil.copytree(trained, tmp_path / f"run{ranks}")
        spec = spec_for(tmp_path / f"run{ranks}", "sseds", search={"method": "sseds", "batches": 3})
        run_ranks(ranks, saliency_on, spec, free_port())
        saliency = rundir.read_json(tmp_path / f"run{ranks}" / "search" / "saliency.json")
        prune.run(spec)
        scheme = rundir.read_json(RunDir(tmp_path / f"run{ranks}").scheme("0.5") / "scheme.json")
        found.append((np.array(list(saliency.values())), scheme["tables"]))
    for saliency_FD, chosen in found[1:]:
        np.testing.assert_allclose(saliency_FD, found[0][0], rtol=1e-4)
        assert chosen == found[0][1]


def run_after_training(spec: Spec, ports: list[int]) -> None:
    """The stages, each in a process group of its own."""
    for stage, port in zip(AFTER_TRAINING, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        if stage is not prune:
            stage.run(spec)
        elif os.environ["RANK"] == "0":
            prune.run(spec)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_on_two_ranks(method: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    spec = spec_for(tmp_path / "run", method)
    run_ranks(2, run_after_training, spec, [free_port() for _ in AFTER_TRAINING])
    assert_exports_equal(spec, "0.5")
