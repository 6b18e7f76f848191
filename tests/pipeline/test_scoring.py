"""The exported tables score as the trained model does, with every model, from ids and from raw columns."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from tests.distributed.conftest import make_spec
from thresher import rundir, tables
from thresher.cli import app
from thresher.data.loader import Loader
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages import export, prepare, train
from thresher.stages.evaluate import round_tables
from thresher.tables.golden import GOLDEN, check_golden
from thresher.train.build import MODELS
from thresher.train.evaluation import score
from thresher.train.group import process_group
from thresher.train.trained import load_trained

pytestmark = pytest.mark.timeout(300)

DATA = {
    "format": "movielens",
    "path": "package:recbole/dataset_example/ml-100k",
    "label": {"positive_from": 4},
    "on_bad_row": "skip",  # of release_year
    "fields": {
        "user": {"column": "user_id"},
        "item_id": {},
        "zip_code": {"encoding": "hash", "rows": 50},
        "genres": {"column": "class", "kind": "multi", "separator": " "},
        "release_year": {"kind": "numeric"},
        "years": {"column": "age", "kind": "numeric", "numeric": "dense"},
    },
}


def spec_for(run_dir: Path, name: str, dtype: str = "fp32", **sections: Any) -> Spec:
    training = {"batch_size": 2000, "epochs": 1, "embedding_learning_rate": 0.02, "dense_learning_rate": 0.01}
    model = {"name": name or "deepfm", "dim": 8, "projection": "all"}
    return make_spec(
        run_dir,
        **{"data": DATA, "train": training, "model": model, "export": {"dtype": dtype}} | sections,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the data alone."""
    run_dir = tmp_path_factory.mktemp("prepared") / "run"
    prepare.run(spec_for(run_dir, "deepfm"))
    return run_dir


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A DeepFM, trained and exported."""
    run = RunDir(tmp_path_factory.mktemp("deepfm") / "run")
    shutil.copytree(prepared, run.path)
    train_and_export(spec_for(run.path, "deepfm"), run)
    return run


def train_and_export(spec: Spec, run: RunDir) -> None:
    """The uniform model alone."""
    train.run(spec)
    with process_group(spec) as ranks:
        export.export_model(spec, rundir.read_json(run.data / "meta.json"), run, ranks, None)


@torch.no_grad()
def both(spec: Spec, run: RunDir) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Logits of the trained model and of the exported tables on the test split, and its labels."""
    exported = tables.load(run.tables("baseline"))
    batch = next(Loader(run.data, "test", batch_size=9000, rank=0, world_size=1, seed=3, shuffle=False).epoch(0))
    with process_group(spec) as ranks:
        job = load_trained(spec, rundir.read_json(run.data / "meta.json"), ranks, run, None)
        round_tables(job, spec.export.dtype)
        job.model.eval()
        expected = torch.sigmoid(job.model(batch.sparse, batch.dense)).numpy()
    ids: dict[str, Any] = {}
    for name, field in exported.fields.items():
        jagged = batch.sparse[name]
        values = jagged.values().numpy()
        ids[name] = (values, jagged.offsets().numpy()) if field.kind == "multi" else values
    return expected, exported.score_vectors(exported.embed(ids), batch.dense.numpy()), batch.labels


@pytest.mark.parametrize(("name", "dtype"), [*((name, "fp32") for name in MODELS), ("deepfm", "fp16")])
def test_scores_are_the_trained_models(name: str, dtype: str, prepared: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(prepared, tmp_path / "run")))
    spec = spec_for(run.path, name, dtype)
    train_and_export(spec, run)
    expected, found, labels = both(spec, run)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    expected_auc, found_auc = (
        score(torch.logit(torch.from_numpy(scores).double()), labels).auc for scores in (expected, found)
    )
    assert expected_auc > 0.6
    assert f"{found_auc:.4f}" == f"{expected_auc:.4f}"
    assert check_golden(tables.load(run.tables("baseline"))) < 1e-6  # from raw values


def test_the_graph_holds_no_weights_and_is_counted(run: RunDir) -> None:
    entries = tables.load(run.tables("baseline")).manifest
    assert entries.onnx is not None
    assert entries.onnx.bytes < 6000
    assert entries.dense_bytes == sum(
        (run.tables("baseline") / f"dense.{end}").stat().st_size for end in ("onnx", "safetensors")
    )
    graph = (run.tables("baseline") / "dense.onnx").read_bytes()
    assert b"dense.safetensors" in graph
    assert b"/" not in graph.replace(b"://", b""), "a path of the machine that exported"


def golden(run: RunDir) -> tuple[dict[str, list[Any]], np.ndarray]:
    value = rundir.read_json(run.tables("baseline") / GOLDEN)
    return value["columns"], np.array(value["scores"])


def test_columns_come_in_any_form(run: RunDir) -> None:
    exported = tables.load(run.tables("baseline"))
    columns, expected = golden(run)
    assert set(columns) == set(exported.sources) == {"user_id", "item_id", "zip_code", "class", "release_year", "age"}
    whole = {name: np.array(columns[name], np.int64) for name in ("user_id", "item_id")}
    forms: list[Any] = [
        columns | {"unread": [0]},
        pa.table(columns),
        pa.table(columns | whole | {"class": [bag.split(" ") for bag in columns["class"]]}),
        pa.table(columns | {"zip_code": pa.array(columns["zip_code"]).dictionary_encode()}),
        columns | whole | {"class": [bag.split(" ") for bag in columns["class"]]},
    ]
    for form in forms:
        np.testing.assert_allclose(exported.score(form), expected, rtol=0, atol=1e-6)
    assert len(exported.score({name: [] for name in columns})) == 0


