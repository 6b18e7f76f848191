"""What tables a model is to have: one of each field, which may be narrower than the model's vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from thresher.embedding.double_hash import DoubleHash
from thresher.embedding.path import BucketPath
from thresher.embedding.representation import Composed, Dense, Representation
from thresher.embedding.separate import Separate


@dataclass(frozen=True)
class FieldTable:
    """The table of one field.

    Attributes:
        dim: columns, at least 1.
        representation: how an id becomes a vector of so many columns.
        outside: what is done with ids before the collection looks them up, or instead; none if it takes them as they
            are. The representation is then that of a table of rows, and `path` has no table in the collection at all.
    """

    dim: int
    representation: Representation = field(default_factory=Dense)
    outside: Separate | DoubleHash | BucketPath | None = None

    @property
    def is_shared(self) -> bool:
        """Whether ids share the rows of buckets."""
        return self.outside is not None or isinstance(self.representation, Composed)

    def shape(self, name: str, ids: int) -> tuple[int, int]:
        """Rows and columns in which a table of so many ids is stored and exported."""
        if self.outside is not None:
            return self.outside.rows, self.dim
        if isinstance(self.representation, Composed):
            return self.representation.partitions[name].rows, self.dim // self.representation.beside(name)
        return ids, self.dim

    def params(self, name: str, ids: int) -> int:
        """Parameters, those of the maps of a path too, where no single ones were pruned."""
        if isinstance(self.outside, BucketPath):
            return self.outside.params(self.dim)
        return math.prod(self.shape(name, ids))


def path_name(fields_at: str, field: str) -> str:
    """The parameters of a field's path, where the model has its fields at some name."""
    return f"{fields_at}.paths.{field}"


def projection_name(fields_at: str, field: str) -> str:
    """The matrix that makes a narrow field's vectors as wide as the others."""
    return f"{fields_at}.projections.{field}.weight"


@dataclass(frozen=True)
class TablePlan:
    """The tables of a model.

    Attributes:
        dim: columns of the vectors that a model works with where it needs equal ones.
        fields: the fields' tables, by name; a field that is not there is left out of the model.
    """

    dim: int
    fields: Mapping[str, FieldTable]

    @classmethod
    def uniform(cls, fields: Iterable[str], dim: int, representation: Representation | None = None) -> TablePlan:
        """Equally wide tables of one representation."""
        return cls(dim, {name: FieldTable(dim, representation or Dense()) for name in fields})

    def params(self, ids: Mapping[str, int]) -> int:
        """Parameters of all tables, by how many ids each field has, where no single ones were pruned."""
        return sum(table.params(name, ids[name]) for name, table in self.fields.items())

    @property
    def vectors(self) -> dict[str, int]:
        """Columns of the vectors that the model gets, by name: a field's own, or one for each of its partitions."""
        return {
            vector: table.dim
            for name, table in self.fields.items()
            for vector in (table.outside.names(name) if isinstance(table.outside, Separate) else [name])
        }

    @property
    def expanded(self) -> dict[str, Separate | DoubleHash]:
        """The fields whose ids become rows before the lookup."""
        return {
            name: table.outside
            for name, table in self.fields.items()
            if isinstance(table.outside, Separate | DoubleHash)
        }

    @property
    def paths(self) -> dict[str, BucketPath]:
        """The fields whose tables are not in the collection."""
        return {name: table.outside for name, table in self.fields.items() if isinstance(table.outside, BucketPath)}

    def exported_apart(self, fields_at: str) -> set[str]:
        """Parameters outside the collection that are tables, and exported as such."""
        return {f"{path_name(fields_at, name)}.table" for name in self.paths}
