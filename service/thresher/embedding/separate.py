"""Partitions whose vectors the model gets as fields of their own (`feature` of Shi et al., KDD 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thresher.embedding.partitions import Partitions


@dataclass(frozen=True)
class Separate:
    """One plain table of all partitions' buckets, looked up once for each partition.

    Attributes:
        partitions: of the ids.
    """

    partitions: Partitions

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.partitions.rows

    def names(self, field: str) -> list[str]:
        """Names of the fields that the model gets."""
        return [f"{field}:{number}" for number in range(len(self.partitions))]

    def expanded(self, ids_L: Tensor, lengths_B: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows, and lengths of their bags, of each of those fields."""
        return [(rows_L, lengths_B) for rows_L in self.partitions.rows_of(ids_L).unbind(1)]
