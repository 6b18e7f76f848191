"""Lookups in compact tables against FBGEMM's and torch's, and their bytes against the entropy of what they hold.

26 fields look one id a sample up in one table of `rows`, so that all of its memory is read at random. Masks keep each
entry by chance. Ours and FBGEMM's int8 take turns on the same batches, so that a noisy machine disturbs them alike, and
the ratio is of their medians. `python -m benchmarks.tables quick` measures a few cases on small tables and writes
nothing.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from benchmarks._environment import ROOT, environment
from benchmarks._malloc import MALLOC, run_keeping_memory
from thresher.kernels import memory
from thresher.tables import Writer, binding, safetensors_file
from thresher.tables.layouts import Bags, Shape
from thresher.tables.values import BITS

RESULTS = ROOT / "benchmarks" / "results" / "tables.json"
FIELDS, BATCH = 26, 4096
QUICK = sys.argv[1:] == ["quick"]
ROWS = {16: 1_000_000, 64: 300_000} if QUICK else {16: 20_000_000, 64: 4_000_000, 128: 2_000_000}
PRUNED = (0.9, 0.97) if QUICK else (0.5, 0.9, 0.97, 0.99)
IDS = ("uniform",) if QUICK else ("uniform", "zipf")
THREADS = (1,) if QUICK else (1, 2)
PAGES = ("4k", "huge")
CASES = [("bucketed", "fp16"), ("bitmap", "fp16"), ("bucketed", "int8"), ("bucketed", "int4"), ("dense", "fp16")]
SECONDS, LEAST = (0.3, 5) if QUICK else (1.0, 9)
CHUNK = 1 << 16

Lookup = Callable[[np.ndarray], Any]  # of ids [FIELDS, BATCH]


def entropy_bytes(rows: int, dim: int, pruned: float, kept: int, dtype: str) -> float:
    """Least bytes of masks that keep each entry by chance, and of the values."""
    kept_share = 1 - pruned
    bits = -(kept_share * math.log2(kept_share) + pruned * math.log2(pruned))
    return rows * dim * bits / 8 + kept * BITS[dtype] / 8  # type: ignore[index]


def by_kept_of(rows: int, dim: int, pruned: float, seed: int = 0) -> list[int]:
    """How many rows keep how many columns."""
    counts = np.zeros(dim + 1, np.int64)
    for mask in masks(rows, dim, pruned, seed):
        counts += np.bincount(mask.sum(axis=1), minlength=dim + 1)
    return [int(count) for count in counts]


def masks(rows: int, dim: int, pruned: float, seed: int = 0) -> Iterator[np.ndarray]:
    """Masks, chunk by chunk, the same each time."""
    random = np.random.default_rng(seed)
    for first in range(0, rows, CHUNK):
        yield random.random((min(CHUNK, rows - first), dim), np.float32) >= pruned


def write_table(folder: Path, rows: int, dim: int, pruned: float, layout: str, dtype: str) -> tuple[Path, Shape, float]:
    """Write a table; gives its file, its shape and the seconds that the writer took."""
    by_kept = by_kept_of(rows, dim, pruned) if layout != "dense" else [0] * dim + [rows]
    writer = Writer(folder, model="benchmark", seed=0, budget=None, spec_fingerprint="0" * 64)
    random, seconds = np.random.default_rng(1), 0.0
    source = masks(rows, dim, pruned if layout != "dense" else 0)
    table = writer.table("t", dim=dim, rows_by_kept=by_kept, dtype=dtype, layout=layout, renumber=True)  # type: ignore[arg-type]
    for mask in source:
        values = random.standard_normal(mask.shape, np.float32)
        start = time.perf_counter()
        table.write(values, mask)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    table.close()
    seconds += time.perf_counter() - start
    kept = sum(kept * count for kept, count in enumerate(by_kept))
    return folder / "tables" / "t.safetensors", Shape(layout, dtype, rows, dim, kept), seconds  # type: ignore[arg-type]


def huge(array: np.ndarray) -> np.ndarray:
    """A copy in huge pages, where the system gives them on request."""
    mapped = mmap.mmap(-1, -(-array.nbytes >> 21) + 1 << 21)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    copy = np.frombuffer(mapped, array.dtype, array.size).reshape(array.shape)
    copy[...] = array
    return copy


def ours(path: Path, shape: Shape, pages: str, threads: int) -> Lookup:
    """Our lookup: a call of the core for each thread."""
    arrays = safetensors_file.parse(safetensors_file.map_file(path), str(path))
    if pages == "huge":
        arrays = {name: huge(array) for name, array in arrays.items()}
    core = binding.library()
    assert core is not None, "build the core first: make install"
    table = binding.NativeTable(core, arrays, shape, str(path))
    pool = ThreadPoolExecutor(threads)

    def part(ids_FB: np.ndarray) -> list[np.ndarray]:
        return binding.pooled([Bags(table, ids_B) for ids_B in ids_FB])

    def lookup(ids_FB: np.ndarray) -> Any:
        if threads == 1:
            return part(ids_FB)
        parts = [np.ascontiguousarray(some) for some in np.array_split(ids_FB, threads, axis=1)]
        return list(pool.map(part, parts))

    return lookup


def fbgemm(rows: int, dim: int, dtype: str, pages: str, threads: int) -> Lookup:
    """FBGEMM's table-batched embedding for inference."""
    kind = SparseType.from_int({"fp32": 0, "fp16": 1, "int8": 2, "int4": 3}[dtype])
    tables = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", rows, dim, kind, EmbeddingLocation.HOST)],
        feature_table_map=[0] * FIELDS,
        device="cpu",
        output_dtype=SparseType.FP32,
        indices_dtype=torch.int64,
    )
    tables.fill_random_weights()
    if pages == "huge":
        weights = memory.empty(tables.weights_host.numel(), dtype=torch.uint8)
        weights.copy_(tables.weights_host)
        tables.weights_host = weights
    offsets = torch.arange(FIELDS * BATCH + 1)

    def lookup(ids_FB: np.ndarray) -> Any:
        torch.set_num_threads(threads)
        return tables(torch.from_numpy(ids_FB.reshape(-1)), offsets)

    return lookup


