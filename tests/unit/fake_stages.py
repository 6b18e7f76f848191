"""Stands in for the stages of a job, and for the command line of the driver, in the driver's tests.

`python fake_stages.py drive SPEC`       the driver, with the stages below
`python fake_stages.py STAGE --spec SPEC`   a stage: takes no time, or does what the variable FAKE_<STAGE> says
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a stage starts in no time
    import pytest

BUDGETS = ["0.5", "0.2"]
METRICS = [
    {
        "model": "fm",
        "method": "uniform",
        "budget": None,
        "seed": 0,
        "split": split,
        "auc": 0.75,
        "logloss": 0.5,
        "kept_params": 1600,
        "total_params": 1600,
        "table_bytes": 3200,
        "total_bytes": 4000,
        "seconds": 1.0,
    }
    for split in ("validation", "test")
]


def write_spec(folder: Path) -> Path:
    path = folder / "spec.yaml"
    run_dir = folder / "run"
    path.write_text(
        f"data: {{format: synthetic}}\nprune: {{budgets: [0.5, 0.2]}}\nruntime: {{run_dir: {run_dir}, ranks: 2}}\n"
    )
    return path


def substitute(patch: "pytest.MonkeyPatch", ranked: bool) -> None:
    """Let the driver start this file in place of the stages; with torchrun only if `ranked`."""
    from thresher import launch, pipeline

    real = launch.app

    def app(*args, **kwargs):
        job = real(*args, **kwargs)
        role = job.roles[0]
        at = len(role.args) - 1 - role.args[::-1].index("-m")
        role.args[at : at + 2] = [__file__]
        return job

    patch.setattr(launch, "app", app)
    patch.setattr(pipeline, "check", lambda _: [])
    if not ranked:
        patch.setattr(launch, "RANKED", frozenset())


def stage(name: str, spec: Path) -> None:
    run = spec.parent / "run"
    with (spec.parent / "launched").open("a") as file:
        file.write(f"{name} {os.environ.get('RANK', 0)} {os.getpid()}\n")
    do = os.environ.get(f"FAKE_{name.upper()}")
    if do == "raise" and os.environ.get("RANK", "1") == "1":
        raise RuntimeError("table genres: the cause of it all")
    if do in ("raise", "hang"):
        time.sleep(600)
    outputs = {
        "prepare": ["data"],
        "train": ["baseline"],
        "search": ["search"],
        "prune": [f"schemes/{budget}" for budget in BUDGETS],
        "retrain": [f"models/{budget}" for budget in BUDGETS],
        "export": [f"tables/{budget}" for budget in ["baseline", *BUDGETS]],
    }
    if os.environ.get("RANK", "0") == "0":
        for output in outputs.get(name, []):
            (run / output).mkdir(parents=True, exist_ok=True)
            (run / output / "stage.json").write_text(json.dumps({"inputs": {}, "seconds": 0}))
        if name == "evaluate":
            (run / "metrics.json").write_text(json.dumps(METRICS))
        if name == "report":
            (run / "report.html").write_text("<p>")


if __name__ == "__main__":
    if sys.argv[1] == "drive":
        import pytest

        from thresher import pipeline

        substitute(pytest.MonkeyPatch(), ranked=True)
        pipeline.run(Path(sys.argv[2]), [])
    elif "RANK" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        record(stage)(sys.argv[1], Path(sys.argv[3]))
    else:
        stage(sys.argv[1], Path(sys.argv[3]))
