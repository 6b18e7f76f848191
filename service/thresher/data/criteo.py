"""Criteo's display advertising logs: label, 13 integers, 26 categoricals, tab-separated, no header, oldest first."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from thresher.data.source import BadRows, Chunk, Source
from thresher.data.text import text_chunks
from thresher.spec import FieldSpec

INTEGERS = [f"I{i}" for i in range(1, 14)]
CATEGORICALS = [f"C{i}" for i in range(1, 27)]
COLUMNS = ["label", *INTEGERS, *CATEGORICALS]


@dataclass
class Criteo(Source):
    """The Kaggle layout (`train.txt`; its `test.txt` has no labels) or the terabyte's (`day_0` to `day_23`)."""

    @classmethod
    def open(cls, path: Path) -> Criteo:
        """The file, or the files in the folder, also compressed.

        Raises:
            ValueError: if the folder holds neither layout.
        """
        fields = {name: FieldSpec(kind="numeric") for name in INTEGERS} | {name: FieldSpec() for name in CATEGORICALS}
        return cls(files=_files(path), columns=COLUMNS, fields=fields, label="label", in_time_order=True)

    def chunks(self, wanted: Collection[str], bad: BadRows) -> Iterator[Chunk]:
        """Rows in the order of the days."""
        return text_chunks(self.files, COLUMNS, wanted, bad, delimiter="\t", header=False)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    days: dict[int, Path] = {}
    for file in sorted(path.iterdir()):
        if match := re.fullmatch(r"day_([0-9]+)(\.gz)?", file.name):
            if int(match[1]) in days:
                raise ValueError(
                    f"data.path: {path} has day {match[1]} twice, {days[int(match[1])].name} and {file.name}"
                )
            days[int(match[1])] = file
    kaggle = [path / name for name in ("train.txt", "train.txt.gz") if (path / name).is_file()]
    if (len(kaggle) == 1) == bool(days):
        found = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
        raise ValueError(f"data.path: {path} must hold either train.txt or day_0, day_1, … (or .gz); it holds {found}")
    return kaggle or [days[day] for day in sorted(days)]
