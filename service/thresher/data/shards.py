"""Prepared samples on disk: Arrow IPC files, each record batch a row group.

Columns: `label` (uint8), `sparse.<field>` (table rows, the smallest integer type that holds them; a list for a multi
field), `dense.<name>` (float32). The files are not compressed, so that reading one is mapping it: ranks on one machine
share its pages, and a row group costs a copy and no decoding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROW_GROUPS = 256  # a file; few files, since each is open while a loader lives
LABEL = "label"


def sparse(field: str) -> str:
    """Name of a field's column."""
    return f"sparse.{field}"


def dense(name: str) -> str:
    """Name of a dense input's column."""
    return f"dense.{name}"


def id_type(rows: int) -> pa.DataType:
    """The smallest type that holds the rows of a table."""
    return pa.from_numpy_dtype(np.min_scalar_type(rows - 1)) if rows <= 1 << 32 else pa.int64()


class ShardWriter:
    """Cuts a stream of samples into row groups and files.

    Args:
        folder: where the files go; made if it is not there.
        schema: of the samples.
        row_group_rows: samples a row group.
    """

    def __init__(self, folder: Path, schema: pa.Schema, row_group_rows: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files: list[str] = []
        self.samples = 0
        self._folder = folder
        self._schema = schema
        self._row_group_rows = row_group_rows
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_rows = 0
        self._groups = 0
        self._file: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Add samples."""
        if batch.num_rows == 0:
            return
        self.samples += batch.num_rows
        self._waiting.append(batch)
        self._waiting_rows += batch.num_rows
        if self._waiting_rows >= self._row_group_rows:
            table = pa.Table.from_batches(self._waiting, self._schema)
            whole = table.num_rows - table.num_rows % self._row_group_rows
            for start in range(0, whole, self._row_group_rows):
                self._write_group(table.slice(start, self._row_group_rows))
            rest = table.slice(whole).combine_chunks()
            self._waiting, self._waiting_rows = rest.to_batches(), rest.num_rows

    def close(self) -> None:
        """Write what is left."""
        if self._waiting_rows:
            self._write_group(pa.Table.from_batches(self._waiting, self._schema))
        self._close_file()

    def _write_group(self, table: pa.Table) -> None:
        if self._file is None:
            name = f"{len(self.files):05d}.arrow"
            self._file = pa.ipc.new_file(self._folder / name, self._schema)
            self.files.append(name)
        self._file.write_batch(table.combine_chunks().to_batches()[0])
        self._groups += 1
        if self._groups % ROW_GROUPS == 0:
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class ShardReader:
    """The row groups of one split, by number.

    Args:
        data: folder of the prepared data.
        files: of the split, relative to it.

    Raises:
        ValueError: if a file is not there or cut off; names it.
    """

    def __init__(self, data: Path, files: list[str]) -> None:
        self._groups: list[tuple[Path, Any, int, int]] = []
        for name in files:
            first = 1
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(data / name)))
                for index in range(reader.num_record_batches):
                    rows = reader.get_batch(index).num_rows
                    self._groups.append((data / name, reader, index, first))
                    first += rows
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{data / name}: cannot be read ({error}); run prepare again") from error

    def __len__(self) -> int:
        return len(self._groups)

    def where(self, group: int, row: int) -> str:
        """Where row `row` of a group, counted from 0, stands, for messages."""
        path, _, _, first = self._groups[group]
        return f"{path}, row {first + row}"

    def read(self, group: int) -> pa.RecordBatch:
        """A row group; its columns lie in the mapped file."""
        _, reader, index, _ = self._groups[group]
        return reader.get_batch(index)
