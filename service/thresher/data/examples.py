"""What serving needs to know of the raw data: the column of each field, and a few rows as they are, with their ids.

The rows are those whose number hashes lowest: the same for the same data and seed, and from all over the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from thresher.data import shards
from thresher.data.formats import column
from thresher.data.hashing import counter_bits
from thresher.data.rows import Rows
from thresher.data.source import Chunk
from thresher.rundir import read_json
from thresher.spec import FieldSpec

RAW = "raw.json"
COUNT = 32
_STREAM = 0x4558414D  # of random bits, "EXAM"


class Examples:
    """Takes rows as they are read.

    Args:
        fields: of the model, dense inputs among them.
        seed: of the choice.
    """

    def __init__(self, fields: Mapping[str, FieldSpec], seed: int) -> None:
        self._fields = fields
        self._seed = seed
        self._chosen: list[tuple[int, dict[str, Any], dict[str, Any]]] = []  # hash, raw values, encoded values

    def add(self, chunk: Chunk, parsed: Rows, encoded: pa.RecordBatch) -> None:
        """Look at the good rows of a chunk.

        Args:
            chunk: as it was read.
            parsed: what it says.
            encoded: its good rows, as they are stored until all keys are known.
        """
        places = np.flatnonzero(parsed.kept)
        hashes = counter_bits(self._seed, _STREAM, chunk.rows[places] + chunk.rows_before)
        limit = self._chosen[-1][0] if len(self._chosen) == COUNT else np.iinfo(np.uint64).max
        lowest = np.flatnonzero(hashes < np.uint64(limit))
        for index in lowest[np.argsort(hashes[lowest], kind="stable")[:COUNT]].tolist():
            raw = self._raw(chunk, parsed, int(places[index]))
            values = {name: encoded.column(name)[index].as_py() for name in encoded.schema.names}
            self._chosen = sorted([*self._chosen, (int(hashes[index]), raw, values)], key=lambda row: row[0])[:COUNT]

    def _raw(self, chunk: Chunk, parsed: Rows, place: int) -> dict[str, Any]:
        found = {}
        for name, field in self._fields.items():
            value = chunk.columns[column(name, field)][place].as_py()
            if field.kind == "numeric":
                number = float(parsed.numbers[name][place])
                value = None if np.isnan(number) else number
            found[column(name, field)] = [_json(each) for each in value] if isinstance(value, list) else _json(value)
        return found

    def finish(self, of_number: Mapping[str, np.ndarray | None]) -> dict[str, Any]:
        """What is in raw.json.

        Args:
            of_number: by field with a table, the id of each number that stands for a key; None where it is the id.
        """
        return {
            "fields": {
                name: {
                    "column": field.column,
                    "separator": field.separator if field.kind == "multi" else None,
                }
                for name, field in self._fields.items()
            },
            "examples": {
                "columns": {
                    name: [raw[name] for _, raw, _ in self._chosen]
                    for name in dict.fromkeys(column(name, field) for name, field in self._fields.items())
                },
                "ids": {
                    name: [_ids(values[shards.sparse(name)], rows) for _, _, values in self._chosen]
                    for name, rows in of_number.items()
                },
                "dense": {
                    name: [values[shards.dense(name)] for _, _, values in self._chosen]
                    for name in self._fields
                    if name not in of_number
                },
            },
        }


def read_raw(data: Path) -> dict[str, Any]:
    """What `Examples.finish` left in the folder of prepared data.

    Raises:
        ValueError: if it is not there.
    """
    path = data / RAW
    if not path.is_file():
        raise ValueError(
            f"{path}: not there: an older version prepared these data; remove {data} and run prepare again, which "
            "leaves what was trained on them valid"
        )
    found: dict[str, Any] = read_json(path)
    return found


def _ids(numbers: int | list[int], rows: np.ndarray | None) -> list[int]:
    listed = numbers if isinstance(numbers, list) else [numbers]
    return listed if rows is None else [int(rows[number]) for number in listed]


def _json(value: Any) -> Any:
    """A raw value, or where JSON has none of its kind the key that it is."""
    if isinstance(value, float) and not np.isfinite(value):
        return None if value != value else str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)
