"""A step costs what its batch costs, whatever the size of the tables."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from thresher.kernels.layout import STATES, Optimizer, Shared
from thresher.kernels.ops import Group

BATCH, DIM = 512, 16


def step_seconds(rows: int, shared: Shared) -> float:
    """Median time of lookup, backward and update on one table."""
    sizes = {Shared.NONE: 0, Shared.TABLE: 1, Shared.ROW: rows, Shared.ELEMENT: rows * DIM}
    group = Group(
        weights=torch.full((rows * DIM,), 0.1),
        weight_states=[torch.zeros(rows * DIM) for _ in STATES[Optimizer.ADAM]],
        thresholds=torch.full((sizes[shared],), -5.0),
        threshold_states=[torch.zeros(sizes[shared]) for _ in STATES[Optimizer.ADAM]] if shared >= Shared.ROW else [],
        mask=torch.empty(0, dtype=torch.uint8),
        starts=torch.empty(0, dtype=torch.int64),
        seen=torch.zeros(rows if shared else 0, dtype=torch.bool),
        rows=[rows],
        dims=[DIM],
        feature_tables=[0],
        shared=shared,
        mean=False,
        optimizer=Optimizer.ADAM,
        learning_rate=0.01,
    )
    offsets = torch.arange(BATCH + 1)
    times = []
    for seed in range(25):
        ids = torch.randint(0, rows, (BATCH,), generator=torch.Generator().manual_seed(seed))
        began = time.perf_counter()
        group.lookup(ids, offsets).sum().backward()
        times.append(time.perf_counter() - began)
    return statistics.median(times[5:])


@pytest.mark.parametrize("shared", [Shared.NONE, Shared.TABLE, Shared.ROW, Shared.ELEMENT])
def test_two_hundred_times_the_rows_do_not_cost_more(shared: Shared) -> None:
    small, large = step_seconds(10_000, shared), step_seconds(2_000_000, shared)
    # Touching all rows would cost about 100 times; rows outside the cache cost up to about 2 times.
    assert large < 6 * small
