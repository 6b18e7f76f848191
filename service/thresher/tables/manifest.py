"""`manifest.json`: what a folder of compact tables holds, down to each file's bytes and SHA-256.

The manifest counts itself: `manifest_bytes` is its own size, and `manifest_sha256` the SHA-256 of its own bytes with
these 64 digits replaced by zeros. Reading accepts exactly the members that writing makes, each within its limits.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import numpy as np

from thresher.budget import Budget, check_budget
from thresher.tables import strict_json
from thresher.tables.composition import Composition, composition_entry
from thresher.tables.format import (
    DENSE,
    FORMAT,
    LAYOUTS,
    MANIFEST,
    MAX_DIM,
    MAX_ROWS,
    NAME,
    ONNX,
    Layout,
    table_path,
    vocabulary_path,
)
from thresher.tables.keys import DEFINITIONS, NUMERIC
from thresher.tables.values import STORED, Dtype

MAX_BYTES = 16 * 2**20
_ZEROS = "0" * 64
_SHA256 = re.compile(r"[0-9a-f]{64}")

Kind = Literal["categorical", "multi", "numeric"]
Pooling = Literal["sum", "mean"]
Encoding = Literal["vocabulary", "hash", "log_bucket", "id"]


@dataclass(frozen=True)
class FileEntry:
    """A file: path inside the folder, size, SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TableEntry:
    """A table: `rows` x `dim`, of which `kept` parameters stayed."""

    name: str
    rows: int
    dim: int
    kept: int
    layout: Layout
    dtype: Dtype
    file: FileEntry


@dataclass(frozen=True)
class VocabularyEntry:
    """A field's vocabulary: form and number of its keys."""

    form: Literal["utf8", "int64"]
    keys: int
    file: FileEntry


@dataclass(frozen=True)
class FieldEntry:
    """A field: its table, how a sample's vectors are combined, and how raw keys become ids.

    `definition` names the function that `hash` and `log_bucket` apply to a raw key; `oov_row` is the id of unknown
    keys, where there is one. `composition` says how ids share rows, where they do not have one each; `projection` is
    the array of the dense part that the pooled vector is multiplied by. `column` is where the data have the raw values,
    where it is not the field's name; `separator` stands between the keys of a bag that is one text.
    """

    name: str
    table: str
    kind: Kind
    pooling: Pooling
    encoding: Encoding
    definition: str | None
    oov_row: int | None
    vocabulary: VocabularyEntry | None
    composition: Composition | None = None
    projection: str | None = None
    column: str | None = None
    separator: str | None = None

    @property
    def source(self) -> str:
        """The column of its raw values."""
        return self.column or self.name

    def ids(self, rows: int) -> int:
        """How many ids there are, where the table has so many rows."""
        return self.composition.ids if self.composition else rows


@dataclass(frozen=True)
class NumericEntry:
    """A numeric input: `definition` names the function that makes it of a raw number; `column` as of a field."""

    name: str
    column: str | None
    definition: str = NUMERIC

    @property
    def source(self) -> str:
        """The column of its raw numbers."""
        return self.column or self.name


@dataclass(frozen=True)
class Manifest:
    """Everything `manifest.json` says. Order of fields is the model's."""

    model: str
    seed: int
    budget: Budget | None
    spec_fingerprint: str
    tables: tuple[TableEntry, ...]
    fields: tuple[FieldEntry, ...]
    dense: FileEntry
    numeric: tuple[NumericEntry, ...] = ()
    onnx: FileEntry | None = None
    manifest_bytes: int = 0
    manifest_sha256: str = _ZEROS

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables' files: masks, values and their headers."""
        return sum(table.file.bytes for table in self.tables)

    @property
    def vocabulary_bytes(self) -> int:
        """Bytes of the vocabularies' files."""
        return sum(field.vocabulary.file.bytes for field in self.fields if field.vocabulary)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense part's files: weights and graph."""
        return self.dense.bytes + (self.onnx.bytes if self.onnx else 0)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, the manifest included."""
        return self.table_bytes + self.vocabulary_bytes + self.dense_bytes + self.manifest_bytes

    def files(self) -> list[FileEntry]:
        """All files but the manifest."""
        vocabularies = [field.vocabulary.file for field in self.fields if field.vocabulary]
        graph = [self.onnx] if self.onnx else []
        return [*(table.file for table in self.tables), *vocabularies, self.dense, *graph]


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest as it stands on disk, with its own size and SHA-256 filled in.

    Raises:
        ValueError: if it grows beyond what a reader accepts.
    """
    manifest = replace(manifest, manifest_bytes=0, manifest_sha256=_ZEROS)
    text = _dump(manifest)
    # The size never falls when the number in it grows: counting up from 0 ends at a size that counts itself.
    while len(text) != manifest.manifest_bytes:
        manifest = replace(manifest, manifest_bytes=len(text))
        text = _dump(manifest)
    if len(text) > MAX_BYTES:
        raise ValueError(f"{MANIFEST}: {len(text)} bytes, at most {MAX_BYTES} are read: too many tables or fields")
    return _dump(replace(manifest, manifest_sha256=hashlib.sha256(text).hexdigest()))


