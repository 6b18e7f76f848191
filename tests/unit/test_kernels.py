"""Every backend against the plain-PyTorch reference: one body for all representations, optimizers and dtypes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kernel_cases import Case, assert_equal, make_batch, make_tables, train
from thresher.kernels import ops, reference
from thresher.kernels.layout import Combine, Optimizer, Shared

needs_cpp = pytest.mark.skipif(not ops.CPU_KERNELS, reason="installed without the C++ kernels")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # a process either interprets Triton or compiles it

# Tables of quotient and remainder, of three mixed radices, and a plain one.
PARTITIONS = (2, 1, 7, 7, 6, 3, 1, 4, 4, 3, 12, 2, 0)
COMPOSED = {"rows": (13, 9, 30), "partitions": PARTITIONS, "ids": (42, 24, 30), "dims": (16, 5, 33)}

CASES = [
    *(Case(shared, rule) for shared, rule in itertools.product(Shared, Optimizer)),
    *(Case(shared, Optimizer.ADAM, mean=True, weighted=True) for shared in Shared),
    *(Case(shared, Optimizer.ADAGRAD, one_hot=True, index_dtype=torch.int32) for shared in Shared),
    *(Case(optimizer=rule, masked=True) for rule in Optimizer),
    Case(masked=True, mean=True, weighted=True, one_hot=True),
    *(
        Case(shared, Optimizer.ADAGRAD, combine=combine, weighted=weighted, mean=weighted, **COMPOSED)
        for shared, combine, weighted in itertools.product(Shared, Combine, (False, True))
    ),
    Case(optimizer=Optimizer.ADAGRAD, combine=Combine.MULT, masked=True, **COMPOSED),
    Case(optimizer=Optimizer.ADAM, combine=Combine.ADD, masked=True, weighted=True, mean=True, **COMPOSED),
    *(
        Case(Shared.ELEMENT, Optimizer.ADAM, combine=combine, one_hot=True, **COMPOSED)
        for combine in (Combine.ADD, Combine.MULT)
    ),
    *(
        Case(shared, rule, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16)
        for shared, rule in ((Shared.NONE, Optimizer.SGD), (Shared.ELEMENT, Optimizer.ROWWISE_ADAGRAD))
    ),
    Case(masked=True, optimizer=Optimizer.ADAGRAD, dtype=torch.float16),
    *(Case(Shared.ROW, rows=(5,), dims=(d,), feature_tables=(0,), batch=40, most=90) for d in (1, 2, 130, 1024)),
    Case(masked=True, rows=(50,), dims=(130,), feature_tables=(0,), optimizer=Optimizer.ADAM),
    Case(feature_tables=(2, 0, 0, 1, 2), dims=(64, 8, 100), most=1),
    Case(Shared.ELEMENT, Optimizer.ADAGRAD, (400,), (8,), (0,), batch=5, most=1000, mean=True),
    Case(rows=(3,), dims=(4,), feature_tables=(0,), batch=2, most=0),
]


def name_of(case: Case) -> str:
    """The case by what is not the default."""
    changed = {k: v for k, v in vars(case).items() if v != Case.__dataclass_fields__[k].default}
    return " ".join(f"{k}={getattr(v, 'name', v)}" for k, v in changed.items()) or "dense"


@dataclass(frozen=True)
class Backend:
    """What is compared with the reference, and on how many steps: Triton's interpreter takes a second for one."""

    operators: Any
    device: str = "cpu"
    steps: int = 10


