"""Our lookup and its fused update against FBGEMM's, torch's, and the bound of memory.

26 tables share `rows`; every sample has `pooling` ids of each. A *forward* is the lookup alone, a *step* lookup,
backward and update by row-wise Adagrad. All kernels of one configuration take turns on the same batches, so that a
noisy machine disturbs them alike, and ratios are of their medians. The bound is the bytes that a pass must touch over
the rate at which random rows of that size can be read from a table of that size (`gather.c`).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from benchmarks._environment import ROOT, environment
from benchmarks._malloc import MALLOC, run_keeping_memory
from thresher.kernels import layout, memory
from thresher.kernels.layout import Combine, Optimizer, Shared
from thresher.kernels.ops import Group

RESULTS = ROOT / "benchmarks" / "results" / "lookup.json"
TABLES, BATCH = 26, 4096
ROWS, DIMS, POOLINGS, IDS, THREADS = (10**5, 10**6, 10**7), (16, 64, 128), (1, 20), ("uniform", "zipf"), (1, 2)
KEPT = 0.05  # of the entries, for masked tables
EPS, LEARNING_RATE = 1e-8, 0.01
SECONDS, LEAST = 0.35, 3  # that the repeats of a kernel and FBGEMM's together may take, beside the least number of them

GRANULARITIES = {
    Shared.TABLE: "table",
    Shared.COLUMN: "dimension",
    Shared.ROW: "feature",
    Shared.ELEMENT: "feature_dimension",
}


@dataclass
class Kernel:
    """One way to look up: its names in the results, and what a pass of it touches."""

    name: str
    granularity: str | None
    forward: Callable[[Tensor, Tensor], Tensor]
    row_bytes: float  # of values and thresholds, read by the lookup of one id
    state_bytes: float  # beside them, read by the update of one row
    backend: str = "cpu"
    before: Callable[[], Any] = lambda: None
    after: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Config:
    """What is looked up."""

    rows: int
    dim: int
    pooling: int
    ids: str


def batches(config: Config, rows_per_table: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Different batches, so many that their rows do not stay in the caches."""
    random = np.random.default_rng(1)
    count = TABLES * BATCH * config.pooling
    offsets = torch.arange(0, count + 1, config.pooling)
    found = []
    for _ in range(16 if config.pooling == 1 else 4):
        if config.ids == "uniform":
            ids = random.integers(0, rows_per_table, count)
        else:  # the ranks of a Zipf law, spread over the table as a hash would
            ids = random.zipf(1.05, count) % rows_per_table * 2_654_435_761 % rows_per_table
        found.append((torch.from_numpy(ids), offsets))
    yield from itertools.cycle(found)


def group_of(weights: Tensor, rows: int, dim: int, shared: Shared, mask: Tensor, starts: Tensor, **more: Any) -> Group:
    """Our tables; the thresholds prune about a tenth."""
    sizes = {Shared.NONE: 0, Shared.TABLE: TABLES, Shared.COLUMN: TABLES * dim, Shared.ROW: TABLES * rows}
    sizes[Shared.ELEMENT] = TABLES * rows * dim
    own = shared >= Shared.ROW
    return Group(
        weights=weights,
        weight_states=[memory.zeros(TABLES * rows)],
        thresholds=memory.empty(sizes[shared]).fill_(-5.3),
        threshold_states=[memory.zeros(TABLES * rows)] if own else [],
        mask=mask,
        starts=starts,
        seen=memory.zeros(TABLES * rows if shared else 0, dtype=torch.bool),
        rows=[rows] * TABLES,
        dims=[dim] * TABLES,
        feature_tables=list(range(TABLES)),
        shared=shared,
        mean=False,
        optimizer=Optimizer.ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        threshold_learning_rate=LEARNING_RATE,
        eps=EPS,
        **more,
    )


