"""Avazu's click logs: CSV with a header, label `click`, the hour as YYMMDDHH.

The hour itself never comes back, so the default fields are what does: `hour_of_day` (0-23) and `weekday` (0 is Monday).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from thresher.data.source import BadRows, Chunk, Source
from thresher.data.text import first_line, text_chunks
from thresher.spec import FieldSpec

LABEL, ROW_ID, HOUR = "click", "id", "hour"
DERIVED = ("hour_of_day", "weekday")


@dataclass
class Avazu(Source):
    """`train`, `train.csv` or `train.gz` in a folder, or a file of any name."""

    @classmethod
    def open(cls, path: Path) -> Avazu:
        """The file, or the training file in the folder.

        Raises:
            ValueError: if there is none, or its header is not Avazu's.
        """
        if path.is_dir():
            files = [
                path / name for name in ("train", "train.csv", "train.gz", "train.csv.gz") if (path / name).is_file()
            ]
            if len(files) != 1:
                raise ValueError(f"data.path: {path} must hold one of train, train.csv, train.gz, train.csv.gz")
            path = files[0]
        header = first_line(path).split(",")
        if LABEL not in header or HOUR not in header:
            raise ValueError(
                f"{path}: the first line must name the columns, among them {LABEL} and {HOUR}; got {header[:5]}"
            )
        names = [*DERIVED, *(name for name in header if name not in (ROW_ID, LABEL, HOUR))]
        return cls(
            files=[path],
            columns=[*header, *DERIVED],
            fields={name: FieldSpec() for name in names},
            label=LABEL,
            time=HOUR,
            in_time_order=True,
        )

    def chunks(self, wanted: Collection[str], bad: BadRows) -> Iterator[Chunk]:
        """Rows in the order of the file."""
        header = self.columns[: -len(DERIVED)]
        derived = [name for name in DERIVED if name in wanted]
        own = [name for name in header if name in wanted or (name == HOUR and derived)]
        for chunk in text_chunks(self.files, header, own, bad, delimiter=",", header=True):
            if not derived:
                yield chunk
                continue
            hours = chunk.columns[HOUR].dictionary_encode()
            parts = [_hour(text) for text in hours.dictionary.to_pylist()]
            codes = hours.indices.to_numpy()
            good = np.array([part is not None for part in parts], bool)[codes]
            reasons = {
                int(chunk.rows[index]): f"hour {chunk.columns[HOUR][index]} is not YYMMDDHH"
                for index in np.flatnonzero(~good)
            }
            bad.add(chunk.file, reasons)
            columns = dict(chunk.columns)
            for position, name in enumerate(DERIVED):
                columns[name] = pa.array([part and part[position] for part in parts], pa.int64()).take(hours.indices)
            kept = {name: columns[name].filter(pa.array(good)) for name in wanted}
            yield Chunk(kept, chunk.file, chunk.rows[good], chunk.rows_before)


def _hour(text: str) -> tuple[int, int] | None:
    """Hour of the day and weekday of YYMMDDHH."""
    if not re.fullmatch(r"[0-9]{8}", text):
        return None
    try:
        moment = datetime.datetime.strptime(f"20{text}", "%Y%m%d%H")
    except ValueError:
        return None
    return moment.hour, moment.weekday()
