"""What tables a model is to have: one of each field, which may be narrower than the model's vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from thresher.embedding.representation import Composed, Dense, Representation
from thresher.tables.composition import Composition


@dataclass(frozen=True)
class FieldTable:
    """The table of one field.

    Attributes:
        dim: columns, at least 1.
        representation: how an id becomes a vector of so many columns.
    """

    dim: int
    representation: Representation = field(default_factory=Dense)

    @property
    def is_composed(self) -> bool:
        """Whether ids share the rows of buckets."""
        return isinstance(self.representation, Composed)

    def shape(self, name: str, ids: int) -> tuple[int, int]:
        """Rows and columns in which a table of so many ids is stored and exported."""
        if isinstance(self.representation, Composed):
            return self.representation.partitions[name].rows, self.dim // self.representation.beside(name)
        return ids, self.dim

    def composition(self, name: str, ids: int) -> Composition | None:
        """How the ids share rows, as exported tables say it; none where each has a row of its own."""
        if not isinstance(self.representation, Composed):
            return None
        combine: Any = self.representation.combine.name.lower()
        return Composition(ids, combine, self.representation.partitions[name].splits)


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
