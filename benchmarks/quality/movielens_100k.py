"""The demo's pipeline for FM and DeepFM with three seeds: do the retrained models keep the uniform model's AUC?

    python -m benchmarks.quality.movielens_100k

Each run goes to runs/quality/<model>-<seed>, so that a second call finishes what is missing. Prints every run and the
medians, and writes all rows of the runs' metrics.json to `benchmarks/results/movielens_100k.json`. A seed is that of
the split, the order of samples and the initial values together. One rank: on data this small a second one only waits.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks._environment import ROOT, environment
from thresher import pipeline
from thresher.rundir import read_json

MODELS, SEEDS = ("fm", "deepfm"), (1, 2, 3)
SPEC = Path("specs/movielens_pep.yaml")
RESULTS = ROOT / "benchmarks" / "results" / "movielens_100k.json"


def main() -> None:
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        for seed in SEEDS:
            run_dir = f"runs/quality/{model}-{seed}"
            overrides = [f"model.name={model}", f"seed={seed}", f"runtime.run_dir={run_dir}", "runtime.ranks=1"]
            pipeline.run(SPEC, overrides, "local_cwd")
            rows += read_json(Path(run_dir) / "metrics.json")
    differences = []
    for model in MODELS:
        test = {
            (row["budget"], row["seed"]): row["auc"] for row in rows if (row["model"], row["split"]) == (model, "test")
        }
        print(f"{model}: uniform, test AUC by seed: {[round(test[None, seed], 4) for seed in SEEDS]}")
        for budget in dict.fromkeys(budget for budget, _ in test if budget is not None):
            change = [test[budget, seed] - test[None, seed] for seed in SEEDS]
            print(
                f"{model} at {budget:<5} less uniform, by seed: {[f'{c:+.4f}' for c in change]}"
                f", median {statistics.median(change):+.4f}"
            )
            differences.append(
                {
                    "model": model,
                    "budget": budget,
                    "test_auc_minus_uniform": [round(c, 5) for c in change],
                    "median": round(statistics.median(change), 5),
                }
            )
    where = environment(1, "service", str(SPEC), "benchmarks/quality")
    result = {"environment": where, "seeds": SEEDS, "spec": str(SPEC), "differences": differences, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