def _dump(manifest: Manifest) -> bytes:
    members = asdict(manifest)
    tables, fields = members.pop("tables"), members.pop("fields")
    totals = {name: getattr(manifest, name) for name in _TOTALS}
    return (
        json.dumps(
            {
                "format": FORMAT,
                "model": members["model"],
                "seed": members["seed"],
                "budget": members["budget"],
                "spec_fingerprint": members["spec_fingerprint"],
                **totals,
                "tables": list(tables),
                "fields": list(fields),
                "numeric": list(members["numeric"]),
                "dense": members["dense"],
                "onnx": members["onnx"],
                "manifest_sha256": members["manifest_sha256"],
            },
            indent=1,
            allow_nan=False,
        )
        + "\n"
    ).encode()


_TOTALS = ("table_bytes", "vocabulary_bytes", "dense_bytes", "manifest_bytes", "total_bytes")


def from_bytes(data: bytes, where: str, *, verify: bool) -> Manifest:
    """Read a manifest and check every member of it.

    Args:
        data: the file.
        where: the file, as errors name it.
        verify: check `manifest_sha256` too.

    Raises:
        ValueError: names the file, the member and the problem.
    """
    value = strict_json.loads(data, where)
    check = Checker(where)
    if isinstance(value, dict) and check.whole(value.get("format"), "format", 1) != FORMAT:
        raise ValueError(f"{where}: format {value['format']}: this reader knows format {FORMAT}; use a newer one")
    names = ["format", "model", "seed", "budget", "spec_fingerprint", *_TOTALS]
    top = check.members(value, "", [*names, "tables", "fields", "numeric", "dense", "onnx", "manifest_sha256"])
    digest = check.sha256(top["manifest_sha256"], "manifest_sha256")
    if verify and hashlib.sha256(data.replace(digest.encode(), _ZEROS.encode())).hexdigest() != digest:
        raise ValueError(f"{where}: does not have its own manifest_sha256: the file was changed after it was written")
    tables = tuple(
        table_entry(check, item, f"tables[{i}]") for i, item in enumerate(check.items(top["tables"], "tables"))
    )
    check.unique((table.name for table in tables), "tables")
    rows = {table.name: table.rows for table in tables}
    fields = tuple(
        field_entry(check, item, f"fields[{i}]", rows) for i, item in enumerate(check.items(top["fields"], "fields"))
    )
    numeric = tuple(
        _numeric(check, item, f"numeric[{i}]") for i, item in enumerate(check.listed(top["numeric"], "numeric"))
    )
    check.unique((field.name for field in fields), "fields")
    check.unique([*(field.name for field in fields), *(entry.name for entry in numeric)], "numeric")
    manifest = Manifest(
        model=check.text(top["model"], "model"),
        seed=check.whole(top["seed"], "seed", 0, 2**63 - 1),
        budget=check.budget(top["budget"], "budget"),
        spec_fingerprint=check.sha256(top["spec_fingerprint"], "spec_fingerprint"),
        tables=tables,
        fields=fields,
        dense=_file(check, top["dense"], "dense", DENSE),
        numeric=numeric,
        onnx=None if top["onnx"] is None else _file(check, top["onnx"], "onnx", ONNX),
        manifest_bytes=len(data),
        manifest_sha256=digest,
    )
    for name in _TOTALS:
        if (declared := check.whole(top[name], name, 0)) != (actual := getattr(manifest, name)):
            raise ValueError(f"{where}: {name}: says {declared}, counted {actual}")
    return manifest


