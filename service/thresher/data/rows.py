"""What a chunk of raw rows says: labels, splits, times, numbers, and what is wrong with the bad rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from thresher.data import parse
from thresher.data.formats import Plan, column
from thresher.data.labels import read_labels
from thresher.data.source import Chunk
from thresher.data.splits import NO_SPLIT, column_split, random_split
from thresher.spec import DataSpec

SHOWN_CHARACTERS = 40  # of a bad value


@dataclass(frozen=True)
class Rows:
    """The n rows of a chunk.

    Attributes:
        labels: uint8[n].
        split: uint8[n], split numbers; 0 in a split by time, which is known only when all times are.
        time: uint64[n] in a split by time, else None.
        numbers: float64[n] of each numeric field, NaN where missing.
        kept: bool[n], false where the row is bad or the spec drops its label.
        dropped: how many the spec drops.
        bad: what is wrong with a bad row, by its number in the file.
    """

    labels: np.ndarray
    split: np.ndarray
    time: np.ndarray | None
    numbers: dict[str, np.ndarray]
    kept: np.ndarray
    dropped: int
    bad: dict[int, str]


def parse_rows(data: DataSpec, seed: int, what: Plan, chunk: Chunk) -> Rows:
    """Read labels, splits and numbers of a chunk."""
    count = len(chunk.rows)
    labels, wanted, no_label = read_labels(chunk.columns[what.label], data.label)
    wrong = [(no_label, what.label, "is no label")]  # rows, column, complaint
    split = np.zeros(count, np.uint8)
    time = None
    if data.split.by == "random":
        split = random_split(chunk.rows + chunk.rows_before, seed, data.split.fractions)
    elif what.split is None:
        time = np.zeros(count, np.uint64)  # the rows come in the order of time, and ties go by row
    elif data.split.by == "time":
        time, no_time = parse.times(chunk.columns[what.split])
        wrong.append((no_time, what.split, "is no time"))
    else:
        distinct, codes = parse.keys(chunk.columns[what.split])
        split = column_split(distinct, data.split.values)[codes]
        wrong.append((split == NO_SPLIT, what.split, f"is none of data.split.values {data.split.values}"))
    numbers = {}
    for name, field in what.fields.items():
        if field.kind == "numeric":
            raw = column(name, field)
            numbers[name], no_number = parse.numbers(chunk.columns[raw])
            wrong.append((no_number, raw, "is no finite number"))
    reasons: dict[int, str] = {}
    bad = np.zeros(count, bool)
    for mask, raw, complaint in wrong:
        for index in np.flatnonzero(mask & ~bad):
            reasons[int(chunk.rows[index])] = f"column {raw}: {_shown(chunk.columns[raw][int(index)])} {complaint}"
        bad |= mask
    return Rows(labels, split, time, numbers, wanted & ~bad, int((~wanted & ~bad).sum()), reasons)


def _shown(value: pa.Scalar) -> str:
    text = repr(value.as_py())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
