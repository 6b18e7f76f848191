"""Partitions of ids: their buckets, and which of them tell any two ids apart."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.embedding.partitions import Partitions

SIZES = st.integers(1, 300)


def tells_apart(partitions: Partitions, n: int) -> bool:
    """By looking at every id."""
    return len({tuple(x // a % m for a, m in partitions.splits) for x in range(n)}) == n


@settings(deadline=None)
@given(n=SIZES, m=st.integers(1, 300))
def test_quotient_and_remainder_compose_back_to_every_id(n: int, m: int) -> None:
    m = min(m, n)
    partitions = Partitions.quotient_remainder(n, m)
    remainders, quotients = partitions.rows_of(torch.arange(n)).T
    assert torch.equal(remainders + (quotients - m) * m, torch.arange(n))
    assert partitions.rows == m + math.ceil(n / m)
    assert int(quotients.max()) == partitions.rows - 1
    assert partitions.is_complementary(n)


@settings(deadline=None)
@given(n=SIZES, moduli=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_digits_and_remainders_tell_ids_apart(n: int, moduli: list[int]) -> None:
    if math.prod(moduli) < n:
        moduli = [*moduli, -(-n // math.prod(moduli))]
    while len(moduli) > 1 and math.prod(moduli[:-1]) >= n:
        moduli.pop()
    digits = Partitions.mixed_radix(n, moduli)
    assert digits.rows == sum(moduli)
    assert digits.is_complementary(n)
    assert tells_apart(digits, n)
    if all(math.gcd(a, b) == 1 for a, b in itertools.combinations(moduli, 2)):
        remainders = Partitions.chinese_remainder(n, moduli)
        assert remainders.is_complementary(n)
        assert tells_apart(remainders, n)


@settings(deadline=None)
@given(
    n=st.integers(1, 60),
    splits=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 12)), min_size=1),
)
def test_complementary_is_what_looking_at_every_id_says(n: int, splits: list[tuple[int, int]]) -> None:
    partitions = Partitions(tuple(splits))
    assert partitions.is_complementary(n) == tells_apart(partitions, n)


@pytest.mark.parametrize(
    ("partitions", "ids"),
    [
        (Partitions.naive(7), 7),
        (Partitions.remainder(7), 7),
        (Partitions.chinese_remainder(30, [2, 3, 5]), 30),
        (Partitions.mixed_radix(24, [4, 3, 2]), 24),
        (Partitions.quotient_remainder(12, 4), 12),
        (Partitions.chinese_remainder(2**60, [2**31 - 1, 2**31]), 2**31 * (2**31 - 1)),
        (Partitions.quotient_remainder(2**60, 2**30), 2**60),
    ],
)
def test_one_more_id_is_too_many(partitions: Partitions, ids: int) -> None:
    assert partitions.is_complementary(ids)
    assert not partitions.is_complementary(ids + 1)


def test_rows_of_large_ids_are_exact() -> None:
    """A published version divides in float32, which is wrong from id 2^24 on."""
    n, m = 2**40 + 5, 2**20
    ids = torch.tensor([2**24 + 1, 2**40 + 4])
    expected = [[int(x) % m, m + int(x) // m] for x in ids]
    assert Partitions.quotient_remainder(n, m).rows_of(ids).tolist() == expected
    assert Partitions.remainder(7).rows_of(torch.tensor([2**30], dtype=torch.int32)).dtype == torch.int64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Partitions(()), "name at least one"),
        (lambda: Partitions.remainder(0), "moduli of at least 1"),
        (lambda: Partitions.quotient_remainder(10, 11), "quotient_remainder of 10 ids, m 11: take an m from 1 to 10"),
        (lambda: Partitions.quotient_remainder(10, 0), "take an m from 1 to 10"),
        (lambda: Partitions.mixed_radix(10, [3, 3]), "mixed_radix of 10 ids, moduli [3, 3]: their product is 9"),
        (lambda: Partitions.mixed_radix(10, [3, 4, 2]), "have 12 combinations already; leave out the last"),
        (lambda: Partitions.mixed_radix(10, []), "with a product of 10 or more"),
        (lambda: Partitions.chinese_remainder(10, [2, 3]), "chinese_remainder of 10 ids, moduli [2, 3]: their product"),
        (
            lambda: Partitions.chinese_remainder(10, [4, 5, 6]),
            "4 and 6 have the common divisor 2; take moduli that",
        ),
    ],
)
def test_what_cannot_be_names_the_mend(make: Callable[[], Partitions], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
