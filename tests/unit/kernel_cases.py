"""Groups of tables and batches for the tests of kernels, and one body that runs any backend on them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thresher.kernels import layout
from thresher.kernels.layout import STATES, Combine, Optimizer, Shared


@dataclass(frozen=True)
class Case:
    """What is looked up and how it learns."""

    shared: Shared = Shared.NONE
    optimizer: Optimizer = Optimizer.SGD
    rows: tuple[int, ...] = (40, 9, 23)
    dims: tuple[int, ...] = (16, 5, 33)
    feature_tables: tuple[int, ...] = (0, 0, 1, 2)
    partitions: tuple[int, ...] = ()
    combine: Combine = Combine.ADD
    ids: tuple[int, ...] = ()  # ids of each table, if not its rows
    masked: bool = False
    mean: bool = False
    weighted: bool = False
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    batch: int = 11
    most: int = 4  # ids in a bag
    one_hot: bool = False


@dataclass
class Tables:
    """The tensors of a case, as the operators take them."""

    weights: Tensor
    weight_states: list[Tensor]
    thresholds: Tensor
    threshold_states: list[Tensor]
    mask: Tensor
    starts: Tensor
    seen: Tensor
    results: list[Tensor] = field(default_factory=list)


def make_tables(case: Case) -> Tables:
    """Random tables."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.promote_types(case.dtype, torch.float32)
    entries = sum(n * d for n, d in zip(case.rows, case.dims, strict=True))
    count = sum(case.rows)
    sizes = {Shared.NONE: 0, Shared.TABLE: len(case.rows), Shared.COLUMN: sum(case.dims), Shared.ROW: count}
    sizes[Shared.ELEMENT] = entries
    mask, starts, kept = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), entries
    if case.masked:
        mask, starts = make_masks(case, generator)
        kept = int(starts[-1])

    def states(rule: Optimizer, size: int, one_a_row: bool) -> list[Tensor]:
        return [torch.zeros(count if one_a_row or one else size, dtype=wide) for _, one in STATES[rule]]

    return Tables(
        weights=torch.randn(kept, generator=generator).to(case.dtype),
        weight_states=states(case.optimizer, kept, one_a_row=False),
        thresholds=torch.randn(sizes[case.shared], dtype=wide, generator=generator) - 1,
        threshold_states=states(case.optimizer, entries, case.shared == Shared.ROW)
        if case.shared >= Shared.ROW
        else [],
        mask=mask,
        starts=starts,
        seen=torch.zeros(count if case.shared else 0, dtype=torch.bool),
    )


def make_masks(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks of which some rows keep nothing and some all."""
    masks, starts, first = [], [], 0
    for rows, dim in zip(case.rows, case.dims, strict=True):
        kept = torch.rand(rows, dim, generator=generator) < torch.rand(rows, 1, generator=generator) * 1.4 - 0.2
        bits = torch.nn.functional.pad(kept, (0, -dim % 8)).view(rows, -1, 8).int()
        packed = (bits << torch.arange(8, dtype=torch.int32)).sum(2).to(torch.uint8)
        masks.append(packed.flatten())
        starts.append(layout.starts_of(packed, dim, first))
        first = int(starts[-1][-1])
    return torch.cat([*masks, torch.zeros(layout.MASK_PADDING, dtype=torch.uint8)]), torch.cat(starts)


def make_batch(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, offsets and sample weights; with empty bags, ids twice in a bag, and ids of two features of one table."""
    generator = torch.Generator().manual_seed(seed)
    features = len(case.feature_tables)
    lengths = torch.randint(0, case.most + 1, (features * case.batch,), generator=generator)
    if case.one_hot:
        lengths = torch.ones_like(lengths)
    ids = case.ids or case.rows
    parts = [
        torch.randint(0, ids[table], (int(part.sum()),), generator=generator)
        for table, part in zip(case.feature_tables, lengths.view(features, case.batch), strict=True)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    indices = torch.cat(parts).to(case.index_dtype)
    wide = torch.promote_types(case.dtype, torch.float32)
    factors = torch.randn(indices.numel(), generator=generator, dtype=wide) if case.weighted else None
    return indices, offsets.to(case.index_dtype), factors


def layout_of(case: Case) -> tuple[Any, ...]:
    """The arguments that both operators end their description of the tables with."""
    return (
        list(case.rows), list(case.dims), list(case.feature_tables), list(case.partitions), int(case.combine),
        int(case.shared), case.mean,
    )  # fmt: skip


def train(backend: Any, case: Case, tables: Tables, steps: int, device: str = "cpu") -> Tables:
    """Look up and update some steps with a backend; gives the tables afterwards and all that was returned.

    Args:
        backend: has `lookup` and `update`.
        case: what to run.
        tables: left as they are.
        steps: how many.
        device: where to run; the results come back to the CPU.
    """
    tables = to(copy.deepcopy(tables), device)
    for step in range(1, steps + 1):
        indices, offsets, factors = make_batch(case, seed=step)
        batch = [indices.to(device), offsets.to(device), None if factors is None else factors.to(device), 0.3]
        out = backend.lookup(tables.weights, tables.thresholds, tables.mask, tables.starts, *batch, *layout_of(case))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(step), dtype=out.dtype).to(device)
        returned = backend.update(
            grad, tables.weights, tables.weight_states, tables.thresholds, tables.threshold_states, tables.mask,
            tables.starts, tables.seen, *batch, *layout_of(case), int(case.optimizer), 0.05, 0.02, 0.03, 0.01, 1e-6,
            step, case.weighted,
        )  # fmt: skip
        tables.results += [out, *returned]
    return to(tables, "cpu")


def to(tables: Tables, device: str) -> Tables:
    """The tables on another device."""
    moved = {
        name: [t.to(device) for t in value] if isinstance(value, list) else value.to(device)
        for name, value in vars(tables).items()
    }
    return Tables(**moved)


def assert_equal(found: Tables, expected: Tables, case: Case) -> None:
    """Compare all tensors, as exactly as the order of additions allows: against the largest value of each."""
    # A 16-bit weight may fall on the other side of a rounding; all else is computed in float32.
    tolerance = 2e-2 if case.dtype in (torch.float16, torch.bfloat16) else 1e-5
    for name, value in vars(expected).items():
        mine = getattr(found, name)
        for a, b in zip(mine, value, strict=True) if isinstance(value, list) else [(mine, value)]:
            atol = tolerance * max(1.0, float(b.abs().max()) if b.is_floating_point() and b.numel() else 0.0)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
