"""Partitions in every combination through the stages on real data: budgets, and that exports are the model's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.distributed.conftest import make_spec
from tests.distributed.ranks import free_port, run_ranks
from tests.pipeline.exported import exported_ids
from thresher import rundir, tables, trust
from thresher.budget import Budget, budget_name, budget_params
from thresher.data.loader import Loader
from thresher.models.fields import Fields
from thresher.rundir import RunDir
from thresher.spec import ModelSpec, Spec
from thresher.stages import evaluate, export, prepare, prune, report, retrain, search, train
from thresher.train.group import process_group
from thresher.train.trained import load_trained

pytestmark = pytest.mark.timeout(600)

PARTITIONED = [
    (method, combine)
    for method in ("quotient_remainder", "mixed_radix", "chinese_remainder")
    for combine in ("add", "mult", "concat", "feature", "path")
]
METHODS = [("remainder", "mult"), ("double_hash", "mult"), *PARTITIONED]


def spec_for(run_dir: Path, budget: Budget = 0.3, **search_options: Any) -> Spec:
    return make_spec(
        run_dir,
        train={"batch_size": 4000, "epochs": 1, "embedding_learning_rate": 0.01},
        search={"epochs": 1, "check_every": 5, "threshold": 10, **search_options},
        prune={"budgets": [budget]},
        export={"dtype": "fp32", "onnx": False},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with data and a baseline, which no method changes."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    for stage in (prepare, train):
        stage.run(spec_for(run_dir))
    return run_dir


def finish(trained: Path, run_dir: Path, budget: Budget = 0.3, **search_options: Any) -> Spec:
    shutil.copytree(trained, run_dir)
    spec = spec_for(run_dir, budget, **search_options)
    for stage in (search, prune, retrain, export, evaluate, report):
        stage.run(spec)
    return spec


def assert_exported_vectors_are_the_models(spec: Spec, budget: Budget) -> None:
    run = RunDir(Path(spec.runtime.run_dir))
    exported = tables.load(run.tables(budget_name(budget)))
    batch = next(Loader(run.data, "test", batch_size=500, rank=0, world_size=1, seed=3, shuffle=False).epoch(0))
    with process_group(spec) as ranks:
        job = load_trained(spec, rundir.read_json(run.data / "meta.json"), ranks, run, budget)
        fields = next(module for module in job.model.modules() if isinstance(module, Fields))
        vectors = dict(zip(fields.names, fields(batch.sparse), strict=True))
    expected: dict[str, Any] = {}
    for name, vector in vectors.items():  # a field's partitions, one after the other
        expected.setdefault(name.partition(":")[0], []).append(vector.detach().numpy())
    assert list(exported.fields) == list(expected)
    for name, field in exported.fields.items():
        jagged = batch.sparse[name]
        ids = exported_ids(exported, run.data, name, jagged.values().numpy())
        found = exported.embed({name: (ids, jagged.offsets().numpy()) if field.kind == "multi" else ids})[name]
        model = np.concatenate(expected[name], axis=1)
        path = field.composition is not None and field.composition.combine == "path"
        if field.kind != "multi" and not path and field.projection is None:
            assert np.array_equal(found, model), name
        else:  # a sum may be in another order
            np.testing.assert_allclose(found, model, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("method", "combine"), METHODS)
def test_every_method_exports_what_it_trained(method: str, combine: str, trained: Path, tmp_path: Path) -> None:
    spec = finish(trained, tmp_path / "run", method=method, combine=combine)
    run = RunDir(tmp_path / "run")
    assert_exported_vectors_are_the_models(spec, 0.3)
    scheme = rundir.read_json(run.scheme("0.3") / "scheme.json")
    wanted = budget_params(0.3, scheme["total_params"])
    assert scheme["wanted_params"] == wanted
    if not scheme["why_not_exact"]:
        assert scheme["kept_params"] == wanted
    assert scheme["kept_params"] <= wanted
    rows = [row for row in rundir.read_json(run.metrics) if row["budget"] is not None]
    assert [row["kept_params"] for row in rows] == [scheme["kept_params"]] * 2
    assert all(0.5 < row["auc"] < 0.9 for row in rows)
    if combine != "concat":
        assert wanted - scheme["kept_params"] < (4 if method == "chinese_remainder" else 1) * spec.model.dim
    assert len([t for t in scheme["tables"].values() if t["representation"] == "composed"]) >= 2
    assert run.report.is_file()


def test_paths_may_have_a_hidden_layer(trained: Path, tmp_path: Path) -> None:
    options = {"method": "quotient_remainder", "combine": "path"}
    spec = finish(trained, tmp_path / "run", **options, path_hidden=3)
    assert_exported_vectors_are_the_models(spec, 0.3)
    exported = tables.load(RunDir(tmp_path / "run").tables("0.3"))
    composition = exported.fields["item_id"].composition
    assert composition is not None
    assert composition.maps is not None
    buckets = composition.partitions[1][1]
    shapes = [exported.dense[name].shape for name in composition.maps[0]]
    assert shapes == [(buckets, 3, 4), (buckets, 3), (buckets, 4, 3)]


class OwnModel(nn.Module):
    """A user's model, which keeps its fields under a name of its own."""

    equal_dims = True

    def __init__(self, fields: Fields, numeric: int, spec: ModelSpec) -> None:
        super().__init__()
        del numeric
        self.inputs = fields
        self.out = nn.Linear(len(fields.names) * spec.dim, 1)

    def forward(self, sparse: KeyedJaggedTensor, dense_BN: Tensor) -> Tensor:
        """Logits [B]."""
        del dense_BN
        out: Tensor = self.out(self.inputs.stacked(sparse).flatten(1)).squeeze(1)
        return out


