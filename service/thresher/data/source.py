"""What a reader of raw data gives: chunks of columns of bounded size, and the bad rows it met."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from thresher.spec import FieldSpec

PACKAGE = "package:"
NAMED_BAD_ROWS = 20  # bad rows that meta.json names one by one


@dataclass(frozen=True)
class Chunk:
    """Consecutive good rows of one file.

    Attributes:
        columns: an array of n entries for each column that was asked for; text files give strings.
        file: where the rows are from, for messages.
        rows: int64[n], number of each row in its file, from 1; in a text file the number of its line.
        rows_before: raw rows in the files before this one, so that rows_before + rows tells all rows apart.
    """

    columns: dict[str, pa.Array]
    file: str
    rows: np.ndarray
    rows_before: int = 0


class BadRows:
    """Counts the rows that cannot be read and names the first of them.

    Args:
        policy: `fail` stops at the first bad row, `skip` at more than `limit` of them.
        limit: most rows that are skipped.
    """

    def __init__(self, policy: str, limit: int) -> None:
        """See the class."""
        self.policy = policy
        self.limit = limit
        self.count = 0
        self.first: list[str] = []

    def add(self, file: str, reasons: Mapping[int, str]) -> None:
        """Take note of bad rows.

        Args:
            file: the file that they are in.
            reasons: what is wrong with a row, by its number in the file.

        Raises:
            ValueError: if bad rows stop the run, or they are too many.
        """
        for row in sorted(reasons):
            message = f"{file}, row {row}: {reasons[row]}"
            if self.policy == "fail":
                raise ValueError(f"{message}; mend the row, or set data.on_bad_row: skip")
            self.count += 1
            if len(self.first) < NAMED_BAD_ROWS:
                self.first.append(message)
            if self.count > self.limit:
                raise ValueError(
                    f"more than {self.limit} bad rows, the last is {message}, the first {self.first[0]}; "
                    "check data.format, or raise data.max_bad_rows"
                )


@dataclass
class Source(ABC):
    """Raw data of one format: what is there, and a stream of it.

    Attributes:
        files: what is read, in order.
        columns: names of the columns there are.
        fields: the fields that the model gets when the spec names none.
        label: column of the label when the spec names none.
        time: column of the time when the spec names none.
        in_time_order: the rows come oldest first, so that a split by time needs no column.
    """

    files: list[Path]
    columns: list[str]
    fields: dict[str, FieldSpec] = field(default_factory=dict)
    label: str | None = None
    time: str | None = None
    in_time_order: bool = False

    @abstractmethod
    def chunks(self, wanted: Collection[str], bad: BadRows) -> Iterator[Chunk]:
        """Stream the rows.

        Args:
            wanted: columns to give, each one of `columns`.
            bad: takes the rows that cannot be read as rows at all.

        Raises:
            ValueError: if a file cannot be read; names it.
        """


def resolve_path(path: str) -> Path:
    """The file or folder that `data.path` names; `package:NAME/DIR` lies in an installed package, never imported.

    Raises:
        ValueError: if there is no such path or package.
    """
    if not path.startswith(PACKAGE):
        found = Path(path).expanduser()
        if not found.exists():
            raise ValueError(
                f"data.path: {path} does not exist (looked in {Path.cwd()}); name a file or folder there is"
            )
        return found
    name, _, folder = path.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier():  # a dotted name would make find_spec import the parent package
        raise ValueError(f"data.path: {path}: `{name}` is no top-level package; write package:NAME/DIR")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"data.path: {path}: package `{name}` is not installed; install it, or name a folder")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    found = (root / folder).resolve()
    if not found.is_relative_to(root):
        raise ValueError(f"data.path: {path} leaves the package; name a folder inside it")
    if not found.exists():
        raise ValueError(f"data.path: {path}: package `{name}` has no `{folder}`; it is in {root}")
    return found
