"""The stages one after the other on real data, in one process: what they write, and what they do with it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.conftest import make_spec
from tests.pipeline.exported import exported_ids
from thresher import rundir, tables
from thresher.budget import budget_name, budget_params
from thresher.data.loader import Loader
from thresher.kernels.layout import unpack_masks
from thresher.methods.scheme import SchemeMasks
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages import evaluate, export, prepare, prune, retrain, search, train
from thresher.tables.golden import GOLDEN
from thresher.train import loop
from thresher.train.group import process_group
from thresher.train.trained import load_trained

BUDGETS = [0.5, 0.07, 321]
STAGES = [prepare, train, search, prune, retrain, export, evaluate]


def spec_for(run_dir: Path, **sections: Any) -> Spec:
    """A job of seconds."""
    return make_spec(
        run_dir,
        **{
            "train": {"batch_size": 2000, "epochs": 2},
            "search": {"epochs": 1, "check_every": 5},
            "prune": {"budgets": BUDGETS},
            "export": {"dtype": "fp32", "onnx": False},
        }
        | sections,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """A run with all stages done."""
    spec = spec_for(tmp_path_factory.mktemp("run") / "run")
    for stage in STAGES:
        stage.run(spec)
    return spec


@pytest.fixture
def copied(finished: Spec, tmp_path: Path) -> Spec:
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished.runtime.run_dir, tmp_path / "run")
    return spec_for(tmp_path / "run")


def with_model(spec: Spec, budget: float | int | None, look: Callable[[Any], Any]) -> Any:
    """What `look` says of a trained model."""
    run = RunDir(Path(spec.runtime.run_dir))
    with process_group(spec) as ranks:
        return look(load_trained(spec, rundir.read_json(run.data / "meta.json"), ranks, run, budget))


def test_metrics_have_a_row_for_every_model_and_split(finished: Spec) -> None:
    run = RunDir(Path(finished.runtime.run_dir))
    rows = rundir.read_json(run.metrics)
    assert [(row["budget"], row["split"]) for row in rows] == [
        (budget, split) for budget in [None, *BUDGETS] for split in ("validation", "test")
    ]
    assert set(rows[0]) == {
        "model", "method", "budget", "seed", "split", "auc", "logloss", "kept_params", "total_params",
        "table_bytes", "total_bytes", "seconds",
    }  # fmt: skip
    assert {row["method"] for row in rows[:2]} == {"uniform"}
    assert {row["method"] for row in rows[2:]} == {"pep"}
    for row in rows:
        assert 0.6 < row["auc"] < 0.9
        kept = row["total_params"] if row["budget"] is None else budget_params(row["budget"], row["total_params"])
        assert row["kept_params"] == kept


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_was_pruned_is_exactly_zero_and_the_rest_is_not(finished: Spec, budget: float) -> None:
    run = RunDir(Path(finished.runtime.run_dir))
    masks = run.scheme(budget_name(budget)) / "masks.safetensors"

    def look(job: Any) -> list[tuple[str, np.ndarray]]:
        return [
            (part.name, kernel.dense_rows(part, 0, part.table.rows)[0].numpy())
            for kernel in job.collection.kernels()
            for part in kernel.parts()
        ]

    for name, weight in with_model(finished, budget, look):
        kept = unpack_masks(SchemeMasks(masks).packed(name, 0, len(weight)), finished.model.dim).numpy()
        assert np.array_equal(weight != 0, kept)


@pytest.mark.parametrize("budget", [None, *BUDGETS])
def test_exported_tables_give_the_models_own_vectors(finished: Spec, budget: float | None) -> None:
    run = RunDir(Path(finished.runtime.run_dir))
    exported = tables.load(run.tables("baseline" if budget is None else budget_name(budget)))
    batch = next(Loader(run.data, "test", batch_size=500, rank=0, world_size=1, seed=3, shuffle=False).epoch(0))
    vectors = with_model(finished, budget, lambda job: job.collection(batch.sparse).to_dict())
    ids = {}
    for name, field in exported.fields.items():
        jagged = batch.sparse[name]
        found = exported_ids(exported, run.data, name, jagged.values().numpy())
        ids[name] = found if field.kind != "multi" else (found, jagged.offsets().numpy())
    for name, found in exported.embed(ids).items():
        expected = vectors[name].detach().numpy()
        if exported.fields[name].kind == "multi":  # the order of a sum may differ in the last bit
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
        else:
            assert np.array_equal(found, expected)


def test_declared_bytes_are_the_bytes_on_disk(finished: Spec) -> None:
    run = RunDir(Path(finished.runtime.run_dir))
    for name in ["baseline", *map(budget_name, BUDGETS)]:
        unlisted = {rundir.MARKER, GOLDEN}  # not needed to serve
        files = [p for p in run.tables(name).rglob("*") if p.is_file() and p.name not in unlisted]
        assert tables.load(run.tables(name)).total_bytes == sum(p.stat().st_size for p in files)


def test_a_second_run_does_nothing(copied: Spec, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(copied.runtime.run_dir)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name == rundir.MARKER}
    for stage in STAGES[:-1]:
        stage.run(copied)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name == rundir.MARKER} == before
    assert capsys.readouterr().out.count("is up to date") == 3 + 3 * len(BUDGETS) + 1


def test_a_changed_spec_makes_only_what_depends_on_it(copied: Spec) -> None:
    run = RunDir(Path(copied.runtime.run_dir))
    changed = spec_for(run.path, retrain={"epochs": 1})
    before = {p: rundir.read_json(p / rundir.MARKER) for p in (run.search, run.model("0.5"))}
    for stage in (search, prune, retrain):
        stage.run(changed)
    assert rundir.read_json(run.search / rundir.MARKER) == before[run.search]
    assert rundir.read_json(run.model("0.5") / rundir.MARKER) != before[run.model("0.5")]
    assert len(rundir.read_json(run.model("0.5") / "history.json")) == 1


class Killed(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("stage", [train, search])
def test_an_interrupted_stage_ends_as_if_undisturbed(
    stage: Any, copied: Spec, finished: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stage.__name__.rpartition(".")[2]
    output = Path(copied.runtime.run_dir) / {"train": "baseline"}.get(name, name)
    shutil.rmtree(output)
    original, calls = loop.train_step, 0
    spec = spec_for(Path(copied.runtime.run_dir), train={"batch_size": 2000, "epochs": 2, "checkpoint_every": 7})

    def dies(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 25:
            raise Killed
        return original(*args)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(Killed):
        stage.run(spec)
    assert not output.exists()
    monkeypatch.setattr(loop, "train_step", lambda *args: original(*args))
    stage.run(spec)
    undisturbed = Path(finished.runtime.run_dir) / output.name
    if stage is search:
        for mask in (output / "masks").iterdir():
            assert mask.read_bytes() == (undisturbed / "masks" / mask.name).read_bytes()
    else:
        found, expected = (rundir.read_json(p / "history.json") for p in (output, undisturbed))
        assert [row["validation_auc"] for row in found] == [row["validation_auc"] for row in expected]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_harms_nothing(copied: Spec) -> None:
    run = RunDir(Path(copied.runtime.run_dir))
    marker = rundir.read_json(run.baseline / rundir.MARKER)
    wild = {"batch_size": 2000, "epochs": 2, "embedding_learning_rate": 1e25, "embedding_optimizer": "sgd"}
    with pytest.raises((FloatingPointError, ValueError), match=r"step \d+: the loss is|not finite"):
        train.run(spec_for(run.path, train=wild))
    assert rundir.read_json(run.baseline / rundir.MARKER) == marker


@pytest.mark.parametrize("budget", [10**9, 1e-6])
def test_a_budget_that_cannot_be_met_is_refused_before_training(budget: float, copied: Spec) -> None:
    with pytest.raises(ValueError, match=r"prune\.budgets: .* parameters would keep"):
        prepare.run(spec_for(Path(copied.runtime.run_dir), prune={"budgets": [budget]}))


def test_a_stage_without_its_input_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data: not there or not complete; run the stage that makes it first"):
        train.run(spec_for(tmp_path / "run"))


def test_the_directory_has_one_writer(copied: Spec) -> None:
    with (
        rundir.lease(Path(copied.runtime.run_dir), "retrain"),
        pytest.raises(ValueError, match=r"in use by `retrain` on .*, process \d+, since"),
    ):
        train.run(copied)


def test_random_init_of_the_ablation_starts_elsewhere(copied: Spec) -> None:
    run = RunDir(Path(copied.runtime.run_dir))
    spec = spec_for(run.path, retrain={"init": "random", "dense": "keep", "epochs": 1})
    before = torch.tensor(rundir.read_json(run.model("0.5") / "history.json")[0]["validation_auc"])
    retrain.run(spec)
    assert rundir.read_json(run.model("0.5") / "history.json")[0]["validation_auc"] != float(before)
