"""The Triton kernels against the plain-PyTorch reference: in Triton's interpreter on a CPU, compiled on a GPU.

One process can do only one of the two (`conftest` says which), so the tests of the other are skipped.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from thresher.kernels import reference
from thresher.kernels.layout import (
    STATES,
    Combine,
    Optimizer,
    Shared,
    output_dims,
    starts_of,
    tables_of,
    unpack_masks,
)

pytest.importorskip("triton", reason="needs Triton")
from thresher.kernels import triton as backend
from thresher.kernels.triton import metadata

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# numpy tells what the interpreter's arithmetic meets in lanes whose results nobody stores.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DIMS = [3, 17, 1, 8]
PLAIN = [9, 20, 5, 33]
SPLITS = [[(1, 4), (4, 5)], [], [(1, 5)], [(1, 3), (3, 4), (12, 6)]]  # partitions of each table, as in `layout`
FEATURE_TABLES = [1, 0, 3, 0, 2]


class Case:
    """A random group of tables, whose tensors both backends get copies of, and its batches."""

    def __init__(
        self,
        shared: Shared = Shared.NONE,
        optimizer: Optimizer = Optimizer.SGD,
        dtype: torch.dtype = torch.float32,
        masked: bool = False,
        combine: Combine | None = None,
        mean: bool = False,
        dims: list[int] = DIMS,
        weighted: bool = False,
        integers: torch.dtype = torch.int64,
    ) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.dims, self.optimizer, self.mean, self.weighted, self.integers = dims, optimizer, mean, weighted, integers
        splits = [[] for _ in PLAIN] if combine is None else SPLITS
        self.ids = PLAIN if combine is None else [20, 20, 40, 60]
        self.rows = [sum(m for _, m in own) or n for own, n in zip(splits, PLAIN, strict=True)]
        self.partitions = [] if combine is None else [x for s in splits for x in (len(s), *itertools.chain(*s))]
        self.combine, self.shared = combine or Combine.ADD, shared
        entries = sum(n * d for n, d in zip(self.rows, dims, strict=True))
        sizes = [0, len(dims), sum(dims), sum(self.rows), entries]
        mask, starts, self.kept = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), entries
        if masked:
            mask, starts = self._masks()
        thresholds = self._uniform(sizes[shared]) * 4 - 2
        self.tensors: dict[str, Any] = {
            "weights": (self._uniform(self.kept) * 2 - 1).to(dtype),
            "weight_states": [self._uniform(sizes[Shared.ROW] if one else self.kept) for _, one in STATES[optimizer]],
            "thresholds": thresholds,
            "threshold_states": [
                self._uniform(sizes[Shared.ROW] if one else sizes[shared]) for _, one in STATES[optimizer]
            ]
            if shared >= Shared.ROW
            else [],
            "mask": mask,
            "starts": starts,
            "seen": torch.zeros(sizes[Shared.ROW] if shared else 0, dtype=torch.bool),
        }

    def _uniform(self, entries: int) -> Tensor:
        return torch.rand(entries, generator=self.generator)

    def _masks(self) -> tuple[Tensor, Tensor]:
        """Packed masks with some empty rows, and where blocks of rows start."""
        masks, starts, self.kept = [], [], 0
        for table in tables_of(self.rows, self.dims):
            packed = torch.randint(0, 256, (table.rows, table.mask_bytes), generator=self.generator, dtype=torch.uint8)
            packed[::5] = 0
            if table.dim % 8:
                packed[:, -1] &= (1 << table.dim % 8) - 1
            masks.append(packed.flatten())
            starts.append(starts_of(packed, table.dim, self.kept))
            self.kept += int(unpack_masks(packed, table.dim).sum())
        return torch.cat([*masks, torch.zeros(8, dtype=torch.uint8)]), torch.cat(starts)

    def batch(self, size: int = 5, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, offsets and sample weights; some bags are empty, some ids equal."""
        if lengths is None:
            lengths = torch.randint(0, 4, (len(FEATURE_TABLES), size), generator=self.generator)
        ids = [
            torch.randint(0, self.ids[table], (int(own.sum()),), generator=self.generator)
            for table, own in zip(FEATURE_TABLES, lengths, strict=True)
        ]
        offsets = torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0))
        indices = torch.cat(ids)
        weights = self._uniform(indices.numel()) - 0.5 if self.weighted else None
        return indices.to(self.integers), offsets.to(self.integers), weights

    def layout(self) -> tuple[Any, ...]:
        """The arguments that describe the group."""
        return self.rows, self.dims, FEATURE_TABLES, self.partitions, self.combine, self.shared, self.mean


