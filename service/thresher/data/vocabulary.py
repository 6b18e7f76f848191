"""From keys to table rows: provisional ids while the data stream by, then a vocabulary or a hash.

A vocabulary numbers the keys that the training split holds at least `min_count` times from 1, by falling count, then
by key; row 0 (OOV) is for all others. Where every key is an integer in canonical decimals, they are kept as integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from thresher.data.hashing import hash_keys

OOV_ROW = 0


class Encoder(Protocol):
    """Gives each key a number when it is met, and the number's table row when all were met."""

    def encode(self, keys: Sequence[str]) -> np.ndarray:
        """Numbers of keys, int64[len(keys)]."""

    def finish(self, counts: np.ndarray, min_count: int) -> Rows:
        """Table rows of the numbers, given how often training has each of them."""

    @property
    def size(self) -> int:
        """Numbers given are below it."""


@dataclass(frozen=True)
class Rows:
    """The rows of a field's table.

    Attributes:
        counts: int64[rows], occurrences in training.
        of_number: int64[numbers], the row of each number that the encoder gave; None if it is the number itself.
        keys: of rows 1 and on; None for a hash.
    """

    counts: np.ndarray
    of_number: np.ndarray | None
    keys: pa.Array | None


class VocabularyEncoder:
    """Numbers keys in the order in which they come.

    Args:
        field: its name, for messages.
        limit: most keys held in memory.
    """

    def __init__(self, field: str, limit: int) -> None:
        self._field = field
        self._limit = limit
        self._numbers: dict[str, int] = {}

    @property
    def size(self) -> int:
        """Different keys so far."""
        return len(self._numbers)

    def encode(self, keys: Sequence[str]) -> np.ndarray:
        """Numbers of keys.

        Raises:
            ValueError: if there are too many of them for the memory that the spec allows.
        """
        numbers = self._numbers
        found = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
        if len(numbers) > self._limit:
            raise ValueError(
                f"data.fields.{self._field}: more than {self._limit} different ids; set its encoding: hash with rows, "
                "or raise data.max_vocabulary"
            )
        return found

    def finish(self, counts: np.ndarray, min_count: int) -> Rows:
        """The vocabulary."""
        keys = _canonical(pa.array(list(self._numbers), pa.string()))
        table = pa.table({"key": keys, "count": counts, "number": np.arange(len(counts))})
        kept = table.filter(pc.greater_equal(table["count"], min_count))
        kept = kept.sort_by([("count", "descending"), ("key", "ascending")])
        rows = np.full(len(counts), OOV_ROW, np.int64)
        rows[kept["number"].to_numpy()] = np.arange(1, kept.num_rows + 1)
        row_counts = np.bincount(rows, counts, minlength=kept.num_rows + 1).astype(np.int64)
        # A narrower choice of keys may be all integers where the whole was not.
        return Rows(row_counts, rows, _canonical(kept["key"].cast(pa.string()).combine_chunks()))


class HashEncoder:
    """Hashes keys into a given number of rows.

    Args:
        rows: of the table.
    """

    def __init__(self, rows: int) -> None:
        self.size = rows

    def encode(self, keys: Sequence[str]) -> np.ndarray:
        """Rows of keys."""
        return (hash_keys(keys) % np.uint64(self.size)).astype(np.int64)

    def finish(self, counts: np.ndarray, min_count: int) -> Rows:  # noqa: ARG002 - a hash keeps all
        """Every number is a row."""
        return Rows(counts, None, None)


def write_vocabulary(path: Path, rows: Rows) -> None:
    """Write keys and counts of rows 1 and on."""
    pq.write_table(pa.table({"key": rows.keys, "count": rows.counts[1:]}), path)


def read_keys(path: Path) -> np.ndarray | list[str] | None:
    """Keys of rows 1 and on, as `write_vocabulary` left them; None where there is no file, for a hashed field."""
    if not path.is_file():
        return None
    keys = pq.read_table(path, columns=["key"])["key"]
    found: np.ndarray | list[str] = keys.to_numpy() if pa.types.is_int64(keys.type) else keys.to_pylist()
    return found


def _canonical(keys: pa.Array) -> pa.Array:
    """Keys as int64 if each of them is an integer written as Python writes it."""
    try:
        whole = keys.cast(pa.int64())
    except pa.ArrowInvalid:
        return keys
    return whole if len(keys) and whole.cast(pa.string()).equals(keys) else keys
