"""How ids share rows, as schemes and exported tables say it."""

from __future__ import annotations

from typing import Any

from thresher.embedding.double_hash import DoubleHash
from thresher.embedding.path import BucketPath
from thresher.embedding.representation import Composed
from thresher.embedding.separate import Separate
from thresher.embedding.table_plan import FieldTable, path_name
from thresher.tables.composition import Composition


def composition_of(table: FieldTable, name: str, ids: int, fields_at: str = "") -> Composition | None:
    """The composition of a field's ids; none where each has a row of its own.

    Args:
        table: of the field.
        name: of the field.
        ids: how many it has.
        fields_at: where the model has its fields, for the names of maps.
    """
    own = table.outside
    if isinstance(own, DoubleHash):
        return Composition(ids, "add", ((1, own.hashed),), own=own.own)
    if isinstance(own, Separate):
        return Composition(ids, "feature", own.partitions.splits)
    if isinstance(own, BucketPath):
        maps = tuple(
            tuple(f"{path_name(fields_at, name)}.{parameter}" for parameter in each) for each in own.map_parameters
        )
        return Composition(ids, "path", own.partitions.splits, maps=maps)
    if isinstance(table.representation, Composed):
        combine: Any = table.representation.combine.name.lower()
        return Composition(ids, combine, table.representation.partitions[name].splits)
    return None
