"""Double hashing by frequency: frequent ids have a row each, others two hashed rows added (Zhang et al., RecSys 2020).

Rows of a vocabulary are in falling order of their occurrences in training, so the frequent ids are the first ones.
Hashed fields have no such order: all of their ids get two rows. Two rows of m tell m² ids apart, where one tells m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True)
class DoubleHash:
    """One plain table: the frequent ids' own rows, then the rows that the others share.

    Attributes:
        own: ids below it have the row of their number.
        hashed: rows that the others share; id x has the sum of `own` + h_1(x) mod `hashed` and `own` + h_2(x) mod
            `hashed`, with h_1(x) = mix64(x + G) and h_2(x) = mix64(h_1(x) + G), unsigned 64-bit numbers.
        mean: whether bags are pooled by their mean. The table itself adds up, for a bag has more rows than ids.
    """

    own: int
    hashed: int
    mean: bool

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.own + self.hashed

    def names(self, field: str) -> list[str]:
        """Names of the fields that the model gets: the one."""
        return [field]

    def expanded(self, ids_L: Tensor, lengths_B: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows of all ids, one or two each, and how many of them each bag has."""
        ids_L = ids_L.long()
        first_L = mix64(ids_L + _signed(_GOLDEN))
        second_L = mix64(first_L + _signed(_GOLDEN))
        shared_L = ids_L >= self.own
        rows_L2 = torch.stack(
            [
                torch.where(shared_L, self.own + _modulo(first_L, self.hashed), ids_L),
                self.own + _modulo(second_L, self.hashed),
            ],
            dim=1,
        )
        there_L2 = torch.stack([torch.ones_like(shared_L), shared_L], dim=1)
        before = torch.nn.functional.pad(shared_L.cumsum(0), (1, 0))
        ends_B = lengths_B.long().cumsum(0)
        more_B = before[ends_B] - before[ends_B - lengths_B]
        return [(rows_L2[there_L2], lengths_B + more_B)]


def mix64(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (`thresher.data.hashing.mix64`), on the bits of int64."""
    for shift, factor in _FACTORS:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right that lets zeros in; int64's own lets the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _modulo(x: Tensor, m: int) -> Tensor:
    """The remainder of the unsigned number that has these bits, for m below 2^62."""
    return (_shifted(x, 1) % m * 2 + (x & 1)) % m


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
