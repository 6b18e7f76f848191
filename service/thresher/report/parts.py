"""Where the bytes of exported tables are, from their manifest."""

from __future__ import annotations

from thresher.tables.manifest import Manifest, TableEntry
from thresher.tables.values import value_bytes

VALUES, MASKS, VOCABULARY, DENSE, REST = "values", "masks", "vocabulary", "dense part", "manifest and headers"
PARTS = (VALUES, MASKS, VOCABULARY, DENSE, REST)


def parts_bytes(manifest: Manifest) -> dict[str, int]:
    """Bytes by purpose; they sum to `manifest.total_bytes`."""
    values = sum(_values_bytes(table) for table in manifest.tables)
    masks = sum(_masks_bytes(table) for table in manifest.tables)
    return {
        VALUES: values,
        MASKS: masks,
        VOCABULARY: manifest.vocabulary_bytes,
        DENSE: manifest.dense_bytes,
        REST: manifest.table_bytes - values - masks + manifest.manifest_bytes,
    }


def table_bytes(manifest: Manifest) -> dict[str, int]:
    """Bytes of each table's file."""
    return {table.name: table.file.bytes for table in manifest.tables}


def _values_bytes(table: TableEntry) -> int:
    """Of values that take half a byte, without the halves that stay empty."""
    return value_bytes(table.dtype, table.rows * table.dim if table.layout == "dense" else table.kept)


def _masks_bytes(table: TableEntry) -> int:
    """All that says which columns stay; the manifest does not tell it from the header."""
    return 0 if table.layout == "dense" else table.file.bytes - _values_bytes(table)