def embedding_bags(rows: int, dim: int, pages: str, threads: int) -> Lookup:
    """torch's functional embedding_bag, once a field."""
    weights = torch.randn(rows, dim)
    if pages == "huge":
        weights = memory.empty(rows * dim).copy_(weights.view(-1)).view(rows, dim)
    offsets = torch.arange(BATCH)

    def lookup(ids_FB: np.ndarray) -> Any:
        torch.set_num_threads(threads)
        return [
            torch.nn.functional.embedding_bag(ids, weights, offsets, mode="sum") for ids in torch.from_numpy(ids_FB)
        ]

    return lookup


def batches(rows: int, ids: str) -> Iterator[np.ndarray]:
    """Different batches, so many that their rows do not stay in the caches."""
    random = np.random.default_rng(2)
    found = []
    for _ in range(16):
        if ids == "uniform":
            found.append(random.integers(0, rows, (FIELDS, BATCH)))
        else:  # the ranks of a Zipf law, spread over the table as a hash would
            found.append(random.zipf(1.05, (FIELDS, BATCH)) % rows * 2_654_435_761 % rows)
    return cycle(found)


def nanoseconds(lookups: list[Lookup], rows: int, ids: str) -> list[float]:
    """Of each way to look up, in turns: the median for one id."""
    source = batches(rows, ids)
    times: list[list[float]] = [[] for _ in lookups]
    began = time.perf_counter()
    while len(times[0]) <= LEAST or time.perf_counter() - began < SECONDS * len(lookups):
        batch = next(source)
        for own, lookup in zip(times, lookups, strict=True):
            start = time.perf_counter()
            lookup(batch)
            own.append((time.perf_counter() - start) * 1e9 / batch.size)
    return [statistics.median(own[1:]) for own in times]  # the first warms up


