"""Bytes that serving needs, before anything is exported: what a budget in bytes allows.

Files of tables, vocabularies and the dense part are counted to the byte. The manifest, whose length depends on what the
others hold, is counted with more digits than its numbers will have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.budget import Budget, budget_bytes, budget_params
from thresher.data.vocabulary import read_keys
from thresher.embedding.table_plan import TablePlan, projection_name
from thresher.methods.compositional import check_pruned
from thresher.methods.shared_rows import composition_of
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.tables import vocabulary
from thresher.tables.format import (
    DENSE,
    ONNX,
    Layout,
    choose_layout,
    mask_bytes,
    rows_by_kept,
    table_file_bytes,
    table_path,
    vocabulary_path,
)
from thresher.tables.keys import DEFINITIONS
from thresher.tables.manifest import (
    FieldEntry,
    FileEntry,
    Manifest,
    NumericEntry,
    TableEntry,
    VocabularyEntry,
    to_bytes,
)
from thresher.tables.safetensors_file import header
from thresher.tables.values import value_bytes
from thresher.train.build import dense_graph, dense_part

_LONG = "c" * 64  # a name of a column longer than most
_LARGE = FileEntry("", 10**15, "0" * 64)  # a petabyte: more digits than any file here needs


class ServingBytes:
    """Counts the bytes of a model's tables and of what is beside them.

    Args:
        spec: the job.
        meta: what `prepare` found in the data.
        run_dir: of the job, for the vocabularies.

    Attributes:
        rows: ids of each field.
    """

    def __init__(self, spec: Spec, meta: Mapping[str, Any], run_dir: RunDir) -> None:
        self._spec = spec
        self._meta = meta
        self._run_dir = run_dir
        self.rows = {field["name"]: field["rows"] for field in meta["fields"]}
        self._graphs: dict[tuple[str, ...], int] = {}

    @cached_property
    def _vocabularies(self) -> dict[str, int]:
        """Bytes of each field's vocabulary, found by writing it: only budgets in bytes ask for it."""
        return {name: _vocabulary_bytes(self._vocabulary(name)) for name in self.rows}

    def _vocabulary(self, field: str) -> Path:
        return self._run_dir.data / "vocabulary" / f"{field}.parquet"

    def masked_params(self, budget: Budget, plan: TablePlan) -> int:
        """Entries that may stay of tables of which single entries do.

        A budget in bytes has room for so many wherever they are. Rows that keep nothing leave room for more, which
        `masked` counts once there are masks.

        Args:
            budget: as the user gave it.
            plan: the tables before anything is pruned.

        Raises:
            ValueError: if the budget allows none, or more than there are.
        """
        dtype, wanted = self._spec.export.dtype, self._spec.export.layout
        shapes = [table.shape(name, self.rows[name]) for name, table in plan.fields.items()]
        if wanted == "dense" and budget_bytes(budget) is not None:
            raise ValueError(
                f"prune.budgets: {budget} cannot be met with export.layout dense, which has room for what is pruned; "
                "take layout auto"
            )
        # Of the layouts that auto chooses from, the one whose size depends least on where zeros are.
        layout: Layout = "bucketed" if wanted == "bucketed" else "bitmap"

        @cache
        def fixed() -> int:
            # As if every row kept something, and had a mask. 24: digits of sizes in a header.
            empty = sum(table_file_bytes(layout, dtype, dim, [rows] + [0] * dim) + 24 for rows, dim in shapes)
            return self.beside_tables(plan) + empty + sum(rows * mask_bytes(dim) for rows, dim in shapes)

        params = self.params_within(budget, lambda params: fixed() + value_bytes(dtype, params))
        check_pruned(budget, params, plan.params(self.rows), self._spec.search)
        return params

    def masked(self, plan: TablePlan, masks: Mapping[str, NDArray[np.uint8]]) -> int:
        """Bytes of all that serving needs of tables of which some entries stay, or some digits more.

        It writes the vocabularies of fields that lose keys, to know their size: seconds for a million keys.

        Args:
            plan: the tables before anything is pruned.
            masks: packed, of each table [N, ⌈D/8⌉].
        """
        export, total = self._spec.export, self._beside_keys(plan)
        for name, table in plan.fields.items():
            dim = table.shape(name, self.rows[name])[1]
            by_kept = rows_by_kept(masks[name], dim)
            renumber = self._vocabularies[name] > 0 and not table.is_shared
            layout = choose_layout(export.layout, export.dtype, dim, by_kept, renumber)
            total += table_file_bytes(layout, export.dtype, dim, by_kept)
            kept_N = masks[name].max(axis=1) > 0
            if table.is_shared or kept_N[0] or not self._vocabularies[name]:
                total += self._vocabularies[name]
            else:  # where unknown keys get zeros, keys of zeros need not be known
                total += _vocabulary_bytes(self._vocabulary(name), kept_N[1:])
        return total

    def params_within(self, budget: Budget, bytes_of: Callable[[int], int]) -> int:
        """Parameters that a budget allows.

        Args:
            budget: as the user gave it.
            bytes_of: bytes of all that serving needs with a number of parameters; does not fall.

        Raises:
            ValueError: if the budget allows none, or more than there are.
        """
        total_params = sum(self.rows.values()) * self._spec.model.dim
        wanted = budget_bytes(budget)
        if wanted is None:
            assert not isinstance(budget, str)
            return budget_params(budget, total_params)
        if bytes_of(1) > wanted:
            raise ValueError(
                f"prune.budgets: {budget} is less than the {bytes_of(1):,} bytes that serving needs at least: masks, "
                "vocabularies, dense part, manifest; raise it, or make the dense part or the vocabularies smaller"
            )
        low, high = 1, total_params
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if bytes_of(middle) <= wanted else (low, middle - 1)
        return low

    def unmasked(self, plan: TablePlan) -> int:
        """Bytes of all that serving needs of tables that keep all they have."""
        dtype, wanted = self._spec.export.dtype, self._spec.export.layout
        sizes = [table.shape(name, self.rows[name]) for name, table in plan.fields.items()]
        layout = "dense" if wanted == "auto" else wanted
        tables = sum(table_file_bytes(layout, dtype, dim, [0] * dim + [rows]) for rows, dim in sizes)
        return tables + self.beside_tables(plan)

    def beside_tables(self, plan: TablePlan) -> int:
        """Bytes of vocabularies, dense part and manifest of a model with these tables."""
        return self._beside_keys(plan) + sum(self._vocabularies[name] for name in plan.fields)

    def _beside_keys(self, plan: TablePlan) -> int:
        arrays, fields_at = dense_part(self._spec, self._meta, plan)
        dense = len(header(arrays)[0]) + sum(array.nbytes for array in arrays) + self._graph_bytes(plan, len(arrays))
        return dense + self._manifest_bytes(plan, {array.name for array in arrays}, fields_at)

    def _graph_bytes(self, plan: TablePlan, arrays: int) -> int:
        """Bytes of the ONNX graph, or some more: widths of tables are in it as numbers, whose digits differ."""
        vectors = tuple(plan.vectors)
        if vectors not in self._graphs:
            graph, _ = dense_graph(self._spec, self._meta, plan)
            self._graphs[vectors] = 0 if graph is None else len(graph) + 32 * (arrays + len(vectors))
        return self._graphs[vectors]

    def _manifest_bytes(self, plan: TablePlan, dense: Collection[str], fields_at: str) -> int:
        tables, fields = [], []
        for field in self._meta["fields"]:
            if (name := field["name"]) not in plan.fields:
                continue
            own, encoding = plan.fields[name], field["encoding"]
            rows, columns = own.shape(name, field["rows"])
            file = replace(_LARGE, path=table_path(name))
            dtype = self._spec.export.dtype
            tables.append(TableEntry(name, rows, columns, rows * columns, "bucketed", dtype, file))
            listed = VocabularyEntry("int64", field["rows"], replace(_LARGE, path=vocabulary_path(name)))
            fields.append(
                FieldEntry(
                    name=name,
                    table=name,
                    kind=field["kind"],
                    pooling=field["pooling"],
                    encoding=encoding,
                    definition=DEFINITIONS.get(encoding),
                    oov_row=None if encoding == "hash" else rows - 1,
                    vocabulary=None if encoding == "hash" else listed,
                    composition=composition_of(own, name, field["rows"], fields_at),
                    projection=projection if (projection := projection_name(fields_at, name)) in dense else None,
                    column=_LONG,
                    separator="|" if field["kind"] == "multi" else None,
                )
            )
        manifest = Manifest(
            model="m" * 200,
            seed=self._spec.seed,
            budget="b" * 40,
            spec_fingerprint="0" * 64,
            tables=tuple(tables),
            fields=tuple(fields),
            dense=replace(_LARGE, path=DENSE),
            numeric=tuple(NumericEntry(name, _LONG) for name in self._meta["dense"]),
            onnx=replace(_LARGE, path=ONNX) if self._spec.export.onnx else None,
        )
        return len(to_bytes(manifest))


def _vocabulary_bytes(path: Path, stay: NDArray[np.bool_] | None = None) -> int:
    """Bytes of a vocabulary's file, of all its keys or those that stay; 0 where there is none."""
    keys = read_keys(path)
    if keys is None:
        return 0
    rows = np.arange(1, len(keys) + 1) if stay is None else np.flatnonzero(stay) + 1
    keys = keys[rows - 1] if isinstance(keys, np.ndarray) else [keys[row - 1] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        vocabulary.write(file, keys, rows, path.stem)
        return file.stat().st_size
