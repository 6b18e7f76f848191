"""Bytes that serving needs, before anything is exported: what a budget in bytes allows.

Files of tables, vocabularies and the dense part are counted to the byte. The manifest, whose length depends on what the
others hold, is counted as what it has at most.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from thresher.budget import Budget, budget_bytes, budget_params
from thresher.embedding.table_plan import TablePlan
from thresher.rundir import RunDir
from thresher.spec import Spec
from thresher.tables import vocabulary
from thresher.tables.format import DTYPES, table_file_bytes
from thresher.tables.safetensors_file import TensorSpec, header
from thresher.train.build import dense_shapes

_MANIFEST_BYTES = 1_200  # and for each field and its table:
_MANIFEST_FIELD_BYTES = 900


class ServingBytes:
    """Counts the bytes of a model's tables and of what is beside them.

    Args:
        spec: the job.
        meta: what `prepare` found in the data.
        run_dir: of the job, for the vocabularies.
    """

    def __init__(self, spec: Spec, meta: Mapping[str, Any], run_dir: RunDir) -> None:
        self._spec = spec
        self._meta = meta
        self._rows = {field["name"]: field["rows"] for field in meta["fields"]}
        self._vocabularies = {
            name: _vocabulary_bytes(run_dir.data / "vocabulary" / f"{name}.parquet") for name in self._rows
        }

    def masked_params(self, budget: Budget) -> int:
        """Entries that may stay of tables of which single entries do.

        Raises:
            ValueError: if the budget allows none, or more than there are.
        """
        dim, dtype = self._spec.model.dim, self._spec.export.dtype
        # With bitmaps; the writer takes another layout only where it is smaller. 24: digits of sizes in a header.
        masks = sum(table_file_bytes("bitmap", dtype, n, dim, 0) + 24 for n in self._rows.values())
        fixed = self.beside_tables(TablePlan.uniform(self._rows, dim)) + masks
        return self.params_within(budget, lambda params: fixed + params * DTYPES[dtype].itemsize)

    def params_within(self, budget: Budget, bytes_of: Callable[[int], int]) -> int:
        """Parameters that a budget allows.

        Args:
            budget: as the user gave it.
            bytes_of: bytes of all that serving needs with a number of parameters; does not fall.

        Raises:
            ValueError: if the budget allows none, or more than there are.
        """
        total_params = sum(self._rows.values()) * self._spec.model.dim
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

    def narrow(self, plan: TablePlan) -> int:
        """Bytes of all that serving needs of dense tables."""
        dtype = self._spec.export.dtype
        sizes = [(self._rows[name], table.dim) for name, table in plan.fields.items()]
        tables = sum(table_file_bytes("dense", dtype, rows, dim, rows * dim) for rows, dim in sizes)
        return tables + self.beside_tables(plan)

    def beside_tables(self, plan: TablePlan) -> int:
        """Bytes of vocabularies, dense part and manifest of a model with these tables."""
        shapes = dense_shapes(self._spec, self._meta, plan)
        arrays = [TensorSpec(name, np.dtype("<f4"), shape) for name, shape in shapes.items()]
        dense = len(header(arrays)[0]) + sum(array.nbytes for array in arrays)
        vocabularies = sum(self._vocabularies[name] for name in plan.fields)
        return dense + vocabularies + _MANIFEST_BYTES + _MANIFEST_FIELD_BYTES * len(plan.fields)


def _vocabulary_bytes(path: Path) -> int:
    if not path.is_file():
        return 0
    keys = pq.read_table(path, columns=["key"])["key"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        vocabulary.write(file, keys.to_numpy() if str(keys.type) == "int64" else keys.to_pylist(), path.stem)
        return file.stat().st_size
