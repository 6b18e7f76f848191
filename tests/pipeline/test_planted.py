"""Generated samples whose fields need a known number of dimensions: searches find the order of the fields."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torchmetrics.functional import spearman_corrcoef

from thresher import rundir
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.stages import prepare, prune, search, train

pytestmark = pytest.mark.timeout(600)

PLANTED = [8, 8, 6, 5, 4, 3, 2, 1, 0]
# No priors: rows are about equally frequent, and PEP must find the columns by itself.
METHODS = {
    "sseds": {"batches": 20},
    "pep": {"granularity": "feature_dimension", "epochs": 6, "frequency_prior": 0.0, "column_prior": 0.0},
}


def spec_for(run_dir: Path, method: str) -> Spec:
    """A factorization machine, as the teacher is one, with a first-order weight and as many factors as were planted."""
    return Spec.model_validate(
        {
            "data": {
                "format": "synthetic",
                "synthetic": {
                    "samples": 200_000,
                    "cardinalities": [200] * len(PLANTED),
                    "dimensions": PLANTED,
                    "zipf": 0.5,
                },
            },
            "model": {"name": "fm", "dim": 1 + max(PLANTED)},
            "train": {
                "batch_size": 1000,
                "epochs": 4,
                "embedding_learning_rate": 5e-3,
                "embedding_weight_decay": 1e-4,
            },
            "search": {"method": method, **METHODS[method]},
            "prune": {"budgets": [0.45]},
            "runtime": {"run_dir": str(run_dir), "ranks": 1},
            "seed": 1,
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and the uniform model."""
    folder = tmp_path_factory.mktemp("planted") / "run"
    for stage in (prepare, train):
        stage.run(spec_for(folder, "sseds"))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_fields_is_found(method: str, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    spec = spec_for(tmp_path / "run", method)
    for stage in (search, prune):
        stage.run(spec)
    scheme = rundir.read_json(RunDir(tmp_path / "run").scheme("0.45") / "scheme.json")
    found = [scheme["tables"][f"f{i}"]["kept"] / scheme["tables"][f"f{i}"]["rows"] for i in range(len(PLANTED))]
    order = spearman_corrcoef(torch.tensor(found), torch.tensor(PLANTED, dtype=torch.float))
    assert float(order) >= 0.9, found
