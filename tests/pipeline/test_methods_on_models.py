"""Every kind of tables that a method can leave, under every model: trained, exported, scored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.test_methods import AFTER_TRAINING, spec_for
from tests.pipeline.test_partitioned import assert_exported_vectors_are_the_models
from thresher import rundir
from thresher.rundir import RunDir
from thresher.stages import prepare, train
from thresher.train.build import MODELS

pytestmark = pytest.mark.timeout(300)

# One method for each kind of tables; `test_methods.py` and `test_partitioned.py` have all methods, on one model.
KINDS: dict[str, dict[str, Any]] = {
    "single entries": {"method": "pep", "epochs": 1, "check_every": 5},
    "narrow, with fields left out": {"method": "sseds", "rank": "saliency"},
    "composed": {"method": "quotient_remainder", "combine": "mult"},
    "more fields": {"method": "quotient_remainder", "combine": "feature"},
    "paths": {"method": "quotient_remainder", "combine": "path"},
    "rows of their own": {"method": "double_hash"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run directory with data and the uniform model for each model."""
    first = tmp_path_factory.mktemp("trained") / "data"
    prepare.run(spec_for(first, "pep"))
    found = {}
    for name in MODELS:
        found[name] = tmp_path_factory.mktemp(name) / "run"
        shutil.copytree(first, found[name])
        train.run(spec_for(found[name], "pep", model=model(name)))
    return found


def model(name: str) -> dict[str, Any]:
    """A small model whose fields have projections where it can use them."""
    return {"name": name, "dim": 4, "hidden": [8], "bottom_hidden": [8], "attention_dim": 4, "projection": "all"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_all_kinds_of_tables(name: str, kind: str, trained: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(trained[name], tmp_path / "run")
    budget = 0.1 if kind.startswith("narrow") else 0.5
    # Graphs take vectors, so tables and models are tested apart but for whether the model needs equal widths. An export
    # with a graph holds its scores against the trained model's.
    export = {"dtype": "fp32", "onnx": name in ("wide_deep", "deepfm")}
    spec = spec_for(
        tmp_path / "run", "", model=model(name), search=KINDS[kind], prune={"budgets": [budget]}, export=export
    )
    for stage in AFTER_TRAINING:
        stage.run(spec)
    row = rundir.read_json(RunDir(tmp_path / "run").metrics)[-1]
    assert row["model"] == name
    assert 0 < row["kept_params"] <= budget * row["total_params"]
    assert row["auc"] > 0.5
    assert_exported_vectors_are_the_models(spec, budget)
