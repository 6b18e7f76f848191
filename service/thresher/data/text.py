"""Delimited text in blocks of bounded size: which columns a row has, and the number of its line when it is bad."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from thresher.data.source import BadRows, Chunk

BLOCK_BYTES = 8 << 20  # text parsed at once
MAX_LINE_BYTES = 64 << 20  # a longer line is no row but a file of another kind
UNIT_SEPARATOR = "\x1f"  # stands in for a delimiter of several characters, which the parser does not know


def first_line(path: Path, encoding: str = "utf-8") -> str:
    """The first line of a text file, also of a compressed one, without its end.

    Raises:
        ValueError: if the file is empty or no text.
    """
    for block in _blocks(path, 1 << 16):
        try:
            return block.split(b"\n", 1)[0].rstrip(b"\r").decode(encoding)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: the first line is not {encoding} text; check data.format") from None
    raise ValueError(f"{path}: the file is empty")


def text_chunks(
    files: Sequence[Path],
    columns: Sequence[str],
    wanted: Collection[str],
    bad: BadRows,
    *,
    delimiter: str,
    header: bool,
    encoding: str = "utf-8",
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Chunk]:
    """Stream delimited text without quoting; all values are strings, an empty cell is the empty string.

    Args:
        files: read one after the other; a name ending in .gz, .bz2 or .zst is decompressed on the way.
        columns: names of all columns, in the order of the file.
        wanted: columns to give.
        bad: takes rows with a wrong number of columns, or that are not text.
        delimiter: between the columns, one character or several.
        header: the first line of each file names the columns and is no row.
        encoding: of the text.
        block_bytes: text parsed at once.

    Raises:
        ValueError: if a file cannot be read, or `bad` refuses.
    """
    rows_before = 0
    for path in files:
        lines_before = 0
        for block in _blocks(path, block_bytes):
            lines = block.count(b"\n") + (not block.endswith(b"\n"))
            table, rows = _parse(
                block,
                lines_before + 1,
                path,
                columns,
                wanted,
                bad,
                delimiter=delimiter,
                header=header and lines_before == 0,
                encoding=encoding,
            )
            lines_before += lines
            if len(rows):
                arrays = {name: table.column(name).combine_chunks() for name in wanted}
                yield Chunk(arrays, str(path), rows, rows_before)
        rows_before += lines_before


def _blocks(path: Path, block_bytes: int) -> Iterator[bytes]:
    """Whole lines of a file, about `block_bytes` at a time."""
    rest = b""
    try:
        with pa.input_stream(str(path), compression="detect", buffer_size=1 << 20) as stream:
            while data := stream.read(block_bytes):
                cut = data.rfind(b"\n") + 1
                if cut == 0:
                    rest += data
                    if len(rest) > MAX_LINE_BYTES:
                        raise ValueError(f"{path}: a line of more than {MAX_LINE_BYTES >> 20} MiB; check data.format")
                    continue
                yield rest + data[:cut]
                rest = data[cut:]
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); is the file whole?") from error
    if rest:
        yield rest


def _parse(
    block: bytes,
    first_row: int,
    path: Path,
    columns: Sequence[str],
    wanted: Collection[str],
    bad: BadRows,
    *,
    delimiter: str,
    header: bool,
    encoding: str,
) -> tuple[pa.Table, np.ndarray]:
    """Columns of a block of lines, and the number of each row that is in them."""
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    rows = np.arange(first_row, first_row + block.count(b"\n") + (not block.endswith(b"\n")), dtype=np.int64)
    reasons: dict[int, str] = {}
    if header:
        block, rows = block[block.find(b"\n") + 1 or len(block) :], rows[1:]
    try:
        text = block.decode(encoding)
        clean = "\r" not in text and not text.startswith("\n") and "\n\n" not in text
    except UnicodeDecodeError:
        clean = False
    if not clean:  # rare, so one line at a time
        kept = []
        for index, line in enumerate(block.removesuffix(b"\n").split(b"\n")):
            if reason := _unreadable(line, encoding):
                reasons[int(rows[index])] = reason
            else:
                kept.append(line)
        rows = np.array([row for row in rows if row not in reasons], dtype=np.int64)
        text = b"\n".join(kept).decode(encoding)
    if len(delimiter) > 1:
        text = text.replace(delimiter, UNIT_SEPARATOR)
        delimiter = UNIT_SEPARATOR
    wrong: list[int] = []

    def skip(row: csv.InvalidRow) -> str:
        wrong.append(row.number - 1)
        reasons[int(rows[row.number - 1])] = f"{row.actual_columns} columns instead of {row.expected_columns}"
        return "skip"

    encoded = text.encode()
    if not encoded:
        table = pa.table({name: pa.array([], pa.string()) for name in wanted})
    else:
        table = csv.read_csv(
            io.BytesIO(encoded),
            read_options=csv.ReadOptions(use_threads=False, column_names=list(columns), block_size=len(encoded) + 1),
            parse_options=csv.ParseOptions(delimiter=delimiter, quote_char=False, invalid_row_handler=skip),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=list(wanted),
                strings_can_be_null=False,
            ),
        )
        rows = np.delete(rows, wrong)
    bad.add(str(path), reasons)
    assert len(wanted) == 0 or table.num_rows == len(rows)
    return table, rows


def _unreadable(line: bytes, encoding: str) -> str | None:
    """Why a line cannot be a row, or None."""
    if not line:
        return "the row is empty"
    if b"\r" in line:
        return "a carriage return inside the row"
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return f"not {encoding} text"
    return None
