"""Stands in for the stages of a sweep's cells, in processes that are otherwise the real ones.

`python fake_cells.py drive SPEC`          a sweep whose workers run the stages below
`python fake_cells.py worker --spec …`   such a worker

A stage takes no time, or does what the JSON in FAKE_CELLS says for `<model>/<method>/<seed>` (or `baseline`).
"""

import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

AUC = {"uniform": 0.75, "a": 0.74, "b": 0.73, "broken": 0.70}


def write_spec(folder: Path, methods: str = "{a: {}, b: {search: {granularity: table}}}", parallel: int = 2) -> Path:
    path = folder / "spec.yaml"
    path.write_text(
        "data: {format: synthetic, synthetic: {samples: 200, cardinalities: [20, 10]}}\n"
        f"sweep: {{methods: {methods}, seeds: [1, 2]}}\n"
        f"model: {{name: fm}}\nprune: {{budgets: [0.5, 0.2]}}\n"
        f"runtime: {{run_dir: {folder / 'run'}, ranks: 1, parallel: {parallel}}}\n"
    )
    return path


def substitute(patch: "pytest.MonkeyPatch") -> None:
    """Let sweeps start this file's workers."""
    from thresher import sweep

    real = sweep.command

    def command(*args: Any) -> list[str]:
        python, _, _, *arguments = real(*args)
        return [python, __file__, "worker", *arguments]

    patch.setattr(sweep, "command", command)


def stage(name: str, spec: Any) -> None:
    run = Path(spec.runtime.run_dir)
    sweep = next(path.parent for path in run.parents if path.name in ("cells", "shared"))
    cell = "/".join(run.parts[-3:]) if "cells" in run.parts else run.name.partition("-")[0]
    do = json.loads(os.environ.get("FAKE_CELLS", "{}")).get(cell)
    if name in ("prepare", "train") and "cells" in run.parts:
        assert (run / {"prepare": "data", "train": "baseline"}[name] / "stage.json").is_file()
        return
    with (sweep / "ran").open("a") as file:
        file.write(f"{cell} {name} {os.getpid()} {time.monotonic()}\n")
    if do == "raise":
        raise RuntimeError("table genres: the cause of it all\nand more of it")
    if do == "exit":
        os._exit(3)
    if do == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "hang":
        time.sleep(600)
    if name in ("prepare", "train"):
        output = run / {"prepare": "data", "train": "baseline"}[name]
        output.mkdir(exist_ok=True)
        (output / "stage.json").write_text(json.dumps({"inputs": {}, "seconds": 0}))
    if name == "search":
        time.sleep(0.2)
    if name == "evaluate":
        (run / "metrics.json").write_text(json.dumps([row for b in (None, 0.5, 0.2) for row in rows(run, spec, b)]))


def rows(run: Path, spec: Any, budget: float | None) -> list[dict[str, Any]]:
    method = "uniform" if budget is None else run.parent.name
    return [
        {
            "model": spec.model.name,
            "method": spec.search.method if budget else "uniform",
            "budget": budget,
            "seed": spec.seed,
            "split": split,
            "auc": AUC[method] + spec.seed / 1000 + (budget or 0) / 50,
            "logloss": 0.5,
            "kept_params": int(1600 * (budget or 1)),
            "total_params": 1600,
            "table_bytes": int(3200 * (budget or 1)),
            "total_bytes": 800 + int(3200 * (budget or 1)),
            "seconds": 1.0,
        }
        for split in ("validation", "test")
    ]


if __name__ == "__main__":
    if sys.argv[1] == "drive":
        import pytest

        from thresher import sweep

        substitute(pytest.MonkeyPatch())
        sweep.run(Path(sys.argv[2]), [])
    else:
        del sys.argv[1]
        from thresher import worker

        for name in ("prepare", "train", "search", "prune", "retrain", "export", "evaluate"):
            module = types.ModuleType(name)
            module.run = lambda spec, name=name: stage(name, spec)  # type: ignore[attr-defined]
            sys.modules[f"thresher.stages.{name}"] = module
        worker.main()