def row_of(
    layout: str, dtype: str, dim: int, pruned: float, rows: int, size: int, bound: float | None
) -> dict[str, Any]:
    """What a row of the results says of a table."""
    return {
        "layout": layout, "dtype": dtype, "dim": dim, "pruned": pruned, "rows": rows, "bytes": size,
        "entropy_bound_bytes": None if bound is None else round(bound),
    }  # fmt: skip


def timed(row: dict[str, Any], make: Callable[[str, int], Lookup]) -> Iterator[dict[str, Any]]:
    """The row for every kind of ids, number of threads and size of pages."""
    rows, dim = row["rows"], row["dim"]
    for pages, threads in product(PAGES, THREADS):
        own, theirs = make(pages, threads), fbgemm(rows, dim, "int8", pages, threads)
        for ids in IDS:
            found, int8 = nanoseconds([own, theirs], rows, ids)
            yield row | {
                "ids": ids, "threads": threads, "pages": pages, "ns_per_lookup": round(found, 2),
                "fbgemm_int8_ns": round(int8, 2), "ratio_to_fbgemm_int8": round(found / int8, 3),
            }  # fmt: skip


def measured() -> Iterator[dict[str, Any]]:
    """All rows."""
    for dim, rows in ROWS.items():
        for dtype, bits in (("fp32", 32), ("fp16", 16), ("int8", 8), ("int4", 4)):
            size = rows * (dim * bits // 8 + (4 if bits < 16 else 0))
            row = row_of("fbgemm", dtype, dim, 0, rows, size, None)
            yield from timed(row, lambda pages, threads, dtype=dtype: fbgemm(rows, dim, dtype, pages, threads))  # noqa: B023
        row = row_of("embedding_bag", "fp32", dim, 0, rows, rows * dim * 4, None)
        yield from timed(row, lambda pages, threads: embedding_bags(rows, dim, pages, threads))  # noqa: B023
        for (layout, dtype), pruned in product(CASES, PRUNED):
            if layout == "dense" and pruned != PRUNED[0]:
                continue  # its bytes and its time are the same
            with tempfile.TemporaryDirectory() as folder:
                path, shape, seconds = write_table(Path(folder), rows, dim, pruned, layout, dtype)
                bound = None if layout == "dense" else entropy_bytes(rows, dim, pruned, shape.kept, dtype)
                share = 0 if layout == "dense" else pruned
                row = row_of(layout, dtype, dim, share, rows, path.stat().st_size, bound)
                row["write_seconds_per_1e8_params"] = round(seconds * 1e8 / (rows * dim), 1)
                yield from timed(row, lambda pages, threads: ours(path, shape, pages, threads))  # noqa: B023


def described(row: dict[str, Any]) -> str:
    """A row of the results as a line."""
    line = (
        f"{row['layout']:13} {row['dtype']:4} d={row['dim']:<3} {row['pruned']:<4} pruned, {row['ids']:7} "
        f"{row['threads']} threads, {row['pages']:4} pages: {row['ns_per_lookup']:6.2f} ns, "
        f"{row['ratio_to_fbgemm_int8']:.2f} of FBGEMM int8's {row['fbgemm_int8_ns']:.2f}; "
        f"{row['bytes'] / row['rows']:.3f} bytes a row"
    )
    if bound := row["entropy_bound_bytes"]:
        line += f", {row['bytes'] / bound:.3f} of the bound"
    return line


def main() -> None:
    """Measure every configuration and write the results."""
    found = []
    for row in measured():
        found.append(row)
        print(described(row), flush=True)
    if QUICK:
        return
    where = environment(LEAST, "service/thresher/tables", "benchmarks/tables.py")
    config = {"fields": FIELDS, "batch": BATCH, "malloc": {name: os.environ[name] for name in MALLOC}}
    RESULTS.write_text(json.dumps({"environment": where, "config": config, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    run_keeping_memory(main)
