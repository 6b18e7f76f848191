"""Loads a folder of compact tables by memory map, on NumPy alone, and looks vectors up in it.

Shapes: B samples, L ids of all bags together, D columns of a table.
"""

from __future__ import annotations

import difflib
import hashlib
import mmap
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.data.hashing import hash_keys
from thresher.tables import binding, manifest, raw, safetensors_file
from thresher.tables.format import MANIFEST, ONNX
from thresher.tables.keys import log_buckets, texts
from thresher.tables.layouts import Bags, Shape, Table, check_finite, pool, pooled
from thresher.tables.scorer import Scorer
from thresher.tables.vocabulary import Vocabulary

Ids = npt.NDArray[np.integer[Any]] | Sequence[int]
RaggedIds = tuple[Ids, Ids] | Sequence[Ids]


def load(path: str | Path, verify: bool = True) -> Tables:
    """Load compact tables.

    The structure of every file is checked, whatever `verify` says: a crafted or truncated file is an error and never
    a read out of bounds. Files must not change while they are loaded.

    Args:
        path: the folder that an export wrote.
        verify: check the SHA-256 of every file too, so that a single flipped bit is found.

    Raises:
        ValueError: names the file, where it can the field or table, and the problem.
    """
    folder = Path(path)
    where = folder / MANIFEST
    with safetensors_file.map_file(where) as mapped:
        if len(mapped) > manifest.MAX_BYTES:
            raise ValueError(f"{where}: {len(mapped)} bytes, at most {manifest.MAX_BYTES} are read")
        entries = manifest.from_bytes(mapped[:], str(where), verify=verify)
    return Tables(folder, entries, verify)