def table_entry(check: Checker, value: Any, at: str) -> TableEntry:
    """A table's member of the manifest, checked.

    Raises:
        ValueError: names the member and what it must be.
    """
    member = check.members(value, at, ["name", "rows", "dim", "kept", "layout", "dtype", "file"])
    name = check.name(member["name"], f"{at}.name")
    rows = check.whole(member["rows"], f"{at}.rows", 1, MAX_ROWS)
    dim = check.whole(member["dim"], f"{at}.dim", 1, MAX_DIM)
    return TableEntry(
        name=name,
        rows=rows,
        dim=dim,
        kept=check.whole(member["kept"], f"{at}.kept", 0, rows * dim),
        layout=cast(Layout, check.one_of(member["layout"], f"{at}.layout", LAYOUTS)),
        dtype=check.dtype(member["dtype"], f"{at}.dtype"),
        file=_file(check, member["file"], f"{at}.file", table_path(name)),
    )


def field_entry(check: Checker, value: Any, at: str, rows: dict[str, int]) -> FieldEntry:
    """A field's member of the manifest, checked; `rows` are those of the tables it may use.

    Raises:
        ValueError: names the member and what it must be.
    """
    names = ["name", "table", "kind", "pooling", "encoding", "definition", "oov_row", "vocabulary", "composition"]
    member = check.members(value, at, [*names, "projection", "column", "separator"])
    name = check.name(member["name"], f"{at}.name")
    table = check.one_of(member["table"], f"{at}.table", rows)
    definition = member["definition"]
    oov_row = member["oov_row"]
    vocabulary = member["vocabulary"]
    encoding = check.one_of(member["encoding"], f"{at}.encoding", ("vocabulary", "hash", "log_bucket", "id"))
    if definition != DEFINITIONS.get(encoding):
        raise check.fail(f"{at}.definition", f"{DEFINITIONS.get(encoding)} for encoding {encoding}", definition)
    listed = encoding in ("vocabulary", "log_bucket")
    if not listed and (vocabulary is not None or oov_row is not None):
        raise ValueError(f"{check.where}: {at}: encoding {encoding} has no vocabulary and no oov_row")
    if listed and (vocabulary is None or oov_row is None):
        raise ValueError(f"{check.where}: {at}: encoding {encoding} needs a vocabulary and an oov_row")
    composition, projection = member["composition"], member["projection"]
    if composition is not None:
        composition = composition_entry(check, composition, f"{at}.composition", rows[table])
    ids = composition.ids if composition else rows[table]
    return FieldEntry(
        name=name,
        table=table,
        kind=cast(Kind, check.one_of(member["kind"], f"{at}.kind", ("categorical", "multi", "numeric"))),
        pooling=cast(Pooling, check.one_of(member["pooling"], f"{at}.pooling", ("sum", "mean"))),
        encoding=cast(Encoding, encoding),
        definition=definition,
        oov_row=None if oov_row is None else check.whole(oov_row, f"{at}.oov_row", 0, ids - 1),
        vocabulary=None if vocabulary is None else _vocabulary(check, vocabulary, at, name, ids),
        composition=composition,
        projection=None if projection is None else check.text(projection, f"{at}.projection"),
        column=None if member["column"] is None else check.text(member["column"], f"{at}.column"),
        separator=_separator(check, member["separator"], member["kind"], f"{at}.separator"),
    )


def _separator(check: Checker, value: Any, kind: str, at: str) -> str | None:
    if value is not None and (not isinstance(value, str) or len(value) != 1 or kind != "multi"):
        raise check.fail(at, "null, or for kind multi one character", value)
    return value


def _numeric(check: Checker, value: Any, at: str) -> NumericEntry:
    member = check.members(value, at, ["name", "column", "definition"])
    return NumericEntry(
        check.name(member["name"], f"{at}.name"),
        None if member["column"] is None else check.text(member["column"], f"{at}.column"),
        check.one_of(member["definition"], f"{at}.definition", (NUMERIC,)),
    )


