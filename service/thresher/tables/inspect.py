"""What a folder of compact tables holds, for people."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from thresher.tables import manifest
from thresher.tables.format import MANIFEST


def show(folder: Path) -> None:
    """Print the tables and fields of a folder, as its manifest lists them; `verify` holds it against the files.

    Raises:
        ValueError: if there is no manifest, or it is none.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: not there; name the folder that an export wrote")
    entries = manifest.from_bytes(path.read_bytes(), str(path), verify=True)
    console = Console()
    tables = Table("table", "rows", "dim", "kept", "layout", "values", "bytes", "of fp32", title=entries.model)
    for table in entries.tables:
        entry_bytes = table.rows * table.dim * 4
        tables.add_row(
            table.name, f"{table.rows:,}", str(table.dim), f"{table.kept / (table.rows * table.dim):.2%}",
            table.layout, table.dtype, f"{table.file.bytes:,}", f"{table.file.bytes / entry_bytes:.2%}",
        )  # fmt: skip
    fields = Table("field", "table", "kind", "pooling", "encoding", "keys", "bytes of keys", "ids share rows")
    for field in entries.fields:
        listed = field.vocabulary
        fields.add_row(
            field.name, field.table, field.kind, field.pooling, field.encoding,
            f"{listed.keys:,}" if listed else "", f"{listed.file.bytes:,}" if listed else "",
            field.composition.combine if field.composition else "",
        )  # fmt: skip
    console.print(tables, fields)
    console.print(
        f"{entries.total_bytes:,} bytes: tables {entries.table_bytes:,}, vocabularies {entries.vocabulary_bytes:,}, "
        f"dense part {entries.dense_bytes:,}, manifest {entries.manifest_bytes:,}"
    )