def test_unknown_and_missing_values_are_scored(run: RunDir) -> None:
    exported = tables.load(run.tables("baseline"))
    nothing = {column: [None] for column in exported.sources}
    unknown = nothing | {"user_id": ["no such user"], "item_id": [-5], "class": ["No Such Genre"]}
    for columns in (nothing, unknown):
        (found,) = exported.score(columns)
        assert 0 < found < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": None}, "column 'user_id' is missing; there are"),
        ({"age": ["old"]}, "column 'age': is numeric, its values must be numbers"),
        ({"age": [1.0, 2.0]}, "column 'age' has 2 values, the others 1"),
        ({"release_year": [float("inf")]}, "field release_year: is numeric"),
        ({"item_id": ["1", "2"]}, "field item_id has 2 samples, field user 1: give columns alike long"),
        ({"item_id": [object()]}, "field item_id: a raw key is text or a number"),
        ({"class": [{5}]}, "field genres: a bag is a list of keys or a text, got {5}"),
        ({"age": pa.array(["old"])}, "column 'age': 'old' at position 0 is no finite number"),
    ],
)
def test_what_cannot_be_scored_is_named(change: dict[str, Any], message: str, run: RunDir) -> None:
    exported = tables.load(run.tables("baseline"))
    columns = {name: value[:1] for name, value in golden(run)[0].items()} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        exported.score({name: value for name, value in columns.items() if value is not None})


def test_other_scores_than_the_models_are_found(run: RunDir, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.tables("baseline"), tmp_path / "tables"))
    value = rundir.read_json(folder / GOLDEN)
    value["scores"][7] += 1e-3
    rundir.write_json(folder / GOLDEN, value)
    with pytest.raises(ValueError, match=r"golden\.json: row 7 scores 0\..*, the trained model gave 0\."):
        check_golden(tables.load(folder))
    value["scores"] = value["scores"][:5]
    rundir.write_json(folder / GOLDEN, value)
    with pytest.raises(ValueError, match="must have a score for each of its 32 rows"):
        check_golden(tables.load(folder))
    (folder / GOLDEN).unlink()
    with pytest.raises(ValueError, match=r"golden\.json: not there"):
        check_golden(tables.load(folder))


def test_on_the_command_line(run: RunDir, tmp_path: Path) -> None:
    columns, expected = golden(run)
    pq.write_table(pa.table(columns), tmp_path / "samples.parquet")
    folder = str(run.tables("baseline"))
    result = CliRunner().invoke(app, ["score", folder, str(tmp_path / "samples.parquet")])
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose([float(line) for line in result.stdout.split()], expected, rtol=0, atol=1e-6)
    pq.write_table(pa.table(columns).drop(["age"]), tmp_path / "samples.parquet")
    result = CliRunner().invoke(app, ["score", folder, str(tmp_path / "samples.parquet")])
    assert result.exit_code == 2
    assert "samples.parquet: has no column age; the model reads user_id, " in result.stderr
    result = CliRunner().invoke(app, ["lookup", folder, "user", columns["user_id"][0], "nobody"])
    known, unknown = result.stdout.splitlines()
    assert known.startswith(f"{columns['user_id'][0]}: id ")
    assert known.count("=") == 8
    assert unknown.startswith("nobody: id 0, unknown, ")


OWN = """
import torch


class Own(torch.nn.Module):
    def __init__(self, fields, numeric, spec):
        super().__init__()
        self.fields = fields
        columns = sum(fields.dims) + numeric
        self.norm = torch.nn.BatchNorm1d(columns)
        self.output = torch.nn.Linear(columns, 1)

    def forward(self, sparse, dense):
        return self.output(self.norm(torch.cat([*self.fields(sparse), dense], dim=1))).squeeze(1)


class Branching(Own):
    def forward(self, sparse, dense):
        logits = super().forward(sparse, dense)
        return logits * 2 if logits.sum() > 0 else logits
"""


@pytest.fixture
def own(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run directory with the data alone, and models of one's own on the path."""
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("THRESHER_TRUST_MODEL_CODE", "1")
    return RunDir(Path(shutil.copytree(prepared, tmp_path / "run")))


def test_the_buffers_of_a_model_of_ones_own_are_exported(own: RunDir) -> None:
    spec = spec_for(own.path, "", model={"factory": "own_models:Own", "dim": 4})
    train_and_export(spec, own)
    exported = tables.load(own.tables("baseline"))
    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} < set(exported.dense)
    expected, found, _ = both(spec, own)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_model_that_torch_cannot_export_leaves_tables_without_a_graph(
    own: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    train_and_export(spec_for(own.path, "", model={"factory": "own_models:Branching", "dim": 4}), own)
    assert "export: no dense.onnx, so these tables cannot score: torch cannot export own_models:Branching" in (
        capsys.readouterr().out
    )
    exported = tables.load(own.tables("baseline"))
    assert (own.tables("baseline") / GOLDEN).is_file()
    with pytest.raises(ValueError, match=r"has no dense\.onnx, so it cannot score; the export said why"):
        exported.score(golden(own)[0])
