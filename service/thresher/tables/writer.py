"""Writes a folder of compact tables, each table as a stream of row chunks.

    writer = Writer(folder, model="deepfm", seed=0, budget=0.1, spec_fingerprint=…)
    with writer.table("user", dim=16, rows_by_kept=[200, 40, …], dtype="fp16", renumber=True) as table:
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.budget import Budget
from thresher.rundir import file_sha256, write_bytes
from thresher.tables import manifest, safetensors_file, values, vocabulary
from thresher.tables.composition import Composition
from thresher.tables.format import (
    DENSE,
    MANIFEST,
    MAX_DIM,
    MAX_ROWS,
    ONNX,
    Layout,
    choose_layout,
    mask_bytes,
    pack_masks,
    table_path,
    tensors,
    unpack_masks,
    vocabulary_path,
)
from thresher.tables.keys import DEFINITIONS
from thresher.tables.layout_writers import layout_writer
from thresher.tables.layouts import check_finite
from thresher.tables.values import LIMITS, MAX_SCALE, Dtype

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
        self._tables: dict[str, TableWriter] = {}
        self._fields: dict[str, manifest.FieldEntry] = {}
        self._dense: Mapping[str, npt.NDArray[Any]] = {}
        self._numeric: tuple[manifest.NumericEntry, ...] = ()
        self._onnx: bytes | None = None

    def table(
        self,
        name: str,
        *,
        dim: int,
        rows_by_kept: Sequence[int],
        dtype: Dtype,
        layout: Layout | Literal["auto"] = "auto",
        renumber: bool = False,
    ) -> TableWriter:
        """Start a table; its rows follow in order, in the `with` block of what this returns.

        Args:
            name: of the table, once a folder.
            dim: D columns.
            rows_by_kept: how many rows keep 0, 1, … D columns; with it every layout's size is known before the first
                row comes. `[0] * dim + [rows]` where nothing is pruned.
            dtype: precision of the values on disk.
            layout: of the file; `auto` takes the smallest.
            renumber: whether rows may get other numbers: all fields of the table will have vocabularies, and no
                composition. Row 0 is that of unknown keys.

        Raises:
            ValueError: if a number is outside the format's limits, the name is taken, or `bucketed` is wanted for rows
                that must keep their numbers.
        """
        if name in self._tables:
            raise ValueError(f"{self._folder}: table {name!r} is written twice")
        at = f"table {str(name)[:80]!r}"
        dim = self._check.whole(dim, f"{at}.dim", 1, MAX_DIM)
        by_kept = [self._check.whole(count, f"{at}.rows_by_kept", 0, MAX_ROWS) for count in rows_by_kept]
        if len(by_kept) != dim + 1:
            raise ValueError(f"{at}.rows_by_kept: has {len(by_kept)} counts, must be {dim + 1}, of 0 to {dim} columns")
        dtype = self._check.dtype(dtype, f"{at}.dtype")
        try:
            chosen = choose_layout(layout, dtype, dim, by_kept, renumber)
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from None
        entry = manifest.table_entry(
            self._check,
            {
                "name": name,
                "rows": sum(by_kept),
                "dim": dim,
                "kept": sum(kept * count for kept, count in enumerate(by_kept)),
                "layout": chosen,
                "dtype": dtype,
                "file": {"path": table_path(name), **_LATER},
            },
            at,
        )
        self._tables[name] = TableWriter(self._folder / entry.file.path, entry, by_kept, renumber)
        return self._tables[name]

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
            table: its table, whose rows must have been written if the field has keys.
            kind: `multi` has bags of ids, the others one id a sample.
            encoding: how raw keys become rows; with `id` they are rows already.
            pooling: how the vectors of a bag are combined.
            keys: `vocabulary` and `log_bucket`: `keys[i]` has id i + 1; strings, or an int64 array. Keys of rows that
                keep nothing leave the vocabulary where the row of unknown keys keeps nothing either.
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
            {name: table.entry.rows for name, table in self._tables.items()},
        )
        rows_of = self._tables[entry.table]
        if rows_of.renumbered and (entry.vocabulary is None or composition is not None):
            raise ValueError(f"{at}: the rows of table {table!r} get other numbers, which only vocabularies can follow")
        if entry.vocabulary and keys is not None:
            path = self._folder / entry.vocabulary.file.path
            path.parent.mkdir(exist_ok=True)
            oov_row, rows = 0, np.arange(1, len(keys) + 1)
            if composition is None:
                oov_row, there, rows = rows_of.of_vocabulary(len(keys))
                keys = keys[there] if isinstance(keys, np.ndarray) else [keys[i] for i in there]
            form = vocabulary.write(path, keys, rows, name)
            entry = replace(entry, oov_row=oov_row, vocabulary=replace(entry.vocabulary, form=form, keys=len(keys)))
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
            tables=tuple(
                replace(table.entry, file=self._hashed(table.entry.file.path)) for table in self._tables.values()
            ),
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
    """Takes the rows of one table in order; memory is bounded by the chunks that it is given, and 5 bytes a row.

    Attributes:
        entry: the table's, of the manifest.
        renumbered: whether rows get other numbers than those in which they come.
    """

    def __init__(self, path: Path, entry: manifest.TableEntry, by_kept: Sequence[int], renumber: bool) -> None:
        """Start the file under a temporary name; it gets `path` when all declared rows and values have come."""
        self.entry = entry
        self.renumbered = renumber and entry.layout == "bucketed"
        self._by_kept = np.array(by_kept, np.int64)
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        path.parent.mkdir(exist_ok=True)
        specs = tensors(entry.layout, entry.dtype, entry.dim, by_kept)
        start, offsets = safetensors_file.header(specs)
        self._end = len(start) + sum(spec.nbytes for spec in specs)
        self._handle = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write_at(0, start)
        self._layout = layout_writer(entry.layout, entry.dtype, entry.dim, by_kept, offsets)
        self._scales_at = offsets.get("scales")
        self._spool = _Spool(self._temporary, entry, by_kept) if entry.dtype in LIMITS else None
        self._rows = 0
        self._came = np.zeros(entry.dim + 1, np.int64)  # rows by kept columns
        self._numbers = np.empty(entry.rows if self.renumbered else 0, np.int32)
        self._empty = np.zeros(entry.rows, np.bool_)
        self._complete = False

    def write(self, values_ND: npt.NDArray[np.float32], mask_ND: npt.NDArray[np.bool_] | None = None) -> None:
        """Append rows.

        Args:
            values_ND: the next rows; what the mask leaves out is not looked at.
            mask_ND: what stays; None for all.

        Raises:
            ValueError: if shapes or types are wrong, other rows come than were declared, or a kept value is not finite
                at the table's precision; names the table, and the row and column.
        """
        entry = self.entry
        shape = (len(values_ND), entry.dim)
        if values_ND.shape != shape or values_ND.dtype != np.float32:
            raise self._error(f"got {values_ND.dtype} values {values_ND.shape}, must be float32 (rows, {entry.dim})")
        if mask_ND is None:
            mask_ND = np.ones(shape, np.bool_)
        if mask_ND.shape != shape or mask_ND.dtype != np.bool_:
            raise self._error(f"got a {mask_ND.dtype} mask {mask_ND.shape} for values {shape}, must be bool")
        counts_N = mask_ND.sum(axis=1)
        came = self._came + np.bincount(counts_N, minlength=entry.dim + 1)
        if (came > self._by_kept).any():
            raise self._not_as_declared(came)
        self._check_values(values_ND, mask_ND)
        self._empty[self._rows : self._rows + shape[0]] = counts_N == 0
        if self.renumbered:
            self._numbers[self._rows : self._rows + shape[0]] = self._numbers_of(counts_N)
        if self._spool is not None:
            self._spool.put(values_ND, mask_ND, self._layout.numbers(mask_ND))
        else:
            self._put(values_ND, mask_ND, None)
        self._rows, self._came = self._rows + shape[0], came

    def close(self) -> None:
        """End the table.

        Raises:
            ValueError: if fewer rows came than were declared, or values are too large for the type.
        """
        try:
            if (self._came != self._by_kept).any():
                raise self._not_as_declared(self._came)
            if self._spool is not None and self._scales_at is not None:
                scales = self._spool.scales()
                if scales.max(initial=0) > MAX_SCALE:
                    raise self._error(f"values are too large for {self.entry.dtype}; take fp32")
                self._write_at(self._scales_at, scales.astype("<f4").tobytes())
                for values_ND, mask_ND in self._spool.chunks():
                    self._put(values_ND, mask_ND, scales)
            for position, data in self._layout.end():
                self._write_at(position, data)
            # Up to where the file should end: its padding is a hole of zeros.
            os.ftruncate(self._handle, self._end)
        finally:
            self._stop()
        self._temporary.rename(self._path)
        self._complete = True

    def of_vocabulary(self, keys: int) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What a vocabulary of this table has, of which key i has the row that came as number i + 1.

        Args:
            keys: how many there are, fewer than rows.

        Returns:
            The row of unknown keys, the numbers `[n]` of the keys that stay in the vocabulary, and their rows `[n]`.

        Raises:
            ValueError: if the table is not complete.
        """
        if not self._complete:
            raise self._error("its rows must be written before the vocabularies of its fields")
        # Where the row of unknown keys is zeros, a key of zeros need not be known.
        there = np.flatnonzero(~(self._empty[1 : keys + 1] & self._empty[0]))
        if not self.renumbered:
            return 0, there, there + 1
        return int(self._numbers[0]), there, self._numbers[there + 1].astype(np.int64)

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
            self._stop()

    def _numbers_of(self, counts_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of the next rows: in the order of how much they keep, then as they come."""
        found_N = (np.cumsum(self._by_kept) - self._by_kept + self._came)[counts_N]
        order = np.argsort(counts_N, kind="stable")
        ordered = counts_N[order]
        found_N[order] += np.arange(len(order)) - np.searchsorted(ordered, ordered)
        return found_N

    def _stop(self) -> None:
        os.close(self._handle)
        if self._spool is not None:
            self._spool.remove()

    def _put(
        self,
        values_ND: npt.NDArray[np.float32],
        mask_ND: npt.NDArray[np.bool_],
        scales: npt.NDArray[np.float32] | None,
    ) -> None:
        for position, data in self._layout.put(values_ND, mask_ND, scales):
            self._write_at(position, data)

    def _check_values(self, values_ND: npt.NDArray[np.float32], mask_ND: npt.NDArray[np.bool_]) -> None:
        kept = values_ND[mask_ND][:, None]
        dtype = "fp32" if self.entry.dtype in LIMITS else self.entry.dtype
        if values.all_finite(values.encode(kept, dtype, None), dtype):
            return
        for row, column in np.argwhere(mask_ND).tolist():
            value = values_ND[row, column]
            if not values.all_finite(values.encode(np.array([[value]]), dtype, None), dtype):
                raise self._error(
                    f"row {self._rows + row}, column {column}: {value} is not finite in {self.entry.dtype}"
                )

    def _write_at(self, position: int, data: bytes) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._handle, left, position)
            left, position = left[written:], position + written

    def _not_as_declared(self, came: npt.NDArray[np.int64]) -> ValueError:
        rows, kept = int(came.sum()), int(came @ np.arange(len(came)))
        entry = self.entry
        problem = f"got {rows} rows with {kept} kept, declared were {entry.rows} with {entry.kept}"
        if rows <= entry.rows and kept <= entry.kept:
            number = int((came != self._by_kept).argmax())
            problem += f"; {came[number]} rows with {number}, declared were {self._by_kept[number]}"
        return self._error(problem)

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"table {self.entry.name!r}: {problem}")


class _Spool:
    """Rows put aside in a file until the scales of all are known; memory is that of a chunk."""

    def __init__(self, beside: Path, entry: manifest.TableEntry, by_kept: Sequence[int]) -> None:
        self._entry = entry
        buckets = sum(count > 0 for count in by_kept[1:]) if entry.layout == "bucketed" else 1
        self._largest = np.zeros((buckets, entry.dim), np.float32)
        self._path = beside.with_suffix(".spool")
        self._file = self._path.open("w+b")
        self._chunks: list[int] = []

    def put(
        self, values_ND: npt.NDArray[np.float32], mask_ND: npt.NDArray[np.bool_], numbers_N: npt.NDArray[np.int64]
    ) -> None:
        """Put a chunk aside; each of its rows counts for one row of scales."""
        sizes_ND = np.where(mask_ND, np.abs(values_ND), np.float32(0))
        for number in np.unique(numbers_N[mask_ND.any(axis=1)]).tolist():
            largest_D = sizes_ND[numbers_N == number].max(axis=0)
            self._largest[number] = np.maximum(self._largest[number], largest_D)
        self._file.write(pack_masks(mask_ND).tobytes() + values_ND[mask_ND].tobytes())
        self._chunks.append(len(mask_ND))

    def scales(self) -> npt.NDArray[np.float32]:
        """Scales `[S, D]` of all rows that came."""
        return values.scales_of(self._largest, self._entry.dtype)

    def chunks(self) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
        """The chunks again, as they came."""
        self._file.seek(0)
        for rows in self._chunks:
            width = mask_bytes(self._entry.dim)
            packed = np.frombuffer(self._file.read(rows * width), np.uint8).reshape(rows, width)
            mask_ND = unpack_masks(packed, self._entry.dim)
            values_ND = np.zeros(mask_ND.shape, np.float32)
            values_ND[mask_ND] = np.frombuffer(self._file.read(4 * int(mask_ND.sum())), np.float32)
            yield values_ND, mask_ND

    def remove(self) -> None:
        """Delete the file."""
        self._file.close()
        self._path.unlink()
