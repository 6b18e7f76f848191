"""Any Parquet files: one, or all in a folder in the order of their names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from thresher.data.source import BadRows, Chunk, Source

CHUNK_ROWS = 65_536


@dataclass
class Parquet(Source):
    """Files of one schema; the spec names fields and label."""

    @classmethod
    def open(cls, path: Path) -> Parquet:
        """The file, or the files in the folder.

        Raises:
            ValueError: if there is none, one cannot be read, or they differ in their columns.
        """
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"data.path: {path} has no *.parquet files")
        columns = parquet_columns(files[0])
        for file in files[1:]:
            if set(parquet_columns(file)) != set(columns):
                raise ValueError(f"{file}: its columns are {parquet_columns(file)}, those of {files[0]} are {columns}")
        return cls(files=files, columns=columns)

    def chunks(self, wanted: Collection[str], bad: BadRows) -> Iterator[Chunk]:  # noqa: ARG002 - every row is a row
        """Rows in the order of the files."""
        return parquet_chunks(self.files, wanted)


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns of a Parquet file.

    Raises:
        ValueError: if it is none.
    """
    try:
        return [str(name) for name in pq.read_schema(path).names]
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error


def parquet_chunks(files: Sequence[Path], wanted: Collection[str]) -> Iterator[Chunk]:
    """Stream columns of Parquet files."""
    rows_before = 0
    for path in files:
        done = 0
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:  # where the file has checksums
                for batch in file.iter_batches(CHUNK_ROWS, columns=list(wanted)):
                    rows = np.arange(done + 1, done + 1 + batch.num_rows, dtype=np.int64)
                    yield Chunk({name: batch.column(name) for name in wanted}, str(path), rows, rows_before)
                    done += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path}: cannot be read after row {done} ({error})") from error
        rows_before += done
