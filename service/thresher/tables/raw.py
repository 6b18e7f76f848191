"""Raw columns, as the data have them, as what the tables look up and the dense part takes.

A column is an array of pyarrow's, a NumPy array, or a list. The same values have the same ids as when data is prepared.
Shapes: B samples, L keys of all bags together, N numeric inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.tables.manifest import FieldEntry, NumericEntry

Ids = npt.NDArray[np.int64]
Rows = Callable[[str, Any], Ids]  # of a field and its keys


def column_of(columns: Any, entry: FieldEntry | NumericEntry) -> Any:
    """The column of a field or numeric input.

    Args:
        columns: a pyarrow Table or a mapping of names to columns.
        entry: of the manifest.

    Raises:
        ValueError: if it is not there.
    """
    names = columns.column_names if hasattr(columns, "column_names") else columns
    if entry.source not in names:
        raise ValueError(f"column {entry.source!r} is missing; there are {', '.join(map(repr, names))[:500] or 'none'}")
    column = columns[entry.source]
    return column.combine_chunks() if hasattr(column, "combine_chunks") else column


def ids(field: FieldEntry, column: Any, rows: Rows) -> Ids | tuple[Ids, Ids]:
    """Ids `[B]` of a column, or for `multi` ids `[L]` and offsets `[B + 1]`.

    Args:
        field: of the manifest.
        column: `[B]` raw values. For `multi` lists of keys, or texts with the field's separator between keys, or
            numbers that are a bag's only key, or a NumPy array `[B, K]`; empty and missing keys are left out.
        rows: gives the ids of keys.

    Raises:
        ValueError: names the field, and the value that is none of its.
    """
    if _is_arrow(column):
        return _arrow_ids(field, column, rows)
    if field.kind != "multi":
        return rows(field.name, column)
    bags = [_bag(value, field) for value in column]
    offsets = np.zeros(len(bags) + 1, np.int64)
    np.cumsum([len(bag) for bag in bags], out=offsets[1:])
    return rows(field.name, [key for bag in bags for key in bag]), offsets


def numeric(entries: Sequence[NumericEntry], columns: Any, samples: int) -> npt.NDArray[np.float32]:
    """Numeric inputs `[B, N]`: ln(1 + x) of x >= 0, x itself below, 0 where missing.

    Args:
        entries: of the manifest.
        columns: by name.
        samples: B.

    Raises:
        ValueError: names the column whose values are no finite numbers, or not B.
    """
    from thresher.data import parse

    found_BN = np.empty((samples, len(entries)), np.float32)
    for number, entry in enumerate(entries):
        numbers = _numbers(column_of(columns, entry), entry.source)
        if len(numbers) != samples:
            raise ValueError(f"column {entry.source!r} has {len(numbers)} values, the others {samples}")
        found_BN[:, number] = parse.dense(numbers)
    return found_BN


def _is_arrow(column: Any) -> bool:
    return type(column).__module__.partition(".")[0] == "pyarrow"


def _arrow_ids(field: FieldEntry, column: Any, rows: Rows) -> Ids | tuple[Ids, Ids]:
    """Each different key is looked up once."""
    from thresher.data import parse

    if field.kind == "numeric":
        return rows(field.name, _numbers(column, field.source))
    if field.kind != "multi":
        keys, codes = parse.keys(column)
        found: Ids = rows(field.name, keys)[codes]
        return found
    entries, lengths = parse.lists(column, field.separator or "|")
    keys, codes = parse.keys(entries)
    offsets: Ids = np.concatenate([[0], np.cumsum(lengths)])
    return rows(field.name, keys)[codes], offsets


def _bag(value: Any, field: FieldEntry) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, str):
        if field.separator is None:
            raise ValueError(f"field {field.name}: has no separator; give each bag as a list of keys")
        value = value.split(field.separator)
    if isinstance(value, int | float | np.number):
        return [value]
    if not isinstance(value, list | tuple | np.ndarray):
        raise ValueError(f"field {field.name}: a bag is a list of keys or a text, got {value!r:.80}")
    return [key for key in value if key is not None and key != ""]


def _numbers(column: Any, name: str) -> npt.NDArray[np.float64]:
    if _is_arrow(column):
        from thresher.data import parse

        numbers, unreadable = parse.numbers(column)
        if unreadable.any():
            place = int(unreadable.argmax())
            raise ValueError(f"column {name!r}: {column[place].as_py()!r:.80} at position {place} is no finite number")
        return numbers
    try:
        numbers = np.array([None if value == "" else value for value in column], np.float64)  # None becomes NaN
    except (TypeError, ValueError):
        raise ValueError(f"column {name!r}: is numeric, its values must be numbers, or None") from None
    if numbers.ndim != 1 or np.isinf(numbers).any():
        raise ValueError(f"column {name!r}: is numeric, its values must be one row of finite numbers, or None")
    return numbers


def samples_of(found: Mapping[str, Ids | tuple[Ids, Ids]]) -> int:
    """B of the ids of all fields.

    Raises:
        ValueError: names two fields that differ.
    """
    counts = {name: len(value[1]) - 1 if isinstance(value, tuple) else len(value) for name, value in found.items()}
    first = next(iter(counts))
    for name, count in counts.items():
        if count != counts[first]:
            raise ValueError(
                f"field {name} has {count} samples, field {first} {counts[first]}: give columns alike long"
            )
    return counts[first]