def ours(rows: int, dim: int) -> Iterator[Callable[[], Kernel]]:
    """Our kernels; each is made when it is called, since not all fit into memory at once."""
    entries = TABLES * rows * dim
    weights = memory.empty(entries).uniform_(-0.05, 0.05)  # of all that keep every entry, one after the other
    none, nowhere = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)

    def plain(shared: Shared) -> Kernel:
        group = group_of(weights, rows, dim, shared, none, nowhere)
        leaf = None
        if shared in (Shared.TABLE, Shared.COLUMN):
            leaf = group.thresholds.clone().requires_grad_()
        s_bytes = {Shared.ROW: 4, Shared.ELEMENT: 4 * dim}.get(shared, 0)
        state = 4 + (4 if shared >= Shared.ROW else 0) + (1 if shared else 0)
        name = "soft_threshold" if shared else "dense"
        return Kernel(
            name, GRANULARITIES.get(shared), lambda i, o: group.lookup(i, o, None, leaf), 4 * dim + s_bytes, state
        )

    def masked() -> Kernel:
        width = -(-dim // 8)
        packed = torch.zeros(TABLES * rows, width, dtype=torch.uint8)
        for bit in range(8):
            packed |= (torch.rand(TABLES * rows, width) < KEPT).to(torch.uint8) << bit
        if dim % 8:
            packed[:, -1] &= (1 << dim % 8) - 1
        starts, first = [], 0
        for table in range(TABLES):
            starts.append(layout.starts_of(packed[table * rows : (table + 1) * rows], dim, first))
            first = int(starts[-1][-1])
        mask = torch.cat([packed.flatten(), torch.zeros(layout.MASK_PADDING, dtype=torch.uint8)])
        group = group_of(memory.empty(first).uniform_(-0.05, 0.05), rows, dim, Shared.NONE, mask, torch.cat(starts))
        return Kernel("masked", None, lambda i, o: group.lookup(i, o), width + 1 + 4 * dim * KEPT, 4)

    def composed(combine: Combine) -> Kernel:
        buckets = -(-rows // 4)  # quotient and remainder, 4 ids to a remainder
        stacked = buckets + 4
        group = group_of(
            memory.empty(TABLES * stacked * dim).uniform_(-0.05, 0.05), stacked, dim, Shared.NONE, none, nowhere,
            partitions=[2, 1, buckets, buckets, 4] * TABLES, combine=combine,
        )  # fmt: skip
        return Kernel(f"composed_{combine.name.lower()}", None, lambda i, o: group.lookup(i, o), 8 * dim, 8)

    for shared in Shared:
        yield lambda shared=shared: plain(shared)
    yield masked
    yield lambda: composed(Combine.ADD)
    yield lambda: composed(Combine.MULT)


def fbgemm(rows: int, dim: int) -> Kernel:
    """FBGEMM's table-batched embedding."""
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * TABLES,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        eps=EPS,
        device=torch.device("cpu"),
    )
    for weight in tables.split_embedding_weights():
        weight.uniform_(-0.05, 0.05)
    return Kernel("fbgemm_tbe", None, lambda i, o: tables(indices=i, offsets=o), 4 * dim, 4, "fbgemm")


def embedding_bags(rows: int, dim: int) -> Kernel:
    """torch.nn.EmbeddingBag with sparse gradients and torch's sparse Adagrad, which keeps a moment for each entry."""
    bags = [torch.nn.EmbeddingBag(rows, dim, mode="sum", sparse=True) for _ in range(TABLES)]
    optimizer = torch.optim.Adagrad([p for bag in bags for p in bag.parameters()], lr=LEARNING_RATE)

    def forward(indices: Tensor, offsets: Tensor) -> Tensor:
        per_table = indices.numel() // TABLES
        starts = offsets[: offsets.numel() // TABLES]
        return torch.cat([bag(ids, starts) for bag, ids in zip(bags, indices.split(per_table), strict=True)], dim=1)

    return Kernel(
        "embedding_bag", None, forward, 4 * dim, 4 * dim, "torch", before=optimizer.zero_grad, after=optimizer.step
    )


def run(kernel: Kernel, pass_: str, batch: tuple[Tensor, Tensor], grad: Tensor) -> float:
    """Milliseconds of one pass."""
    if pass_ == "forward":
        with torch.no_grad():
            start = time.perf_counter()
            kernel.forward(*batch)
            return (time.perf_counter() - start) * 1e3
    start = time.perf_counter()
    kernel.before()
    kernel.forward(*batch).backward(grad)
    kernel.after()
    return (time.perf_counter() - start) * 1e3


def gather_bandwidth() -> Callable[[Tensor, Tensor, int], float]:
    """Compile `gather.c`; gives a function (table, rows, bytes of a row) to bytes a second."""
    folder = Path(tempfile.mkdtemp())
    source = ROOT / "benchmarks" / "gather.c"
    subprocess.run(
        ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", folder / "gather.so"], check=True
    )
    library = ctypes.CDLL(str(folder / "gather.so"))
    library.gather.restype = ctypes.c_uint64

    def measure(table: Tensor, rows: Tensor, row_bytes: int) -> float:
        times = []
        for part in rows.split(BATCH * TABLES):
            start = time.perf_counter()
            library.gather(
                ctypes.c_void_p(table.data_ptr()), ctypes.c_void_p(part.data_ptr()), ctypes.c_int64(part.numel()),
                ctypes.c_int64(row_bytes),
            )  # fmt: skip
            times.append((time.perf_counter() - start) / part.numel())
        return row_bytes / statistics.median(times)

    return measure


def bound_ms(kernel: Kernel, config: Config, different: int, pass_: str, bandwidth: float) -> float:
    """Least time of a pass: what it must read and write of rows, vectors and gradients, at the rate of random reads."""
    ids, pooled = TABLES * BATCH * config.pooling, TABLES * BATCH * config.dim * 4
    touched = ids * kernel.row_bytes + pooled
    if pass_ == "step":
        touched += pooled + 2 * different * (kernel.row_bytes + kernel.state_bytes)
    return touched / bandwidth * 1e3


def measure(
    config: Config, rows: int, threads: int, kernel: Kernel, theirs: Kernel, bandwidth: float
) -> list[dict[str, Any]]:
    """Time a kernel and FBGEMM in turns, both passes."""
    torch.set_num_threads(threads)
    grad = torch.randn(BATCH, TABLES * config.dim) * 1e-3
    source, found = batches(config, rows), []
    for pass_ in ("forward", "step"):
        for one in (kernel, theirs):
            run(one, pass_, next(source), grad)
        own: list[float] = []
        other: list[float] = []
        began = time.perf_counter()
        while len(own) < LEAST or time.perf_counter() - began < SECONDS:
            batch = next(source)
            own.append(run(kernel, pass_, batch, grad))
            other.append(run(theirs, pass_, batch, grad))
        median, fbgemm_ms = statistics.median(own), statistics.median(other)
        found.append(
            {
                "kernel": kernel.name,
                "granularity": kernel.granularity,
                "backend": kernel.backend,
                **vars(config),
                "threads": threads,
                "pass": pass_,
                "ms_median": round(median, 3),
                "ms_min": round(min(own), 3),
                "ms_max": round(max(own), 3),
                "repeats": len(own),
                "fbgemm_ms_median": round(fbgemm_ms, 3),
                "ratio_to_fbgemm": round(median / fbgemm_ms, 3),
                "bound_ms": round(bound_ms(kernel, config, different_rows(source, rows), pass_, bandwidth), 3),
            }
        )
    return found


def different_rows(source: Iterator[tuple[Tensor, Tensor]], rows: int) -> int:
    """Rows that a batch touches."""
    indices, _ = next(source)
    tables = torch.arange(TABLES).repeat_interleave(indices.numel() // TABLES)
    return int(torch.unique(indices + tables * rows).numel())


def main() -> None:
    """Measure every configuration and write the results."""
    bandwidth_of, found = gather_bandwidth(), []
    for total, dim in itertools.product(ROWS, DIMS):
        rows = total // TABLES
        table = torch.empty(TABLES * rows * dim).uniform_()
        bandwidth = bandwidth_of(table, torch.randint(0, TABLES * rows, (8 * TABLES * BATCH,)), 4 * dim)
        del table
        theirs = fbgemm(rows, dim)
        # One after the other: ours are gone before torch's are made, since not all fit into memory at once.
        for make in itertools.chain(ours(rows, dim), [lambda rows=rows, dim=dim: embedding_bags(rows, dim)]):
            kernel = make()
            for pooling, ids in itertools.product(POOLINGS, IDS):
                for threads in THREADS:
                    found += measure(Config(total, dim, pooling, ids), rows, threads, kernel, theirs, bandwidth)
                one, two = found[-3], found[-1]
                print(
                    f"{total:>10,} rows  d={dim:3}  pooling {pooling:2}  {ids:7}  {kernel.name} "
                    f"{kernel.granularity or '':17} step {one['ms_median']:8.2f} ms, {one['ratio_to_fbgemm']:.2f} of "
                    f"FBGEMM, {one['bound_ms'] / one['ms_median']:.2f} of the bound; 2 threads "
                    f"{one['ms_median'] / two['ms_median']:.2f} times faster",
                    flush=True,
                )
            del kernel  # before the next is made
    config = {
        "tables": TABLES, "batch": BATCH, "optimizer": "rowwise_adagrad", "kept_by_masks": KEPT,
        "malloc": {name: os.environ[name] for name in MALLOC},
    }  # fmt: skip
    where = environment(LEAST, "service/thresher/kernels", "benchmarks/lookup.py")
    RESULTS.write_text(json.dumps({"environment": where, "config": config, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    run_keeping_memory(main)
