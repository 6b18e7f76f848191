"""Every model, trained on real data by the stages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.conftest import make_spec
from thresher import rundir
from thresher.rundir import RunDir
from thresher.stages import prepare, train
from thresher.train.build import MODELS

DATA = {
    "format": "movielens",
    "path": "package:recbole/dataset_example/ml-100k",
    "label": {"positive_from": 4},
    "fields": {
        "user_id": {},
        "item_id": {},
        "class": {"kind": "multi", "separator": " "},
        "age": {"kind": "numeric", "numeric": "dense"},
    },
}
TRAIN = {
    "batch_size": 1000,
    "epochs": 1,
    "embedding_learning_rate": 0.01,
    "dense_learning_rate": 0.01,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the data alone."""
    run_dir = tmp_path_factory.mktemp("prepared") / "run"
    prepare.run(make_spec(run_dir, data=DATA))
    return run_dir


@pytest.mark.parametrize("name", MODELS)
def test_one_line_of_the_spec_trains_another_model(name: str, prepared: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(prepared, tmp_path / "run")))
    train.run(make_spec(run.path, data=DATA, train=TRAIN, model={"name": name, "dim": 8}))
    assert rundir.read_json(run.baseline / "history.json")[-1]["validation_auc"] > 0.6
