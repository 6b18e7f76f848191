"""What the page for people shows: the model, its fields and bytes, and one scored sample."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from thresher.serve.limits import RefusedError
from thresher.serve.model import Version
from thresher.serve.publication import CARD
from thresher.tables import Tables
from thresher.tables.golden import GOLDEN
from thresher.tables.manifest import FieldEntry

_SHOWN_KEYS = 100  # of a bag


def inputs(tables: Tables) -> list[dict[str, Any]]:
    """The columns that the model reads, as the Open Inference Protocol lists them."""
    found: dict[str, dict[str, Any]] = {}
    for field in tables.manifest.fields:
        found.setdefault(field.source, {"name": field.source, **_tensor(field)})
    for entry in tables.manifest.numeric:
        found.setdefault(entry.source, {"name": entry.source, "datatype": "FP32", "shape": [-1]})
    return list(found.values())


def _tensor(field: FieldEntry) -> dict[str, Any]:
    if field.kind == "numeric":
        return {"datatype": "FP32", "shape": [-1]}
    if field.kind == "multi":
        return {"datatype": "BYTES", "shape": [-1] if field.separator else [-1, -1]}
    whole = field.encoding == "id" or (field.vocabulary is not None and field.vocabulary.form == "int64")
    return {"datatype": "INT64" if whole else "BYTES", "shape": [-1]}


def description(name: str, version: Version) -> dict[str, Any]:
    """The model, for the page."""
    tables = version.tables
    entries = tables.manifest
    card = tables.folder / CARD
    columns = _example(tables)
    return {
        "name": name,
        "version": version.name,
        "model": entries.model,
        "seed": entries.seed,
        "budget": entries.budget,
        "spec_fingerprint": entries.spec_fingerprint,
        "golden_difference": version.golden_difference,
        "bytes": {
            "tables": entries.table_bytes,
            "vocabularies": entries.vocabulary_bytes,
            "dense part": entries.dense_bytes,
            "manifest": entries.manifest_bytes,
        },
        "dense_table_bytes": sum(table.rows * table.dim * 4 for table in entries.tables),
        "fields": [
            {
                "name": field.name,
                "column": field.source,
                "kind": field.kind,
                "encoding": field.encoding,
                "separator": field.separator,
                "ids": field.ids(tables.tables[field.table].rows),
                "example": columns[field.source],
                **{key: getattr(tables.tables[field.table], key) for key in ("rows", "dim", "kept", "layout", "dtype")},
                "bytes": tables.tables[field.table].file.bytes,
            }
            for field in entries.fields
        ],
        "numeric": [
            {"name": entry.name, "column": entry.source, "example": columns[entry.source]} for entry in entries.numeric
        ],
        "card": card.read_text() if card.is_file() else "",
    }


def scored(tables: Tables, body: bytes) -> dict[str, Any]:
    """Score of one sample, and for each field the columns that the rows of its keys kept.

    Args:
        tables: of the model.
        body: JSON: the text of each column; an empty one is a missing value.

    Raises:
        RefusedError: if it is not that, or cannot be scored.
    """
    try:
        texts = msgspec.json.decode(body, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(400, f"the text of each column is wanted: {error}") from None
    columns = {name: [text or None] for name, text in texts.items()}
    try:
        (score,) = tables.score(columns).tolist()
        fields = [_kept(tables, field, texts[field.source]) for field in tables.manifest.fields]
    except ValueError as error:
        raise RefusedError(400, str(error)) from None
    return {"score": score, "fields": fields}


def _kept(tables: Tables, field: FieldEntry, text: str) -> dict[str, Any]:
    keys: list[Any] = [text or None]
    if field.kind == "multi":
        keys = [key for key in text.split(field.separator or "|") if key][:_SHOWN_KEYS]
    ids = tables.rows(field.name, keys).tolist()
    vectors = tables.lookup(field.name, keys)
    return {
        "name": field.name,
        "keys": [
            {"key": "" if key is None else key, "id": own, "known": own != field.oov_row, "vector": vector}
            for key, own, vector in zip(keys, ids, np.round(vectors, 6).tolist(), strict=True)
        ],
    }


def _example(tables: Tables) -> dict[str, str]:
    """The columns of the first golden request, as texts."""
    value = msgspec.json.decode((tables.folder / GOLDEN).read_bytes())
    return {name: _text(values[0]) for name, values in value["columns"].items()}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(map(_text, value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)