@pytest.mark.parametrize("method", ["quotient_remainder", "mde"])
def test_a_users_model_may_have_its_fields_anywhere(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(trust.VARIABLE, "1")
    spec = spec_for(tmp_path / "run", method=method, combine="path")
    model = spec.model.model_copy(update={"factory": f"{__name__}:OwnModel"})
    spec = spec.model_copy(update={"model": model})
    for stage in (prepare, train, search, prune, retrain, export, evaluate):
        stage.run(spec)
    assert_exported_vectors_are_the_models(spec, 0.3)
    exported = tables.load(RunDir(tmp_path / "run").tables("0.3"))
    assert exported.dense.keys() > {"out.weight"}
    apart = [name for name in exported.dense if name.startswith("inputs.")]
    assert apart
    assert not [name for name in apart if name.endswith(".table")]


def run_stages(spec: Spec, ports: list[int]) -> None:
    """What follows `prepare`, each stage in a process group of its own; one at an address that was in use hangs."""
    for stage, port in zip((train, search, retrain, export, evaluate), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        if stage is retrain and os.environ["RANK"] == "0":
            prune.run(spec)
        stage.run(spec)


@pytest.mark.parametrize(
    ("method", "combine", "sharding"),
    [
        ("quotient_remainder", "mult", "auto"),
        ("chinese_remainder", "concat", "data_parallel"),
        ("mixed_radix", "add", "row_wise"),
        ("mixed_radix", "feature", "row_wise"),
        ("quotient_remainder", "path", "auto"),
        ("double_hash", "mult", "row_wise"),
    ],
)
def test_two_ranks_export_what_they_trained(method: str, combine: str, sharding: str, tmp_path: Path) -> None:
    spec = spec_for(tmp_path / "run", method=method, combine=combine)
    spec = spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"ranks": 2, "sharding": sharding})})
    prepare.run(spec)
    run_ranks(2, run_stages, spec, [free_port() for _ in range(5)])
    one = spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"sharding": "auto"})})
    assert_exported_vectors_are_the_models(one, 0.3)
    rows = rundir.read_json(RunDir(tmp_path / "run").metrics)
    assert all(0.5 < row["auc"] < 0.9 for row in rows)


@pytest.mark.parametrize("combine", ["mult", "concat"])
def test_a_budget_in_bytes_is_kept(combine: str, trained: Path, tmp_path: Path) -> None:
    spec = finish(trained, tmp_path / "run", "80kB", method="mixed_radix", combine=combine)
    found = tables.load(RunDir(tmp_path / "run").tables("80kB"))
    assert 70_000 < found.total_bytes <= 80_000
    assert_exported_vectors_are_the_models(spec, "80kB")
