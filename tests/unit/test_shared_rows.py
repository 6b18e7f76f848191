"""What is done with ids outside the collection: rows for the partitions of a field, double hashing, paths."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from thresher.data import hashing
from thresher.embedding.double_hash import DoubleHash, mix64
from thresher.embedding.expansion import Expansion
from thresher.embedding.partitions import Partitions
from thresher.embedding.path import BucketPath, PathTable, map_params
from thresher.embedding.separate import Separate
from thresher.tables.composition import Composition

IDS = st.lists(st.integers(0, 2**62), min_size=1, max_size=20)


@given(IDS)
def test_both_mixes_are_the_same(ids: list[int]) -> None:
    found = mix64(torch.tensor(ids)).numpy().view(np.uint64)
    np.testing.assert_array_equal(found, hashing.mix64(np.array(ids, np.uint64)))


@given(IDS, st.integers(0, 1000), st.integers(1, 2**31))
def test_frequent_ids_have_a_row_and_others_two(ids: list[int], own: int, hashed: int) -> None:
    """The rows that training and serving take are the same ones."""
    ((rows, lengths),) = DoubleHash(own, hashed, mean=False).expanded(torch.tensor(ids), torch.ones(len(ids)).long())
    bags = [bag.tolist() for bag in rows.split(lengths.tolist())]
    asked: list[list[int]] = []

    def lookup(ids_L: np.ndarray) -> np.ndarray:
        asked.append(ids_L.tolist())
        return np.zeros((len(ids_L), 1), np.float32)

    Composition(2**62, "add", ((1, hashed),), own=own).vectors(np.array(ids), lookup, {})
    second = iter(asked[1])
    for number, bag, first in zip(ids, bags, asked[0], strict=True):
        assert bag == ([number] if number < own else [first, next(second)])
        assert all(own <= row < own + hashed for row in bag) or number < own


def test_two_hashed_rows_tell_more_ids_apart_than_one() -> None:
    ids = torch.arange(10_000)
    ((rows, _),) = DoubleHash(0, 300, mean=False).expanded(ids, torch.ones_like(ids))
    pairs = rows.view(-1, 2).sort(dim=1).values
    assert torch.unique(pairs, dim=0).shape[0] > 8_000  # of 45,150 pairs
    counts = torch.bincount(rows, minlength=300)
    assert 30 < counts.min() < counts.max() < 110  # 67 on average


def test_a_batch_is_expanded_field_by_field() -> None:
    sparse = KeyedJaggedTensor(
        keys=["a", "plain", "b"],
        values=torch.tensor([7, 2, 5, 8, 1, 3, 9], dtype=torch.int32),
        lengths=torch.tensor([2, 0, 1, 1, 2, 1], dtype=torch.int32),
    )
    expansion = Expansion({"a": Separate(Partitions.quotient_remainder(10, 4)), "b": DoubleHash(2, 5, mean=True)})
    found = expansion.rows(sparse)
    assert found.keys() == ["a:0", "a:1", "plain", "b"]
    assert found["a:0"].values().tolist() == [3, 2]
    assert found["a:1"].values().tolist() == [4 + 1, 4 + 0]
    assert found["a:0"].lengths().tolist() == found["a:1"].lengths().tolist() == [2, 0]
    assert found["plain"].values().tolist() == [5, 8]
    assert found["b"].lengths().tolist() == [3, 2]
    assert found["b"].values()[0] == 1
    halves = expansion.pooled("b", torch.ones(2, 3), sparse)
    assert halves.tolist() == [[0.5] * 3, [1.0] * 3]
    assert expansion.pooled("plain", torch.ones(2, 3), sparse).tolist() == torch.ones(2, 3).tolist()


def test_sample_weights_are_refused() -> None:
    weighted = KeyedJaggedTensor(
        keys=["a"], values=torch.tensor([1]), lengths=torch.tensor([1]), weights=torch.tensor([2.0])
    )
    with pytest.raises(ValueError, match="leave out the weights, or the method"):
        Expansion({"a": DoubleHash(0, 2, mean=False)}).rows(weighted)


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("mean", [True, False])
def test_a_path_maps_each_id_and_pools_then(hidden: int, mean: bool) -> None:
    partitions = Partitions.mixed_radix(60, [5, 4, 3])
    path = BucketPath(partitions, hidden, mean)
    table = PathTable(path, 6, 0.5)
    assert path.params(6) == sum(p.numel() for p in table.parameters()) == 5 * 6 + 7 * map_params(6, hidden)
    names = {name for name, _ in table.named_parameters()}
    assert {"table", *(name for each in path.map_parameters for name in each)} == names
    with torch.no_grad():
        for parameter in table.parameters():
            parameter.uniform_(-1, 1)
    ids, lengths = torch.tensor([59, 3, 17, 17]), torch.tensor([2, 0, 1, 1])

    def vector(x: int) -> torch.Tensor:
        z = table.table[x % 5]
        for own, bucket in zip(table.maps, (x // 5 % 4, x // 20 % 3), strict=True):
            if hidden:
                z = z + own.outer[bucket] @ (own.inner[bucket] @ z + own.bias[bucket]).relu()
            else:
                z = own.weight[bucket] @ z
        return z

    first = (vector(59) + vector(3)) / (2 if mean else 1)
    expected = torch.stack([first, torch.zeros(6), vector(17), vector(17)])
    found = table(JaggedTensor(values=ids, lengths=lengths))
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in table.parameters())
    empty = table(JaggedTensor(values=ids[:0], lengths=torch.zeros(4, dtype=torch.int64)))
    assert torch.equal(empty, torch.zeros(4, 6))


@pytest.mark.parametrize("hidden", [0, 4])
@pytest.mark.parametrize("dim", [4, 64])
def test_paths_start_with_the_variance_of_a_plain_table(hidden: int, dim: int) -> None:
    torch.manual_seed(0)
    table = PathTable(BucketPath(Partitions.mixed_radix(8000, [20, 20, 20]), hidden, False), dim, 0.3)
    ids = torch.arange(8000)
    vectors = table(JaggedTensor(values=ids, lengths=torch.ones_like(ids))).detach()
    plain = float(table.table.detach().var())
    assert 0.95 < float(vectors.var()) / plain < 1.08
    assert plain == pytest.approx(0.3**2 / 3, rel=0.25)
    assert torch.unique(vectors, dim=0).shape[0] > 7500  # a hidden layer may be dead for an id


def test_partitions_that_are_not_there_name_the_mend() -> None:
    with pytest.raises(ValueError, match=re.escape("name at least one")):
        BucketPath(Partitions(()), 0, False)