@pytest.fixture(
    params=[
        pytest.param("cpp", marks=needs_cpp),
        pytest.param(
            "triton in its interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here")
        ),
        pytest.param("triton on a GPU", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each of the backends."""
    if request.param == "cpp":
        return Backend(torch.ops.thresher)
    pytest.importorskip("triton", reason="needs Triton")
    from thresher.kernels import triton

    return Backend(triton, steps=1) if INTERPRETED else Backend(torch.ops.thresher, device="cuda")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in lanes of Triton's interpreter that nobody stores
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_steps_equal_the_reference(case: Case, backend: Backend) -> None:
    if backend.steps == 1 and case.batch * case.most * max(case.dims) > 3000:
        pytest.skip("too large for Triton's interpreter")
    tables = make_tables(case)
    expected = train(reference, case, tables, backend.steps)
    assert_equal(train(backend.operators, case, tables, backend.steps, backend.device), expected, case)
    assert case.most == 0 or not torch.equal(expected.weights, tables.weights)


@needs_cpp
@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=4),
    features=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    batch=st.integers(0, 9),
    most=st.integers(0, 6),
    kind=st.sampled_from([*Shared, "masked"]),
    rule=st.sampled_from(Optimizer),
    mean=st.booleans(),
    weighted=st.booleans(),
    wide=st.booleans(),
)
def test_any_shape_equals_the_reference(
    shape: list[tuple[int, int]], features: list[int], batch: int, most: int, kind: Shared | str, rule: Optimizer,
    mean: bool, weighted: bool, wide: bool,
) -> None:  # fmt: skip
    case = Case(
        shared=kind if isinstance(kind, Shared) else Shared.NONE, optimizer=rule, masked=kind == "masked", mean=mean,
        rows=tuple(n for n, _ in shape), dims=tuple(d for _, d in shape), weighted=weighted, batch=batch, most=most,
        feature_tables=tuple(f % len(shape) for f in features), index_dtype=torch.int64 if wide else torch.int32,
    )  # fmt: skip
    tables = make_tables(case)
    assert_equal(train(torch.ops.thresher, case, tables, steps=3), train(reference, case, tables, steps=3), case)


@needs_cpp
def test_number_of_threads_does_not_change_a_bit() -> None:
    case = Case(
        Shared.COLUMN, Optimizer.ADAGRAD, rows=(5000, 300), dims=(16, 8), feature_tables=(0, 1), batch=3000, most=30
    )
    tables, threads = make_tables(case), torch.get_num_threads()
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(train(torch.ops.thresher, case, tables, steps=2))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.weights, found[0].weights)
        assert all(torch.equal(a, b) for a, b in zip(other.results, found[0].results, strict=True))
    assert_equal(found[0], train(reference, case, tables, steps=2), case)


@needs_cpp
def test_a_table_of_2_to_the_33_parameters() -> None:
    """Of which the few rows that are touched take memory."""
    dim, rows = 16, 2**29
    ids = torch.tensor([0, rows - 1, 2**28 + 5, rows - 1, 3])
    try:
        weights = torch.empty(rows * dim, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this machine does not map 16 GB")
    weights.view(rows, dim)[ids] = torch.randn(5, dim, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    small = weights.view(rows, dim)[ids[[0, 4, 2, 1]]].flatten()  # the same rows, as a table of 4
    grad = torch.randn(5, dim, generator=torch.Generator().manual_seed(2))
    found = []
    for table, own, count in ((weights, ids, rows), (small, torch.tensor([0, 3, 2, 3, 1]), 4)):
        none, nowhere = torch.empty(0), torch.empty(0, dtype=torch.int64)
        batch = [own, torch.arange(6), None, 0.0, [count], [dim], [0], [], 0, 0, False]
        out = torch.ops.thresher.lookup(table, none, none.byte(), nowhere, *batch)
        torch.ops.thresher.update(
            grad, table, [], none, [], none.byte(), nowhere, none.bool(), *batch, 0, 0.1, 0.0, 0.0, 0.0, 1e-8, 1, False
        )
        found.append((out, table.view(count, dim)[own]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][1].float())


@needs_cpp
@pytest.mark.parametrize("bad", [-1, 9])
def test_an_id_that_is_no_row_is_named(bad: int) -> None:
    case = Case(one_hot=True)
    tables = make_tables(case)
    indices, offsets, _ = make_batch(case, 1)
    indices[2 * case.batch + 3] = bad  # feature 2 looks up table 1, which has 9 rows
    found = SimpleNamespace(lookup=torch.ops.thresher.lookup)
    with pytest.raises(IndexError, match=rf"feature 2: id {bad} at place \d+ is not a row of its table, which has 9"):
        found.lookup(
            tables.weights, tables.thresholds, tables.mask, tables.starts, indices, offsets, None, 0.0,
            list(case.rows), list(case.dims), list(case.feature_tables), [], 0, 0, False,
        )  # fmt: skip


@needs_cpp
@pytest.mark.parametrize("instructions", ["avx2", "portable"])
def test_other_instruction_sets_equal_the_reference(instructions: str) -> None:
    """The same test, in a process that may not use AVX-512."""
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "steps and cpp", __file__, "-p", "no:cacheprovider"],
        env=os.environ | {"THRESHER_CPU": instructions},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert f"{len(CASES)} passed" in found.stdout