def copied(tensors: dict[str, Any], device: str) -> dict[str, Any]:
    """Copies of a case's tensors."""
    return {
        name: [t.clone().to(device) for t in found] if isinstance(found, list) else found.clone().to(device)
        for name, found in tensors.items()
    }


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run."""
    return str(request.param)


def check(case: Case, device: str, steps: int = 2, **batch: Any) -> None:
    """A few steps by the reference and by the kernels give the same vectors, gradients and tensors."""
    ours, expected = copied(case.tensors, device), copied(case.tensors, "cpu")
    width = sum(output_dims(case.dims, case.partitions, case.combine)[table] for table in FEATURE_TABLES)
    low = case.tensors["weights"].dtype
    tolerance = {"atol": 2e-5, "rtol": 2e-5} if low == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    for step in range(1, steps + 1):
        ids, offsets, weights = case.batch(**batch)
        grad = torch.randn((offsets.numel() - 1) // len(FEATURE_TABLES), width, generator=case.generator)
        found = []
        for functions, tensors, own in ((backend, ours, device), (reference, expected, "cpu")):
            where = [None if t is None else t.to(own) for t in (ids, offsets, weights)]
            read = [tensors[name] for name in ("weights", "thresholds", "mask", "starts")]
            out = functions.lookup(*read, *where, -0.3, *case.layout())
            threshold_grad, weight_grad = functions.update(
                grad.to(own), *tensors.values(), *where, -0.3, *case.layout(), case.optimizer, 0.1, 0.01, 0.05, 0.02,
                1e-6, step, case.weighted,
            )  # fmt: skip
            found.append([t.cpu() for t in (out, threshold_grad, weight_grad)])
        torch.testing.assert_close(found[0], found[1], **tolerance)
        torch.testing.assert_close(copied(ours, "cpu"), expected, **tolerance)


@pytest.mark.parametrize(
    ("optimizer", "shared"),
    [
        *zip(itertools.cycle(Optimizer), Shared, strict=False),
        (Optimizer.ROWWISE_ADAGRAD, Shared.ROW),
        (Optimizer.ROWWISE_ADAGRAD, Shared.ELEMENT),
        (Optimizer.ADAM, Shared.ELEMENT),
    ],
)
def test_thresholds_and_optimizers(optimizer: Optimizer, shared: Shared, device: str) -> None:
    check(Case(shared, optimizer), device)


@pytest.mark.parametrize("combine", [None, *Combine])
@pytest.mark.parametrize("masked", [False, True])
def test_composed_and_compact(masked: bool, combine: Combine | None, device: str) -> None:
    check(Case(Shared.NONE, Optimizer.ADAM, masked=masked, combine=combine), device, steps=1)


@pytest.mark.parametrize("shared", [Shared.TABLE, Shared.COLUMN, Shared.ROW, Shared.ELEMENT])
def test_composed_with_thresholds(shared: Shared, device: str) -> None:
    combine = list(Combine)[shared % 3]
    check(Case(shared, Optimizer.ADAGRAD, combine=combine, masked=shared == Shared.ELEMENT), device, steps=1)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("combine", [None, *Combine])
def test_sample_weights(combine: Combine | None, mean: bool, device: str) -> None:
    check(
        Case(Shared.ROW, Optimizer.SGD, combine=combine, mean=mean, weighted=True, integers=torch.int32),
        device,
        steps=1,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_narrow_weights(masked: bool, dtype: torch.dtype, device: str) -> None:
    check(Case(Shared.NONE if masked else Shared.COLUMN, Optimizer.ROWWISE_ADAGRAD, dtype, masked, mean=True), device)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dims", [[1, 1, 1, 1], [130, 3, 17, 1], [16, 64, 32, 16], [1024, 8, 520, 1000]], ids=str)
def test_dimensions(dims: list[int], masked: bool, device: str) -> None:
    check(
        Case(Shared.NONE if masked else Shared.COLUMN, Optimizer.ADAGRAD, dims=dims, masked=masked),
        device,
        steps=1,
        size=2,
    )


@pytest.mark.parametrize("combine", [None, Combine.MULT])
def test_runs_of_many_chunks_and_programs_of_many_tiles(
    combine: Combine | None, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """With small ones of each, which would otherwise take a large batch."""
    for name, value in (("_CHUNK", 4), ("_TILE", 64), ("_PROGRAMS", 8)):
        monkeypatch.setattr(f"thresher.kernels.triton.backward.{name}", value)
    lengths = torch.tensor([[0, 15], [3, 0], [0, 0], [7, 1], [2, 25]])
    check(Case(Shared.TABLE, Optimizer.ADAM, combine=combine, weighted=True), device, steps=1, lengths=lengths)


def test_keys_of_64_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.kernels.triton.metadata._NARROW_KEYS", 0)
    metadata._metadata.cache_clear()
    check(Case(Shared.ROW, Optimizer.SGD, combine=Combine.ADD), device, steps=1)
    metadata._metadata.cache_clear()


def test_batch_without_ids(device: str) -> None:
    check(
        Case(Shared.COLUMN, Optimizer.ADAM, weighted=True), device, lengths=torch.zeros(len(FEATURE_TABLES), 3).long()
    )


def test_same_batch_gives_the_same_bits(device: str) -> None:
    case = Case(Shared.COLUMN, Optimizer.ADAM)
    ids, offsets, _ = case.batch(lengths=torch.full((len(FEATURE_TABLES), 3), 20))
    grad = torch.randn(3, sum(DIMS[table] for table in FEATURE_TABLES), device=device)
    found = []
    for _ in range(2):
        tensors = copied(case.tensors, device)
        results = backend.update(
            grad, *tensors.values(), ids.to(device), offsets.to(device), None, 0.0, *case.layout(), case.optimizer, 0.1,
            0.0, 0.0, 0.0, 1e-8, 1, False,
        )  # fmt: skip
        found.append([*results, tensors["weights"]])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """What the interpreter cannot show; a process of its own, since the kernels here are interpreted."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.triton_ahead_of_time"],
        env={**environ, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["_chunks_kernel", "_ids_kernel", "_lookup_kernel", "_pairs_kernel", "_update_kernel"]
    assert sorted({kernel["name"] for kernel in kernels}) == names
    assert all(kernel["ptx_bytes"] and kernel["cubin_bytes"] for kernel in kernels)
    # The first case has 16 columns everywhere: its rows must move 16 bytes at a time.
    assert all(kernel["wide_loads"] for kernel in kernels[:3])
