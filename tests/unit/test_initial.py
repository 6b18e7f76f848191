"""Initial values: the published generator, and a pure function of place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.embedding.initial import fill_composed, fill_uniform, philox
from thresher.embedding.partitions import Partitions
from thresher.kernels.layout import Combine

# Known answers of Philox4x32-10 from the Random123 distribution: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox(tuple(torch.tensor([c]) for c in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == expected


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 40),
    dim=st.integers(1, 21),
    first_row=st.integers(0, 39),
    first_column=st.integers(0, 20),
    seed=st.integers(0, 2**63),
)
def test_a_shard_holds_its_part_of_the_table(rows: int, dim: int, first_row: int, first_column: int, seed: int) -> None:
    first_row, first_column = min(first_row, rows - 1), min(first_column, dim - 1)
    whole = torch.empty(rows, dim)
    fill_uniform(whole, seed, "t", 0.5)
    shard = torch.empty(rows - first_row, dim - first_column)
    fill_uniform(shard, seed, "t", 0.5, first_row, first_column)
    assert torch.equal(shard, whole[first_row:, first_column:])


def test_rows_beyond_32_bits_differ_from_those_below() -> None:
    low, high = torch.empty(4, 4), torch.empty(4, 4)
    fill_uniform(low, 0, "t", 1.0)
    fill_uniform(high, 0, "t", 1.0, first_row=1 << 32)
    assert not torch.equal(low, high)


def test_values_are_uniform_and_differ_by_seed_and_table() -> None:
    tables = []
    for seed, name in [(1, "a"), (1, "b"), (2, "a")]:
        table = torch.empty(70_000, 3)  # more rows than one chunk
        fill_uniform(table, seed, name, 0.25)
        tables.append(table)
        assert table.min() >= -0.25
        assert table.max() < 0.25
        counts = torch.histc(table, bins=10, min=-0.25, max=0.25)
        assert (counts / table.numel() - 0.1).abs().max() < 0.005
    for i, first in enumerate(tables):
        for second in tables[i + 1 :]:
            assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.01


@settings(max_examples=30, deadline=None)
@given(combine=st.sampled_from(Combine), first=st.integers(0, 12), rows=st.integers(1, 13), column=st.integers(0, 4))
def test_a_shard_of_a_composed_table_holds_its_part(combine: Combine, first: int, rows: int, column: int) -> None:
    partitions = Partitions.mixed_radix(60, [3, 4, 5])  # and a row that belongs to no bucket
    whole, rows = torch.empty(13, 5), min(rows, 13 - first)
    fill_composed(whole, partitions, combine, 1, "t", 0.5)
    shard = torch.empty(rows, 5 - column)
    fill_composed(shard, partitions, combine, 1, "t", 0.5, first, column)
    assert torch.equal(shard, whole[first : first + rows, column:])
    assert bool((whole[12] == 0).all())


@pytest.mark.parametrize("combine", list(Combine))
def test_composed_vectors_have_the_variance_of_plain_ones(combine: Combine) -> None:
    partitions = Partitions.mixed_radix(60_000, [40, 30, 50])
    rows = torch.empty(partitions.rows, 200)
    fill_composed(rows, partitions, combine, 1, "t", 0.25)
    parts = rows[partitions.rows_of(torch.arange(0, 60_000, 59))]
    if combine == Combine.CONCAT:
        vectors = parts.flatten(1)
    else:
        vectors = parts.prod(1) if combine == Combine.MULT else parts.sum(1)
    assert float(vectors.mean()) == pytest.approx(0, abs=0.01)
    assert float(vectors.var()) == pytest.approx(0.25**2 / 3, rel=0.05)
