"""What lookup, backward and update cost with the plain-PyTorch kernel, against the number of rows.

    python -m benchmarks.step

One table of 16 columns, Adam, 4,096 uniform ids a batch, one core. Prints a row for each case and writes them all to
`benchmarks/results/step.json`; `ratio_to_dense` is of the same run and number of rows.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._environment import environment
from thresher.kernels.ops import STATES, Group, Optimizer, Shared

ROWS = (10_000, 100_000, 1_000_000, 10_000_000)
DIM, BATCH, REPEATS, WARMUP = 16, 4096, 40, 5
RESULTS = Path(__file__).parent / "results" / "step.json"


def make_group(rows: int, shared: Shared) -> Group:
    """One table."""
    sizes = {
        Shared.NONE: 0, Shared.TABLE: 1, Shared.COLUMN: DIM, Shared.ROW: rows, Shared.ELEMENT: rows * DIM,
    }  # fmt: skip
    return Group(
        weights=torch.rand(rows * DIM) - 0.5,
        weight_states=[torch.zeros(rows * DIM) for _ in STATES[Optimizer.ADAM]],
        thresholds=torch.full((sizes[shared],), -5.0),
        threshold_states=[torch.zeros(sizes[shared]) for _ in STATES[Optimizer.ADAM]] if shared >= Shared.ROW else [],
        mask=torch.empty(0, dtype=torch.bool),
        seen=torch.zeros(rows if shared else 0, dtype=torch.bool),
        rows=[rows],
        dims=[DIM],
        feature_tables=[0],
        shared=shared,
        mean=False,
        optimizer=Optimizer.ADAM,
        learning_rate=0.01,
    )


def measure(rows: int, shared: Shared) -> list[float]:
    """Milliseconds of each step."""
    group, offsets, times = make_group(rows, shared), torch.arange(BATCH + 1), []
    for seed in range(WARMUP + REPEATS):
        ids = torch.randint(0, rows, (BATCH,), generator=torch.Generator().manual_seed(seed))
        began = time.perf_counter()
        group.lookup(ids, offsets).sum().backward()
        times.append((time.perf_counter() - began) * 1e3)
    return times[WARMUP:]


def main() -> None:
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for rows in ROWS:
        dense_ms = 0.0
        for shared in Shared:
            times = measure(rows, shared)
            median = statistics.median(times)
            dense_ms = median if shared == Shared.NONE else dense_ms
            found.append(
                {
                    "threshold_by": shared.name.lower(),
                    "rows": rows,
                    "ms_median": round(median, 3),
                    "ms_min": round(min(times), 3),
                    "ms_max": round(max(times), 3),
                    "ratio_to_dense": round(median / dense_ms, 2),
                }
            )
            name = shared.name.lower()
            print(f"{rows:>12,} rows  threshold by {name:8} {median:7.2f} ms  {median / dense_ms:.2f} x dense")
    config = {"dim": DIM, "batch": BATCH, "optimizer": "adam", "backend": "reference", "threads": 1}
    where = environment(REPEATS, "service/thresher/kernels", "benchmarks/step.py")
    RESULTS.write_text(json.dumps({"environment": where, "config": config, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
