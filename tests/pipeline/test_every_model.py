"""Every model, trained on real data by the stages; and the user's own, by a job with two ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from torchx.runner import get_runner
from torchx.specs import AppState

from tests.distributed.conftest import make_spec
from thresher import launch, rundir
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
OWN = """
import torch


class Own(torch.nn.Module):
    def __init__(self, fields, numeric, spec):
        super().__init__()
        self.fields = fields
        self.output = torch.nn.Linear(sum(fields.dims) + numeric, 1)

    def forward(self, sparse, dense):
        return self.output(torch.cat([*self.fields(sparse), dense], dim=1)).squeeze(1)
"""


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


@pytest.mark.slow
def test_a_job_trains_the_users_own_model(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(Path(shutil.copytree(prepared, tmp_path / "run")))
    (tmp_path / "own_model.py").write_text(OWN)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # so that what `launch` adds is undone
    model = {"factory": "own_model:Own", "dim": 8}
    runtime = {"run_dir": str(run.path), "ranks": 2}
    spec = make_spec(run.path, data=DATA, train=TRAIN, model=model, runtime=runtime)
    (tmp_path / "spec.yaml").write_text(spec.model_dump_json())
    job = launch.app("train", str(tmp_path / "spec.yaml"), [], trust_model_code=True)
    with get_runner() as runner:
        status = runner.wait(runner.run(job, "local_cwd", {"log_dir": str(tmp_path / "logs")}), wait_interval=0.2)
    assert status is not None
    assert status.state == AppState.SUCCEEDED, status
    assert rundir.read_json(run.baseline / "history.json")[-1]["validation_auc"] > 0.6
