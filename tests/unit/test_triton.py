"""What is Triton's own: long runs, wide keys, the same bits, and kernels compiled for a GPU that is not there.

`test_kernels` compares the backend with the reference. In one process its kernels are either interpreted or compiled
(`conftest` says which), so the tests of the other are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.kernel_cases import Case, assert_equal, make_tables, train
from thresher.kernels import reference
from thresher.kernels.layout import Combine, Optimizer, Shared

pytest.importorskip("triton", reason="needs Triton")
from thresher.kernels import triton as backend
from thresher.kernels.triton import metadata

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# numpy tells what the interpreter's arithmetic meets in lanes whose results nobody stores.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run."""
    return str(request.param)


def check(case: Case, device: str) -> None:
    """A step by the kernels gives what the reference gives."""
    tables = make_tables(case)
    assert_equal(train(backend, case, tables, 1, device), train(reference, case, tables, 1), case)


@pytest.mark.parametrize("combine", [None, Combine.MULT])
def test_runs_of_many_chunks_and_programs_of_many_tiles(
    combine: Combine | None, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """With small ones of each, which would otherwise take a large batch."""
    for name, value in (("_CHUNK", 4), ("_TILE", 64), ("_PROGRAMS", 8)):
        monkeypatch.setattr(f"thresher.kernels.triton.backward.{name}", value)
    composed = {} if combine is None else {"combine": combine, "partitions": (2, 1, 4, 4, 3), "ids": (12,)}
    check(
        Case(Shared.TABLE, Optimizer.ADAM, (7,), (17,), (0, 0), weighted=True, batch=3, most=25, **composed),  # type: ignore[arg-type]
        device,
    )


def test_keys_of_64_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.kernels.triton.metadata._NARROW_KEYS", 0)
    metadata._metadata.cache_clear()
    check(Case(Shared.ROW), device)
    metadata._metadata.cache_clear()


def test_same_batch_gives_the_same_bits(device: str) -> None:
    case = Case(Shared.COLUMN, Optimizer.ADAM, most=20, batch=3)
    first, second = (train(backend, case, make_tables(case), 1, device) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert all(torch.equal(a, b) for a, b in zip(first.results, second.results, strict=True))


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
