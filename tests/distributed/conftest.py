"""Small real data, prepared once."""

from __future__ import annotations

from pathlib import Path

import pytest

from thresher.data.prepare import prepare
from thresher.spec import Spec


def make_spec(run_dir: Path | str, **sections: object) -> Spec:
    """A spec on MovieLens-100k that trains in seconds."""
    return Spec.model_validate(
        {
            "data": {
                "format": "movielens",
                "path": "package:recbole/dataset_example/ml-100k",
                "label": {"positive_from": 4},
            },
            "model": {"name": "deepfm", "dim": 4, "hidden": [8]},
            "train": {"batch_size": 64, "epochs": 1},
            "export": {"onnx": False},  # seconds; tests of scores ask for it
            "runtime": {"run_dir": str(run_dir)},
            "seed": 3,
        }
        | sections
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MovieLens-100k, prepared."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    folder.mkdir()
    prepare(make_spec("unused"), folder, lambda _: None)
    return folder
