"""How fast prepare reads and the loader gives batches, on one core.

    python -m benchmarks.loader

Prints a row for each case and writes them all to `benchmarks/results/loader.json`. The shards are in the page cache
when the clock runs: this measures the loader and not the disk.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks._environment import environment
from thresher.data import shards
from thresher.data.loader import Loader
from thresher.data.prepare import prepare
from thresher.spec import DataSpec, Spec

REPEATS = 5
BATCH_SIZE = 4096
ROW_GROUP_ROWS = 65_536
ROWS = 1_000_000  # of each table
RAW_ROWS = 200_000  # of the Criteo file
RESULTS = Path(__file__).parent / "results" / "loader.json"
CASES = {
    "26 one-hot": {"one_hot": 26, "samples": 1_000_000},
    "26 one-hot, 4 windows": {"one_hot": 26, "samples": 4_000_000},
    "26 one-hot, 4 windows, rank 0 of 8": {"one_hot": 26, "samples": 4_000_000, "ranks": 8},
    "26 one-hot, 13 dense": {"one_hot": 26, "dense": 13, "samples": 1_000_000},
    "7 one-hot, 1 multi of 0 to 4": {"one_hot": 7, "multi": 1, "samples": 1_000_000},
}


def write_data(folder: Path, *, samples: int, one_hot: int, multi: int = 0, dense: int = 0) -> None:
    """Prepared data of uniform ids."""
    generator = np.random.default_rng(0)
    kind = shards.id_type(ROWS)
    schema = [pa.field(shards.LABEL, pa.uint8())]
    schema += [pa.field(shards.sparse(f"c{f}"), kind) for f in range(one_hot)]
    schema += [pa.field(shards.sparse(f"m{f}"), pa.list_(kind)) for f in range(multi)]
    schema += [pa.field(shards.dense(f"d{f}"), pa.float32()) for f in range(dense)]
    writer = shards.ShardWriter(folder / "train", pa.schema(schema), ROW_GROUP_ROWS)
    for start in range(0, samples, ROW_GROUP_ROWS):
        n = min(ROW_GROUP_ROWS, samples - start)
        arrays = [pa.array(generator.integers(0, 2, n, np.uint8))]
        arrays += [pa.array(generator.integers(0, ROWS, n, np.uint32)) for _ in range(one_hot)]
        for _ in range(multi):
            offsets = np.concatenate([[0], np.cumsum(generator.integers(0, 5, n))]).astype(np.int32)
            entries = generator.integers(0, ROWS, int(offsets[-1]), np.uint32)
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(entries)))
        arrays += [pa.array(generator.random(n, np.float32)) for _ in range(dense)]
        writer.write(pa.record_batch(arrays, schema=pa.schema(schema)))
    writer.close()
    names = [f"c{f}" for f in range(one_hot)] + [f"m{f}" for f in range(multi)]
    meta = {
        "fields": [{"name": name, "rows": ROWS, "one_hot": name.startswith("c")} for name in names],
        "dense": [f"d{f}" for f in range(dense)],
        "splits": {"train": {"samples": samples, "files": [f"train/{file}" for file in writer.files]}},
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def measure(count: int, work: Callable[[int], object]) -> dict[str, float]:
    """Rates over REPEATS runs after one for warmth, in units a second."""
    rates = []
    for repeat in range(REPEATS + 1):
        began = time.perf_counter()
        work(repeat)
        rates.append(count / (time.perf_counter() - began))
    return {"median": round(statistics.median(rates[1:])), "min": round(min(rates[1:])), "max": round(max(rates[1:]))}


def loader_row(name: str, case: dict[str, int]) -> dict[str, Any]:
    """Samples a second that one rank gets."""
    case = dict(case)
    ranks = case.pop("ranks", 1)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), **case)
        loader = Loader(
            Path(folder), "train", batch_size=BATCH_SIZE * ranks, rank=0, world_size=ranks, seed=0, shuffle=True
        )

        def epoch(number: int) -> None:
            for _ in loader.epoch(number):
                pass

        rate = measure(loader.steps_per_epoch * BATCH_SIZE, epoch)
    config = {**case, "ranks": ranks, "batch_size_a_rank": BATCH_SIZE, "row_group_rows": ROW_GROUP_ROWS, "rows": ROWS}
    return {"benchmark": "loader", "case": name, "config": config, "samples_per_s": rate}


def criteo_row() -> dict[str, Any]:
    """Rows a second that prepare reads, checks, numbers and writes."""
    generator = np.random.default_rng(0)
    columns = [generator.integers(0, 2, RAW_ROWS).astype(str)]
    columns += [(generator.pareto(1, RAW_ROWS) * 10).astype(np.int64).astype(str) for _ in range(13)]
    for field in range(26):
        ids = np.minimum(generator.zipf(1.2, RAW_ROWS), 10 ** (1 + field % 6)) * 2654435761 % (1 << 32)
        columns.append(np.char.mod("%08x", ids))
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "train.txt"
        raw.write_text("".join("\t".join(row) + "\n" for row in zip(*columns, strict=True)))
        spec = Spec(data=DataSpec(format="criteo", path=str(raw)))

        def run(number: int) -> None:
            out = Path(folder) / str(number)
            out.mkdir()
            prepare(spec, out, lambda _: None)

        rate = measure(RAW_ROWS, run)
        raw_bytes = raw.stat().st_size
    config = {"format": "criteo", "raw_rows": RAW_ROWS, "raw_bytes": raw_bytes}
    return {"benchmark": "prepare", "case": "criteo", "config": config, "rows_per_s": rate}


def main() -> None:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core for all threads
    rows = [loader_row(name, case) for name, case in CASES.items()] + [criteo_row()]
    for row in rows:
        rate = row.get("samples_per_s") or row["rows_per_s"]
        print(f"{row['case']:40} {rate['median']:>12,.0f}/s   ({rate['min']:,.0f} to {rate['max']:,.0f})")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {"environment": environment(REPEATS, "service/thresher/data", "benchmarks/loader.py"), "rows": rows},
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
