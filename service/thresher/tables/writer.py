"""Writes a folder of compact tables, each table as a stream of row chunks.

    writer = Writer(folder, model="deepfm", seed=0, budget=0.1, spec_fingerprint=…)
    with writer.table("user", rows=944, dim=16, kept=1500, dtype="fp16") as table:
        for values_ND, mask_ND in chunks:
            table.write(values_ND, mask_ND)
    writer.field("user", table="user", kind="categorical", encoding="vocabulary", keys=["1", "2", …])
    writer.dense({"mlp.0.weight": …})
    writer.finish()

The folder is complete when `finish` has written `manifest.json`; to give it its name at once is the caller's.
Shapes: N rows of a chunk, D columns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.budget import Budget
from thresher.rundir import file_sha256, write_bytes
from thresher.tables import manifest, safetensors_file, vocabulary
from thresher.tables.composition import Composition
from thresher.tables.format import (
    DENSE,
    DTYPES,
    MANIFEST,
    ONNX,
    Dtype,
    pack_masks,
    smallest_layout,
    table_path,
    tensors,
    vocabulary_path,
)
from thresher.tables.keys import DEFINITIONS
from thresher.tables.layouts import check_finite

_LATER = {"bytes": 1, "sha256": "0" * 64}  # of a file that is not written yet


class Writer:
    """Writes tables, fields and the dense part into an empty folder."""

    def __init__(self, folder: Path, *, model: str, seed: int, budget: Budget | None, spec_fingerprint: str) -> None:
        """Start a folder.

        Args:
            folder: made if it is not there.
            model: name of the model.
            seed: seed of the run.
            budget: of parameters, as in the spec; None for tables that were not pruned.
            spec_fingerprint: SHA-256 of the spec that made the model, in hexadecimal.

        Raises:
            ValueError: if the folder holds anything, or a value does not fit the format.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if left := sorted(path.name for path in folder.iterdir()):
            raise ValueError(f"{folder}: holds {left[0]} already; tables are written into an empty folder")
        self._folder = folder
        self._check = manifest.Checker(str(folder))
        self._model = self._check.text(model, "model")
        self._seed = self._check.whole(seed, "seed", 0, 2**63 - 1)
        self._budget = self._check.budget(budget, "budget")
        self._spec_fingerprint = self._check.sha256(spec_fingerprint, "spec_fingerprint")
        self._tables: dict[str, manifest.TableEntry] = {}
        self._fields: dict[str, manifest.FieldEntry] = {}
        self._dense: Mapping[str, npt.NDArray[Any]] = {}
        self._numeric: tuple[manifest.NumericEntry, ...] = ()
        self._onnx: bytes | None = None

    def table(self, name: str, *, rows: int, dim: int, kept: int, dtype: Dtype) -> TableWriter:
        """Start a table; its rows follow in order, in the `with` block of what this returns.

        Args:
            name: of the table, once a folder.
            rows: all rows that will come.
            dim: columns.
            kept: parameters of all masks together; with it the smaller layout is known before the first row.
            dtype: precision of the values on disk.

        Raises:
            ValueError: if a number is outside the format's limits, or the name is taken.
        """
        if name in self._tables:
            raise ValueError(f"{self._folder}: table {name!r} is written twice")
        value = {"name": name, "rows": rows, "dim": dim, "kept": kept, "layout": "dense", "dtype": dtype}
        entry = manifest.table_entry(
            self._check, value | {"file": {"path": table_path(name), **_LATER}}, f"table {str(name)[:80]!r}"
        )
        entry = replace(entry, layout=smallest_layout(entry.dtype, entry.rows, entry.dim, entry.kept))
        self._tables[name] = entry
        return TableWriter(self._folder / entry.file.path, entry)

    def field(
        self,
        name: str,
        *,
        table: str,
        kind: manifest.Kind,
        encoding: manifest.Encoding,
        pooling: manifest.Pooling = "mean",
        keys: vocabulary.Keys | None = None,
        composition: Composition | None = None,
        projection: str | None = None,
        column: str | None = None,
        separator: str | None = None,
    ) -> None:
        """Describe a field, and write its vocabulary where it has one. Call in the order of the model's fields.

        Args:
            name: of the field.
            table: its table, which must have been started.
            kind: `multi` has bags of ids, the others one id a sample.
            encoding: how raw keys become rows; with `id` they are rows already.
            pooling: how the vectors of a bag are combined.
            keys: `vocabulary` and `log_bucket`: `keys[i]` has id i + 1; strings, or an int64 array.
            composition: how ids share rows; none where each id has the row of its number.
            projection: array [D, columns of a vector] of the dense part that the pooled vectors are multiplied by.
            column: of the raw values, where it is not the field's name.
            separator: `multi`: between the keys of a bag that is one text.

        Raises:
            ValueError: names the field and what does not fit.
        """
        at = f"field {str(name)[:80]!r}"
        if name in self._fields:
            raise ValueError(f"{self._folder}: {at} is described twice")
        entry = manifest.field_entry(
            self._check,
            {
                "name": name,
                "table": table,
                "kind": kind,
                "pooling": pooling,
                "encoding": encoding,
                "definition": DEFINITIONS.get(encoding),
                "oov_row": 0 if encoding in ("vocabulary", "log_bucket") else None,
                "vocabulary": None
                if keys is None
                else {"form": "utf8", "keys": len(keys), "file": {"path": vocabulary_path(name), **_LATER}},
                "composition": None if composition is None else composition.as_json(),
                "projection": projection,
                "column": column,
                "separator": separator,
            },
            at,
            {entry.name: entry.rows for entry in self._tables.values()},
        )
        if entry.vocabulary and keys is not None:
            path = self._folder / entry.vocabulary.file.path
            path.parent.mkdir(exist_ok=True)
            entry = replace(entry, vocabulary=replace(entry.vocabulary, form=vocabulary.write(path, keys, name)))
        self._fields[name] = entry

    def dense(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Give the dense part of the model: every array that is not an embedding table, by name."""
        self._dense = arrays

    def graph(self, onnx: bytes | None, numeric: Mapping[str, str | None]) -> None:
        """Give what scores vectors.

        Args:
            onnx: the dense part as ONNX, its weights those of `dense.safetensors`; None where there is none.
            numeric: the columns of the numeric inputs, by name in the model's order; None for a column of that name.
        """
        self._onnx = onnx
        self._numeric = tuple(manifest.NumericEntry(name, column) for name, column in numeric.items())

    def finish(self) -> manifest.Manifest:
        """Hash the files and write the manifest.

        Raises:
            ValueError: if a table was left unfinished, there is no table or field, or a dense array cannot be stored.
        """
        for name, array in self._dense.items():
            if array.dtype.kind == "f":
                check_finite(array.reshape(-1), name, str(self._folder / DENSE))
        safetensors_file.write(self._folder / DENSE, self._dense)
        if self._onnx is not None:
            (self._folder / ONNX).write_bytes(self._onnx)
        result = manifest.Manifest(
            model=self._model,
            seed=self._seed,
            budget=self._budget,
            spec_fingerprint=self._spec_fingerprint,
            tables=tuple(replace(entry, file=self._hashed(entry.file.path)) for entry in self._tables.values()),
            fields=tuple(
                replace(entry, vocabulary=replace(entry.vocabulary, file=self._hashed(entry.vocabulary.file.path)))
                if entry.vocabulary
                else entry
                for entry in self._fields.values()
            ),
            dense=self._hashed(DENSE),
            numeric=self._numeric,
            onnx=None if self._onnx is None else self._hashed(ONNX),
        )
        path = self._folder / MANIFEST
        data = manifest.to_bytes(result)
        result = manifest.from_bytes(data, str(path), verify=True)
        write_bytes(path, data)
        return result

    def _hashed(self, path: str) -> manifest.FileEntry:
        file = self._folder / path
        if not file.is_file():
            raise ValueError(f"{file}: was not written to its end; write all rows of a table before finish()")
        return manifest.FileEntry(path, file.stat().st_size, file_sha256(file))


class TableWriter:
    """Takes the rows of one table in order; memory is bounded by the chunks that it is given."""

    def __init__(self, path: Path, entry: manifest.TableEntry) -> None:
        """Start the file under a temporary name; it gets `path` when all declared rows and values have come."""
        self._entry = entry
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        path.parent.mkdir(exist_ok=True)
        start, offsets = safetensors_file.header(tensors(entry.layout, entry.dtype, entry.rows, entry.dim, entry.kept))
        self._handle = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write_at(0, start)
        self._value_position = offsets["values"]
        self._mask_position = offsets.get("mask", 0)
        self._rows = 0
        self._kept = 0

    def write(self, values_ND: npt.NDArray[np.float32], mask_ND: npt.NDArray[np.bool_] | None = None) -> None:
        """Append rows.

        Args:
            values_ND: the next rows; what the mask leaves out is not looked at.
            mask_ND: what stays; None for all.

        Raises:
            ValueError: if shapes or types are wrong, more comes than was declared, or a kept value is not finite at
                the table's precision; names the table, and the row and column.
        """
        entry = self._entry
        shape = (len(values_ND), entry.dim)
        if values_ND.shape != shape or values_ND.dtype != np.float32:
            raise self._error(f"got {values_ND.dtype} values {values_ND.shape}, must be float32 (rows, {entry.dim})")
        if mask_ND is None:
            mask_ND = np.ones(shape, np.bool_)
        if mask_ND.shape != shape or mask_ND.dtype != np.bool_:
            raise self._error(f"got a {mask_ND.dtype} mask {mask_ND.shape} for values {shape}, must be bool")
        rows, kept = self._rows + shape[0], self._kept + int(mask_ND.sum())
        if rows > entry.rows or kept > entry.kept:
            raise self._error(f"got {rows} rows with {kept} kept, declared were {entry.rows} with {entry.kept}")
        with np.errstate(over="ignore"):  # what becomes infinite is an error just below, with its place
            stored_ND = np.where(mask_ND, values_ND, np.float32(0)).astype(DTYPES[entry.dtype])
        if not (finite_ND := np.isfinite(stored_ND)).all():
            row, column = np.argwhere(~finite_ND)[0].tolist()
            value = values_ND[row, column]
            raise self._error(f"row {self._rows + row}, column {column}: {value} is not finite in {entry.dtype}")
        if entry.layout == "dense":
            self._value_position = self._write_at(self._value_position, stored_ND.tobytes())
        else:
            self._value_position = self._write_at(self._value_position, stored_ND[mask_ND].tobytes())
            self._mask_position = self._write_at(self._mask_position, pack_masks(mask_ND).tobytes())
        self._rows, self._kept = rows, kept

    def close(self) -> None:
        """End the table.

        Raises:
            ValueError: if fewer rows or kept parameters came than were declared.
        """
        os.close(self._handle)
        entry = self._entry
        if (self._rows, self._kept) != (entry.rows, entry.kept):
            raise self._error(
                f"got {self._rows} rows with {self._kept} kept, declared were {entry.rows} with {entry.kept}"
            )
        self._temporary.rename(self._path)

    def __enter__(self) -> TableWriter:
        """Use in a `with` block, which closes the table."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the table, or leave it unfinished after an error."""
        if error is None:
            self.close()
        else:
            os.close(self._handle)

    def _write_at(self, position: int, data: bytes) -> int:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._handle, left, position)
            left, position = left[written:], position + written
        return position

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"table {self._entry.name!r}: {problem}")