class Tables:
    """Compact tables, ready for lookups from any number of threads.

    Attributes:
        folder: where they are.
        manifest: all that `manifest.json` says.
        fields: the model's fields in its order, by name.
        tables: the tables, by name.
        dense: the dense part of the model: read-only arrays by name.
        table_bytes: bytes of the tables' files.
        total_bytes: bytes of all files.
    """

    def __init__(self, folder: Path, entries: manifest.Manifest, verify: bool) -> None:
        """Map and check the files that a manifest lists; use `load`."""
        self.folder = folder
        self.manifest = entries
        self.fields = {field.name: field for field in entries.fields}
        self.tables = {table.name: table for table in entries.tables}
        self.table_bytes = entries.table_bytes
        self.total_bytes = entries.total_bytes
        for parent in {(folder / file.path).parent for file in entries.files()} - {folder}:
            if parent.is_symlink():
                raise ValueError(f"{parent}: is a link; the folders of an export are its own")
        self._tables = {table.name: _table(folder, table, verify) for table in entries.tables}
        self._vocabularies: dict[str, Vocabulary] = {}
        for field in entries.fields:
            if (listed := field.vocabulary) is not None:
                arrays = _arrays(folder, listed.file, verify)
                ids = self._ids(field)
                where = f"{folder / listed.file.path}: field {field.name}"
                self._vocabularies[field.name] = Vocabulary(
                    arrays, listed.form, listed.keys, ids, field.oov_row or 0, where
                )
        self.dense = _arrays(folder, entries.dense, verify)
        for name, array in self.dense.items():
            if array.dtype.kind == "f":
                check_finite(array.reshape(-1), name, str(folder / entries.dense.path))
        if entries.onnx is not None:
            _mapped(folder, entries.onnx, verify)
        for number, field in enumerate(entries.fields):
            at = f"{folder / MANIFEST}: fields[{number}]"
            if field.composition is not None:
                field.composition.check_maps(self.tables[field.table].dim, self.dense, f"{at}.composition")
            if field.projection is not None:
                self._check_projection(field, at)

    def embed(
        self, ids: Mapping[str, Ids | RaggedIds], weights: Mapping[str, Any] | None = None
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Vectors of row ids.

        Args:
            ids: per field. One id a sample (`categorical`, `numeric`): whole numbers `[B]`. `multi`: either a tuple
                (values `[L]`, offsets `[B + 1]`; sample i has `values[offsets[i]:offsets[i + 1]]`), or a list of B
                lists. Id -1 is none: its vector is zeros, and it does not count in a mean.
            weights: per field, for some of them: finite numbers `[L]`, one an id, which vectors are multiplied by
                before they are added up. A mean is still divided by the number of ids.

        Returns:
            Per field float32 `[B, D]`, what the model works with: ids that share rows are composed, bags pooled as the
            field says (an empty one gives zeros), and narrow vectors projected.

        Raises:
            ValueError: names the field and the id that is out of range, or what is wrong with the shapes.
        """
        weights = weights or {}
        if unknown := weights.keys() - ids.keys():
            raise ValueError(f"weights of field {min(unknown)!r}: there are no ids of it")
        bags = {name: self._bags(self._field(name), value, weights.get(name)) for name, value in ids.items()}
        found = self._pooled({name: own for name, own in bags.items() if self.fields[name].composition is None})
        for name, own in bags.items():
            if self.fields[name].composition is not None:
                found[name] = pool(self._composed(self.fields[name], own.ids_L), own)
        return {name: self._projected(self.fields[name], found[name]) for name in bags}

    def rows(self, field: str, keys: Any) -> npt.NDArray[np.int64]:
        """Ids `[L]` of raw keys, for `embed`; keys that a vocabulary does not know get the field's OOV id.

        Args:
            field: name of the field.
            keys: `[L]` values as the data has them: texts or numbers, None for a missing one.

        Raises:
            ValueError: names the field, and why a key cannot be one of its keys.
        """
        entry = self._field(field)
        if entry.encoding == "id":
            found = _whole_numbers(keys, "ids", field)
            _check_range(found, 0, self._ids(entry), field)
            return found.astype(np.int64, copy=False)
        if entry.encoding == "log_bucket":
            return self._vocabularies[field].rows(log_buckets(keys, field), field)
        if entry.encoding == "hash":
            hashes = hash_keys(texts(keys, field))
            return (hashes % np.uint64(self._ids(entry))).astype(np.int64)
        vocabulary = self._vocabularies[field]
        if vocabulary.form == "int64" and isinstance(keys, np.ndarray) and keys.dtype.kind in "iu":
            return vocabulary.rows(keys, field)
        return vocabulary.rows(texts(keys, field), field)

    def lookup(self, field: str, keys: Any) -> npt.NDArray[np.float32]:
        """The vector `[L, D]` of each raw key, before pooling and projection: 0 in the columns that were pruned.

        Args:
            field: name of the field.
            keys: as for `rows`.

        Raises:
            ValueError: as `rows`.
        """
        entry, rows_L = self._field(field), self.rows(field, keys)
        if entry.composition is not None:
            return self._composed(entry, rows_L)
        return self._tables[entry.table].lookup(rows_L)

    def ids(self, columns: Any) -> dict[str, Any]:
        """Ids of raw columns, for `embed`.

        Args:
            columns: a pyarrow Table, or a mapping of column names to arrays or lists, all `[B]`; those that no field
                reads are ignored. `multi` columns hold lists of keys, or texts with the field's separator between them.

        Raises:
            ValueError: names the column that is missing, or the field and the value that is none of its.
        """
        return {name: raw.ids(field, raw.column_of(columns, field), self.rows) for name, field in self.fields.items()}

    def score(self, columns: Any) -> npt.NDArray[np.float32]:
        """Probability `[B]` of the label 1 for each sample, as the trained model gives it.

        Args:
            columns: of raw values, as for `ids`, those of the numeric inputs among them.

        Raises:
            ValueError: as `ids`; also if the export has no ONNX graph, or ONNX Runtime is not installed.
        """
        ids = self.ids(columns)
        return self.score_vectors(self.embed(ids), self.numeric(columns, raw.samples_of(ids)))

    def numeric(self, columns: Any, samples: int) -> npt.NDArray[np.float32]:
        """Numeric inputs `[B, N]` of raw columns, for `score_vectors`.

        Args:
            columns: as for `ids`.
            samples: B.

        Raises:
            ValueError: names the column that is missing, or has no B finite numbers.
        """
        return raw.numeric(self.manifest.numeric, columns, samples)

    def score_vectors(
        self, vectors: Mapping[str, npt.NDArray[np.float32]], numeric_BN: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Scores `[B]` of what `embed` gives for all fields, and of numeric inputs `[B, N]`.

        Raises:
            ValueError: if the export has no ONNX graph, or ONNX Runtime is not installed.
        """
        return self._scorer.score(vectors, numeric_BN)

    @property
    def sources(self) -> list[str]:
        """The raw columns that `score` reads, each once."""
        fields, numeric = self.manifest.fields, self.manifest.numeric
        return list(dict.fromkeys([*(field.source for field in fields), *(entry.source for entry in numeric)]))

    @cached_property
    def columns(self) -> dict[str, int]:
        """Columns of each field's vectors, as `embed` gives them."""
        return {
            field.name: self.dense[field.projection].shape[0] if field.projection else self._columns(field)
            for field in self.manifest.fields
        }

    @cached_property
    def _scorer(self) -> Scorer:
        if self.manifest.onnx is None:
            raise ValueError(f"{self.folder}: has no {ONNX}, so it cannot score; the export said why")
        return Scorer(self.folder / ONNX, self.columns, len(self.manifest.numeric))

    def _columns(self, field: manifest.FieldEntry) -> int:
        """Columns of a field's vectors before they are projected."""
        dim = self.tables[field.table].dim
        return field.composition.columns(dim) if field.composition else dim

    def _field(self, name: str) -> manifest.FieldEntry:
        if name not in self.fields:
            near = difflib.get_close_matches(str(name), self.fields, 1) or list(self.fields)[:1]
            raise ValueError(f"field {str(name)[:80]!r} is unknown; did you mean {near[0]!r}?")
        return self.fields[name]

    def _bags(self, field: manifest.FieldEntry, value: Any, weights: Any) -> Bags:
        offsets = None
        if field.kind != "multi":
            ids_L = _whole_numbers(value, "ids", field.name)
        elif isinstance(value, tuple):
            if len(value) != 2:
                raise ValueError(f"field {field.name}: a tuple must be (values, offsets), got {len(value)} members")
            ids_L = _whole_numbers(value[0], "ids", field.name)
            offsets = _checked_offsets(value[1], len(ids_L), field.name)
        else:
            ids_L, offsets = _joined(value, field.name)
        # The core checks the ids of its tables as it reads them; as int64, in which the largest would be negative.
        if field.composition is not None or binding.library() is None or ids_L.dtype == np.uint64:
            _check_range(ids_L, -1, self._ids(field), field.name)
        weights_L = None if weights is None else _checked_weights(weights, len(ids_L), field.name)
        ids_L = np.ascontiguousarray(ids_L, np.int64)
        return Bags(self._tables[field.table], ids_L, offsets, weights_L, field.pooling == "mean")

    def _pooled(self, bags: Mapping[str, Bags]) -> dict[str, npt.NDArray[np.float32]]:
        if binding.library() is None:
            return {name: pooled(own) for name, own in bags.items()}
        found: dict[str, npt.NDArray[np.float32]] = {}
        for samples in {own.samples for own in bags.values()}:
            names = [name for name, own in bags.items() if own.samples == samples]
            try:
                found |= zip(names, binding.pooled([bags[name] for name in names]), strict=True)
            except binding.OutsideError as error:
                field = self.fields[names[error.bags]]
                raise _outside(bags[field.name].ids_L, error.position, self._ids(field), field.name) from None
        return found

    def _ids(self, field: manifest.FieldEntry) -> int:
        return field.ids(self.tables[field.table].rows)

    def _composed(self, field: manifest.FieldEntry, ids_L: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        assert field.composition is not None
        lookup = self._tables[field.table].lookup
        found_LD = field.composition.vectors(np.maximum(ids_L, 0), lookup, self.dense)
        found_LD[ids_L < 0] = 0
        return found_LD

    def _projected(self, field: manifest.FieldEntry, pooled_BD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if field.projection is None:
            return pooled_BD
        projected: npt.NDArray[np.float32] = pooled_BD @ self.dense[field.projection].T
        return projected

    def _check_projection(self, field: manifest.FieldEntry, at: str) -> None:
        """A projection is an array of the dense part that takes the field's vectors."""
        columns = self._columns(field)
        array = self.dense.get(field.projection or "")
        if array is None or array.ndim != 2 or array.shape[1] != columns or array.dtype != np.float32:
            found = "is not there" if array is None else f"is {array.dtype} {array.shape}"
            raise ValueError(
                f"{at}.projection: {str(field.projection)[:80]!r} {found}, must be a float32 array (D, {columns}) of "
                "the dense part"
            )


def _whole_numbers(value: Any, what: str, field: str) -> npt.NDArray[np.int64]:
    array = np.asarray(value)
    if array.size == 0:
        array = array.astype(np.int64)  # an empty list comes as floats
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"field {field}: {what} must be one row of whole numbers, got {array.dtype} of shape {array.shape}"
        )
    return array


def _check_range(ids_L: npt.NDArray[np.integer[Any]], low: int, ids: int, field: str) -> None:
    outside = (ids_L < low) | (ids_L >= ids)
    if outside.any():
        raise _outside(ids_L, int(outside.argmax()), ids, field)


def _outside(ids_L: npt.NDArray[np.integer[Any]], position: int, ids: int, field: str) -> ValueError:
    return ValueError(f"field {field}: id {ids_L[position]} at position {position} is outside the field's {ids} ids")


def _checked_weights(value: Any, ids: int, field: str) -> npt.NDArray[np.float32]:
    try:
        weights_L = np.ascontiguousarray(value, np.float32)
    except (TypeError, ValueError):
        weights_L = np.empty((0, 0), np.float32)
    if weights_L.shape != (ids,) or not np.isfinite(weights_L).all():
        raise ValueError(f"field {field}: weights must be one row of {ids} finite numbers, one for each id")
    return weights_L


def _checked_offsets(value: Any, ids: int, field: str) -> npt.NDArray[np.int64]:
    offsets = np.ascontiguousarray(_whole_numbers(value, "offsets", field), np.int64)
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != ids or (np.diff(offsets) < 0).any():
        raise ValueError(f"field {field}: offsets must rise from 0 to the number of ids, {ids}, one more than samples")
    return offsets


def _joined(bags: Iterable[Any], field: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    arrays = [_whole_numbers(bag, "the ids of a bag", field) for bag in bags]
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return np.concatenate([np.empty(0, np.int64), *arrays]), offsets


def _arrays(folder: Path, file: manifest.FileEntry, verify: bool) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a file, mapped, after its size and hash were checked."""
    return safetensors_file.parse(_mapped(folder, file, verify), str(folder / file.path))


def _mapped(folder: Path, file: manifest.FileEntry, verify: bool) -> mmap.mmap:
    """A file, mapped, after its size and hash were checked."""
    path = folder / file.path
    mapped = safetensors_file.map_file(path)
    if len(mapped) != file.bytes:
        raise ValueError(f"{path}: has {len(mapped)} bytes, the manifest says {file.bytes}")
    if verify and hashlib.sha256(mapped).hexdigest() != file.sha256:
        raise ValueError(f"{path}: does not have the SHA-256 of the manifest: it was changed after it was written")
    return mapped


def _table(folder: Path, entry: manifest.TableEntry, verify: bool) -> Table:
    where = f"{folder / entry.file.path}: table {entry.name}"
    arrays = _arrays(folder, entry.file, verify)
    return binding.table_of(arrays, Shape(entry.layout, entry.dtype, entry.rows, entry.dim, entry.kept), where)
