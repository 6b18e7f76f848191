"""Exact selection of the largest entries, against a full sort."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thresher.methods import ranking
from thresher.methods.ranking import RankedShard, select_largest


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(keys: Tensor, table: int, first_row: int) -> RankedShard:
    return RankedShard(table, first_row, 0, len(keys), lambda start, stop: keys[start:stop])


def expected(tables: list[Tensor], k: int) -> list[Tensor]:
    """Sort all keys, equal ones by table, row and column."""
    flat = torch.cat([keys.flatten() for keys in tables]).numpy() + 0.0
    order = np.lexsort((np.arange(flat.size), -flat))
    chosen = torch.zeros(flat.size, dtype=torch.bool)
    chosen[torch.from_numpy(order[:k].copy())] = True
    return [part.view_as(keys) for part, keys in zip(chosen.split([t.numel() for t in tables]), tables, strict=True)]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4))
def test_equals_a_full_sort(data: st.DataObject, sizes: list[tuple[int, int]]) -> None:
    values = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, -math.inf])
    tables = [
        torch.tensor(data.draw(st.lists(values, min_size=n * d, max_size=n * d)), dtype=torch.float32).view(n, d)
        for n, d in sizes
    ]
    k = data.draw(st.integers(1, sum(t.numel() for t in tables)))
    masks = select_largest([shard(keys, number, 0) for number, keys in enumerate(tables)], k)
    for mask, wanted in zip(masks, expected(tables, k), strict=True):
        assert torch.equal(mask, wanted)


def test_shards_of_a_table_are_taken_in_the_order_of_their_rows() -> None:
    keys = torch.zeros(6, 2)
    late, early = select_largest([shard(keys[3:], 0, 3), shard(keys[:3], 0, 0)], 7)
    assert early.all()
    assert late.flatten().tolist() == [True, False, False, False, False, False]


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    (whole,) = select_largest([shard(keys, 0, 0)], 70)
    monkeypatch.setattr(ranking, "_CHUNK_ROWS", 7)
    (chunked,) = select_largest([shard(keys, 0, 0)], 70)
    assert torch.equal(whole, chunked)
    assert whole.sum() == 70


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="5 entries are to stay, but the tables have 4"):
        select_largest([shard(torch.zeros(2, 2), 0, 0)], 5)
