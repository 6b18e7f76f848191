"""What tables a model is to have: one of each field, which may be narrower than the model's vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from thresher.embedding.representation import Dense, Representation


@dataclass(frozen=True)
class FieldTable:
    """The table of one field.

    Attributes:
        dim: columns, at least 1.
        representation: how an id becomes a vector of so many columns.
    """

    dim: int
    representation: Representation = field(default_factory=Dense)


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
