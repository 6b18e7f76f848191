"""Complementary partitions of a table's ids (Shi et al., KDD 2020, arXiv:1909.02107).

A partition takes id x to bucket (x div a) mod m. A composed table holds one row for each bucket instead of one for each
id, the partitions' buckets one after the other, and puts an id's vector together from its buckets' rows. Partitions are
*complementary* when any two ids differ in at least one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from operator import mul

import torch
from torch import Tensor

from thresher.kernels.layout import stacked_rows

_CHUNK_IDS = 1 << 20  # bounds the temporary tensors


@dataclass(frozen=True)
class Partitions:
    """The partitions of one table.

    Attributes:
        splits: divisor a and modulus m of each.
    """

    splits: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.splits or min(min(split) for split in self.splits) < 1:
            raise ValueError(f"partitions {self.splits}: name at least one, with divisors and moduli of at least 1")

    @classmethod
    def remainder(cls, m: int) -> Partitions:
        """The hashing trick: x mod m. Ids that are equal mod m share a vector."""
        return cls(((1, m),))

    @classmethod
    def naive(cls, n: int) -> Partitions:
        """A bucket for each of n ids."""
        return cls(((1, n),))

    @classmethod
    def quotient_remainder(cls, n: int, m: int) -> Partitions:
        """Remainder x mod m and quotient x div m, for n ids.

        Raises:
            ValueError: if m is not among 1 to n.
        """
        if not 1 <= m <= n:
            raise ValueError(f"quotient_remainder of {n} ids, m {m}: take an m from 1 to {n}")
        return cls(((1, m), (m, -(-n // m))))

    @classmethod
    def mixed_radix(cls, n: int, moduli: Sequence[int]) -> Partitions:
        """The digits of x in a number system with these radices, the lowest first, for n ids.

        Raises:
            ValueError: if the moduli have too few combinations, or a digit would always be 0.
        """
        _check_combinations("mixed_radix", n, moduli)
        *divisors, _ = accumulate(moduli, mul, initial=1)
        if len(moduli) > 1 and divisors[-1] >= n:
            raise ValueError(
                f"mixed_radix of {n} ids, moduli {list(moduli)}: all but the last have {divisors[-1]} combinations "
                "already; leave out the last"
            )
        return cls(tuple(zip(divisors, moduli, strict=True)))

    @classmethod
    def chinese_remainder(cls, n: int, moduli: Sequence[int]) -> Partitions:
        """Remainders x mod m for some pairwise coprime moduli, for n ids.

        Raises:
            ValueError: if two moduli have a common divisor, or all have too few combinations.
        """
        _check_combinations("chinese_remainder", n, moduli)
        for first, second in combinations(moduli, 2):
            if math.gcd(first, second) > 1:
                raise ValueError(
                    f"chinese_remainder, moduli {list(moduli)}: {first} and {second} have the common divisor "
                    f"{math.gcd(first, second)}; take moduli that are pairwise coprime"
                )
        return cls(tuple((1, m) for m in moduli))

    def __len__(self) -> int:
        return len(self.splits)

    @property
    def rows(self) -> int:
        """Buckets of all partitions together."""
        return sum(m for _, m in self.splits)

    @property
    def first_rows(self) -> list[int]:
        """The row of each partition's first bucket."""
        return list(accumulate((m for _, m in self.splits[:-1]), initial=0))

    def rows_of(self, ids_L: Tensor) -> Tensor:
        """The rows that hold the ids' buckets, int64 [L, K]."""
        return stacked_rows(ids_L.long(), self.splits)

    def sums(self, values_n: Tensor) -> Tensor:
        """The sum of what the ids of each bucket have, [rows], of a value for each of n ids."""
        sums = torch.zeros(self.rows, dtype=values_n.dtype)
        for first in range(0, values_n.numel(), _CHUNK_IDS):
            part_L = values_n[first : first + _CHUNK_IDS]
            rows_LK = self.rows_of(torch.arange(first, first + part_L.numel()))
            sums.index_add_(0, rows_LK.flatten(), part_L.repeat_interleave(len(self)))
        return sums

    def is_complementary(self, n: int) -> bool:
        """Whether any two of the ids 0 to n − 1 differ in a bucket.

        What the constructors make is decided by argument, other partitions by looking at every id.
        """
        splits = sorted(self.splits)
        if splits[-1][0] == 1:  # ids have the same remainders exactly if they are equal mod the least common multiple
            return math.lcm(*(m for _, m in splits)) >= n
        if splits[0][0] == 1 and all(a * m == following for (a, m), (following, _) in pairwise(splits)):
            return math.prod(m for _, m in splits) >= n  # digits, which tell ids below their product apart, and no more
        return bool(torch.unique(self.rows_of(torch.arange(n)), dim=0).shape[0] == n)


def _check_combinations(name: str, n: int, moduli: Sequence[int]) -> None:
    if n < 1 or not moduli or min(moduli) < 1 or math.prod(moduli) < n:
        raise ValueError(
            f"{name} of {n} ids, moduli {list(moduli)}: their product is {math.prod(moduli)}; take at least one id and "
            f"positive moduli with a product of {n} or more"
        )
