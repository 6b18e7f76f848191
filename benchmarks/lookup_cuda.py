"""What lookup and step cost on a GPU, against the time that a plain copy of the same bytes takes.

    python -m benchmarks.lookup_cuda

26 tables of 1,000,000 rows, float32, row-wise Adagrad; ids uniform or by Zipf's law. A *step* is lookup, backward and
update. First every representation must equal the reference. The bound is the time in which the device copies as many
bytes as must be moved at least: each different row once (in a step read twice and written, with its moment and
threshold), the ids, the pooled vectors and their gradient. FBGEMM's tables run on the same batches if they are there.
Says so and does nothing where there is no GPU. Writes `benchmarks/results/lookup_cuda.json`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._environment import environment
from thresher.kernels import reference
from thresher.kernels.layout import Combine, Optimizer, Shared, output_dims, starts_of, tables_of

TABLES, ROWS = 26, 1_000_000
DIMS, BATCHES, POOLING = (16, 64, 128), (4096, 65536), 1
KEPT = 0.1  # of the entries, in compact storage
ZIPF = 1.05
WARMUP, REPEATS = 10, 50
RESULTS = Path(__file__).parent / "results" / "lookup_cuda.json"


@dataclass(frozen=True)
class Case:
    """One representation of the tables, and one kind of batch."""

    name: str
    shared: Shared = Shared.NONE
    masked: bool = False
    combine: Combine | None = None
    tables: int = TABLES
    rows: int = ROWS
    dim: int = 16
    batch: int = 4096
    pooling: int = POOLING
    ids: str = "uniform"


CASES = [
    Case("dense"),
    *(Case(f"threshold by {shared.name.lower()}", shared) for shared in Shared if shared),
    Case("compact", masked=True),
    *(Case(f"composed, {combine.name.lower()}", combine=combine) for combine in Combine),
]


class Group:
    """The tensors of a case, and the two operators on them."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.dims = case, [case.dim] * case.tables
        collisions = math.isqrt(case.rows) + 1
        split = [(1, collisions), (collisions, collisions)] if case.combine is not None else []
        self.rows = [sum(modulus for _, modulus in split) or case.rows] * case.tables
        self.partitions = [x for _ in range(case.tables) for x in (len(split), *sum(split, ()))] if split else []
        self.combine = case.combine or Combine.ADD
        mask, starts = (
            torch.empty(0, dtype=torch.uint8, device=device),
            torch.empty(0, dtype=torch.int64, device=device),
        )
        entries = kept = sum(self.rows) * case.dim
        if case.masked:
            mask, starts, kept = self._masks(device)
        sizes = [0, case.tables, case.tables * case.dim, sum(self.rows), entries]
        self.tensors: dict[str, Any] = {
            "weights": torch.rand(kept, device=device) - 0.5,
            "weight_states": [torch.zeros(sum(self.rows), device=device)],
            "thresholds": torch.full((sizes[case.shared],), -2.0, device=device),
            "threshold_states": [torch.zeros(sum(self.rows), device=device)] if case.shared >= Shared.ROW else [],
            "mask": mask,
            "starts": starts,
            "seen": torch.zeros(sum(self.rows) if case.shared else 0, dtype=torch.bool, device=device),
        }
        self.layout = (
            self.rows, self.dims, list(range(case.tables)), self.partitions, self.combine, case.shared, False,
        )  # fmt: skip
        width = sum(output_dims(self.dims, self.partitions, self.combine))
        self.grad = torch.randn(case.batch, width, device=device)

    def _masks(self, device: str) -> tuple[Tensor, Tensor, int]:
        masks, starts, kept = [], [], 0
        bits = 1 << torch.arange(8, device=device)
        for table in tables_of(self.rows, self.dims):
            columns = torch.rand(table.rows, table.mask_bytes * 8, device=device) < KEPT
            columns[:, table.dim :] = False
            packed = (columns.view(table.rows, -1, 8) * bits).sum(2).to(torch.uint8)
            masks.append(packed.flatten())
            starts.append(starts_of(packed, table.dim, kept))
            kept += int(columns.sum())
        return torch.cat([*masks, masks[0][:8]]), torch.cat(starts), kept

    def lookup(self, backend: Any, ids: Tensor, offsets: Tensor) -> Tensor:
        read = [self.tensors[name] for name in ("weights", "thresholds", "mask", "starts")]
        return backend.lookup(*read, ids, offsets, None, 0.0, *self.layout)

    def update(self, backend: Any, ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        return backend.update(
            self.grad, *self.tensors.values(), ids, offsets, None, 0.0, *self.layout, Optimizer.ROWWISE_ADAGRAD, 0.01,
            0.0, 0.01, 0.0, 1e-8, 1, False,
        )  # fmt: skip

    def least_bytes(self, ids: Tensor) -> tuple[float, float]:
        """Bytes that a lookup and a step must move at least, the step's lookup included."""
        case, per_table = self.case, ids.view(self.case.tables, -1)
        rows = 0
        for divisor, modulus in [(1, case.rows)] if not self.partitions else _splits(self.partitions):
            rows += sum(int((own // divisor % modulus).unique().numel()) for own in per_table)
        mask_bytes = -(-case.dim // 8) + 1 if case.masked else 0
        entries = case.dim * 4 * (KEPT if case.masked else 1)
        threshold = {Shared.ROW: 4, Shared.ELEMENT: case.dim * 4}.get(case.shared, 0)
        in_and_out = ids.numel() * 8 + self.grad.numel() * 4
        lookup = rows * (entries + mask_bytes + threshold) + in_and_out
        states = 8 + (8 if threshold else 0)
        return lookup, lookup + rows * (2 * entries + mask_bytes + 2 * threshold + states) + in_and_out


def _splits(partitions: list[int]) -> list[tuple[int, int]]:
    return [(partitions[1 + 2 * part], partitions[2 + 2 * part]) for part in range(partitions[0])]


def make_ids(case: Case, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids of all tables, and offsets of bags that all hold `pooling` ids."""
    torch.manual_seed(seed)
    shares = torch.rand(case.tables * case.batch * case.pooling, dtype=torch.float64, device=device)
    if case.ids == "zipf":  # the inverse of the continuous law's distribution; frequent rows spread over the table
        power = 1 - ZIPF
        ranks = (1 + shares * (float(case.rows + 1) ** power - 1)).pow(1 / power).long() - 1
        ids = ranks.clamp(0, case.rows - 1) * 7919 % case.rows
    else:
        ids = (shares * case.rows).long()
    return ids, torch.arange(case.tables * case.batch + 1, device=device) * case.pooling


def check(case: Case, backend: Any, device: str) -> None:
    """Two steps on small tables must equal the reference's."""
    found = []
    for functions in (backend, reference):
        torch.manual_seed(0)
        group = Group(replace(case, tables=3, rows=50, batch=7, pooling=3), device)
        for seed in range(2):
            batch = make_ids(group.case, seed, device)
            found.append([group.lookup(functions, *batch), *group.update(functions, *batch), group.tensors["weights"]])
    torch.testing.assert_close(found[:2], found[2:], atol=1e-4, rtol=1e-4)


def milliseconds(call: Callable[[int], Any]) -> list[float]:
    """Times on the device of each call, which gets its number."""
    times = []
    for number in range(WARMUP + REPEATS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        call(number)
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return times[WARMUP:]


def copy_bytes_per_ms() -> float:
    """Bytes that a copy from the device to itself reads and writes in a millisecond."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(milliseconds(lambda _: target.copy_(source)))


def fbgemm_tables(case: Case) -> Any:
    """FBGEMM's tables of the same sizes, or none if this build has no kernels for CUDA."""
    try:
        training = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
        common = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
        tables = training.SplitTableBatchedEmbeddingBagsCodegen(
            [
                (case.rows, case.dim, common.EmbeddingLocation.DEVICE, training.ComputeDevice.CUDA)
                for _ in range(case.tables)
            ],
            optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=0.01,
        )
        tables.init_embedding_weights_uniform(-0.5, 0.5)
        ids, offsets = make_ids(case, 0, "cuda")
        tables(ids, offsets)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        print(f"without FBGEMM: {error}")
        return None
    return tables


def measure(case: Case, backend: Any, bytes_per_ms: float, fbgemm: Any) -> dict[str, Any]:
    """Times of one case, and their ratios to the bound and to FBGEMM's times."""
    group = Group(case, "cuda")
    batches = [make_ids(case, seed, "cuda") for seed in range(10)]
    bounds = [least / bytes_per_ms for least in group.least_bytes(batches[0][0])]

    def step(number: int) -> None:
        group.lookup(backend, *batches[number % 10])
        group.update(backend, *batches[number % 10])

    times = {
        "lookup": milliseconds(lambda number: group.lookup(backend, *batches[number % 10])),
        "step": milliseconds(step),
    }
    found: dict[str, Any] = {
        "representation": case.name, "dim": case.dim, "batch": case.batch, "pooling": case.pooling, "ids": case.ids,
    }  # fmt: skip
    for (name, own), bound in zip(times.items(), bounds, strict=True):
        median = statistics.median(own)
        found |= {
            f"{name}_ms_median": round(median, 4),
            f"{name}_ms_min": round(min(own), 4),
            f"{name}_ms_max": round(max(own), 4),
            f"{name}_ratio_to_copy": round(median / bound, 2),
        }
    if fbgemm is not None:
        theirs = {
            "lookup": milliseconds(lambda number: fbgemm(*batches[number % 10])),
            "step": milliseconds(lambda number: fbgemm(*batches[number % 10]).backward(group.grad)),
        }
        for name, own in theirs.items():
            found[f"fbgemm_{name}_ms_median"] = round(statistics.median(own), 4)
    return found


def main() -> None:
    if not torch.cuda.is_available():
        print("lookup_cuda: skipped, there is no NVIDIA GPU")
        return
    from thresher.kernels import triton as backend  # here, since a machine without a GPU may have no Triton

    for case in CASES:
        for dim in DIMS:
            check(replace(case, dim=dim), backend, "cuda")
    bytes_per_ms = copy_bytes_per_ms()
    found = []
    for dim in DIMS:
        fbgemm = fbgemm_tables(Case("dense", dim=dim))
        for case in CASES:
            for batch in BATCHES:
                for ids in ("uniform", "zipf"):
                    sized = replace(case, dim=dim, batch=batch, ids=ids)
                    found.append(measure(sized, backend, bytes_per_ms, fbgemm if case.name == "dense" else None))
                    print(json.dumps(found[-1]))
    where = environment(REPEATS, "service/thresher/kernels", "benchmarks/lookup_cuda.py")
    where |= {
        "gpu": torch.cuda.get_device_name(),
        "triton": importlib.metadata.version("triton"),
        "copy_gigabytes_per_s": round(bytes_per_ms / 1e6),
    }
    config = {"tables": TABLES, "rows": ROWS, "kept": KEPT, "zipf": ZIPF, "optimizer": "rowwise_adagrad"}
    RESULTS.write_text(json.dumps({"environment": where, "config": config, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
