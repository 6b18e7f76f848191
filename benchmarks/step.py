"""A whole training step of DeepFM with PEP against the same step without, and the memory of search and retraining.

26 fields share the rows; 16 columns, 4,096 samples over all ranks with one uniform id a field, Adam, one core a rank.
All representations of one run take turns on the same batches; ratios are of their medians.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks._environment import ROOT, environment
from thresher.data.loader import Batch
from thresher.embedding.representation import Dense, Masked, Representation, SoftThreshold
from thresher.embedding.table_plan import TablePlan
from thresher.spec import Spec
from thresher.train.build import Job, build
from thresher.train.group import Ranks, process_group
from thresher.train.loop import train_step

RESULTS = ROOT / "benchmarks" / "results" / "step.json"
FIELDS, DIM, BATCH, REPEATS, WARMUP = 26, 16, 4096, 30, 3
ROWS, RANKS, MEMORY_ROWS = (10**4, 10**5, 10**6, 10**7), (1, 2), 10**7
GRANULARITIES = ("global", "table", "dimension", "feature", "feature_dimension")


@dataclass(frozen=True)
class FirstColumns:
    """Masks that keep the first columns of every n-th row; where the entries lie does not matter for the memory."""

    columns: int
    every: int

    def packed(self, table: str, first_row: int, rows: int) -> Tensor:
        """See `MaskSource`."""
        del table
        masks = torch.zeros(rows, DIM // 8, dtype=torch.uint8)
        masks[-first_row % self.every :: self.every] = torch.tensor(
            [(1 << max(0, min(8, self.columns - 8 * byte))) - 1 for byte in range(DIM // 8)], dtype=torch.uint8
        )
        return masks


REPRESENTATIONS: dict[str, Representation] = {
    "dense": Dense(),
    **{name: SoftThreshold(name, init=-8.0) for name in GRANULARITIES},  # type: ignore[arg-type]
    "masked_50": Masked(FirstColumns(8, 1)),
    "masked_5": Masked(FirstColumns(4, 5)),
}


def make_job(rows: int, name: str, ranks: Ranks) -> Job:
    """A model of 26 fields."""
    spec = Spec.model_validate(
        {
            "data": {"format": "synthetic", "synthetic": {}},
            "model": {"name": "deepfm", "dim": DIM, "hidden": [64, 64]},
            "train": {"batch_size": BATCH},
            "runtime": {"ranks": ranks.world_size, "sharding": "table_wise"},
        }
    )
    fields = [{"name": f"f{i}", "rows": rows // FIELDS, "pooling": "sum", "one_hot": True} for i in range(FIELDS)]
    plan = TablePlan.uniform([field["name"] for field in fields], DIM, REPRESENTATIONS[name])
    return build(spec, {"fields": fields, "dense": []}, ranks, plan, spec.train, 1, 1)


def make_batches(rows: int, ranks: Ranks) -> list[Batch]:
    """This rank's share of some batches."""
    own = BATCH // ranks.world_size
    generator = torch.Generator().manual_seed(ranks.rank)
    keys, lengths = [f"f{i}" for i in range(FIELDS)], torch.ones(FIELDS * own, dtype=torch.int64)
    ids = [torch.randint(0, rows // FIELDS, (FIELDS * own,), generator=generator) for _ in range(8)]
    return [
        Batch(
            KeyedJaggedTensor(keys=keys, values=values, lengths=lengths),
            torch.empty(own, 0),
            torch.randint(0, 2, (own,), generator=generator).float(),
            torch.ones(own),
            BATCH,
        )
        for values in ids
    ]


def steps(rows: int, result: Path) -> None:
    """One rank of a run: steps of all representations in turn."""
    with process_group(Spec.model_validate({"data": {"format": "synthetic"}, "train": {"batch_size": BATCH}})) as ranks:
        jobs = {name: make_job(rows, name, ranks) for name in ("dense", *GRANULARITIES)}
        batches, times = make_batches(rows, ranks), {name: list[float]() for name in jobs}
        for step in range(WARMUP + REPEATS):
            for name, job in jobs.items():
                ranks.barrier()
                began = time.perf_counter()
                train_step(job, batches[step % len(batches)], step)
                times[name].append((time.perf_counter() - began) * 1e3)
        if ranks.first:
            result.write_text(json.dumps({name: own[WARMUP:] for name, own in times.items()}))


def memory(name: str, result: Path) -> None:
    """One process: what the storage of a representation and its training take."""
    with process_group(Spec.model_validate({"data": {"format": "synthetic"}, "train": {"batch_size": BATCH}})) as ranks:
        batches = make_batches(MEMORY_ROWS, ranks)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        job = make_job(MEMORY_ROWS, name, ranks)
        for step, batch in enumerate(batches):
            train_step(job, batch, step)
        (kernel,) = job.collection.kernels()
        group = kernel.group
        tensors = [group.weights, *group.weight_states, group.thresholds, *group.threshold_states]
        stored = sum(tensor.nbytes for tensor in [*tensors, group.mask, group.starts, group.seen])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        params = MEMORY_ROWS // FIELDS * FIELDS * DIM
        result.write_text(json.dumps({"stored": stored / params, "peak": peak / params}))


def run(ranks: int, *arguments: str) -> Any:
    """What this file gives as a job of some ranks."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        subprocess.run(
            [*torchrun, "-m", "benchmarks.step", *arguments, str(result)],
            check=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return json.loads(result.read_text())


def main() -> None:
    """Measure and write the results."""
    found: list[dict[str, Any]] = []
    for ranks in RANKS:
        for rows in ROWS:
            times = run(ranks, "steps", str(rows))
            dense_ms = statistics.median(times["dense"])
            for name, own in times.items():
                median = statistics.median(own)
                found.append(
                    {
                        "representation": name,
                        "ranks": ranks,
                        "rows": rows,
                        "ms_median": round(median, 3),
                        "ms_min": round(min(own), 3),
                        "ms_max": round(max(own), 3),
                        "ratio_to_dense": round(median / dense_ms, 3),
                    }
                )
                print(f"{ranks} ranks {rows:>11,} rows  {name:18} {median:7.2f} ms  {median / dense_ms:.2f} of dense")
    taken = []
    for name in ("dense", "feature", "feature_dimension", "masked_50", "masked_5"):
        of = run(1, "memory", name)
        taken.append({"representation": name, "rows": MEMORY_ROWS, **{k: round(v, 2) for k, v in of.items()}})
        print(f"{name:18} {of['stored']:6.2f} bytes a parameter stored, {of['peak']:6.2f} at the peak")
    config = {"model": "deepfm", "fields": FIELDS, "dim": DIM, "batch": BATCH, "optimizer": "adam"}
    where = environment(REPEATS, "service/thresher", "benchmarks/step.py")
    document = {"environment": where, "config": config, "steps": found, "memory_bytes_per_parameter": taken}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "steps":
        steps(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        memory(sys.argv[2], Path(sys.argv[3]))