def _vocabulary(check: Checker, value: Any, at: str, field: str, ids: int) -> VocabularyEntry:
    at = f"{at}.vocabulary"
    member = check.members(value, at, ["form", "keys", "file"])
    return VocabularyEntry(
        form=cast(Literal["utf8", "int64"], check.one_of(member["form"], f"{at}.form", ("utf8", "int64"))),
        keys=check.whole(member["keys"], f"{at}.keys", 0, ids - 1),
        file=_file(check, member["file"], f"{at}.file", vocabulary_path(field)),
    )


def _file(check: Checker, value: Any, at: str, path: str) -> FileEntry:
    member = check.members(value, at, ["path", "bytes", "sha256"])
    if member["path"] != path:
        raise ValueError(f"{check.where}: {at}.path: must be {path!r}, not {str(member['path'])[:200]!r}")
    return FileEntry(
        path, check.whole(member["bytes"], f"{at}.bytes", 1, 2**62), check.sha256(member["sha256"], f"{at}.sha256")
    )


@dataclass(frozen=True)
class Checker:
    """Takes members out of JSON; raises ValueError that says where one stands and what it must be."""

    where: str

    def fail(self, at: str, must: str, value: Any) -> ValueError:
        """The error for a member that is not what it must be."""
        return ValueError(f"{self.where}: {at or 'top level'}: must be {must}, not {str(value)[:80]!r}")

    def members(self, value: Any, at: str, names: list[str]) -> dict[str, Any]:
        """An object with exactly these members."""
        if not isinstance(value, dict):
            raise self.fail(at, "an object", value)
        for name in names:
            if name not in value:
                raise ValueError(f"{self.where}: {at or 'top level'}: {name} is missing")
        if extra := value.keys() - set(names):
            raise ValueError(f"{self.where}: {at or 'top level'}: unknown member {min(extra)[:80]!r}")
        return value

    def listed(self, value: Any, at: str) -> list[Any]:
        """A list."""
        if not isinstance(value, list):
            raise self.fail(at, "a list", value)
        return value

    def items(self, value: Any, at: str) -> list[Any]:
        """A list that is not empty."""
        if not isinstance(value, list) or not value:
            raise self.fail(at, "a list with at least one entry", value)
        return value

    def whole(self, value: Any, at: str, low: int, high: int = 2**62) -> int:
        """A whole number within limits."""
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)  # numpy's from writers
        if not whole or not low <= value <= high:
            raise self.fail(at, f"a whole number from {low} to {high}", value)
        return int(value)

    def text(self, value: Any, at: str) -> str:
        """A short printable string."""
        if not isinstance(value, str) or not 1 <= len(value) <= 200 or not value.isprintable():
            raise self.fail(at, "a printable string of 1 to 200 characters", value)
        return value

    def name(self, value: Any, at: str) -> str:
        """A name that is safe as a file's."""
        if not isinstance(value, str) or not NAME.fullmatch(value):
            raise self.fail(at, "a letter and up to 62 letters, digits or _", value)
        return value

    def sha256(self, value: Any, at: str) -> str:
        """A SHA-256 in hexadecimal."""
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise self.fail(at, "64 hexadecimal digits", value)
        return value

    def one_of(self, value: Any, at: str, choices: Collection[str]) -> str:
        """One of some strings."""
        if not isinstance(value, str) or value not in choices:
            shown = ", ".join(list(choices)[:5]) + (", …" if len(choices) > 5 else "")
            raise self.fail(at, f"one of {shown}", value)
        return value

    def dtype(self, value: Any, at: str) -> Dtype:
        """A type of values."""
        return cast(Dtype, self.one_of(value, at, STORED))

    def budget(self, value: Any, at: str) -> Budget | None:
        """A share or count of parameters, a text with bytes, or nothing."""
        if value is None:
            return None
        try:
            if type(value) not in (int, float, str) or value == math.inf:
                raise ValueError
            check_budget(value)
        except ValueError:
            raise self.fail(at, 'null, a number above 0, or bytes such as "12MB"', value) from None
        return cast(Budget, value)

    def unique(self, names: Iterable[str], at: str) -> None:
        """Names of which none repeats."""
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise ValueError(f"{self.where}: {at}: {name!r} stands there twice")
            seen.add(name)
