"""A scheme: for every table, exactly the parameters that stay. After it is written, no code knows the method.

`scheme.json` has each table's representation and the counts; of a composed table also its partitions. A masked table
may have partitions too: its rows are then those of the buckets. Where single entries stay, `masks.safetensors` has a
bit for every entry: per table a uint8 tensor [N, ⌈D/8⌉], of which bit j mod 8 (from the low end) of byte j div 8 says
whether column j stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from thresher.budget import Budget
from thresher.embedding.double_hash import DoubleHash
from thresher.embedding.partitions import Partitions
from thresher.embedding.path import BucketPath
from thresher.embedding.representation import Composed, Dense, Masked, Representation
from thresher.embedding.separate import Separate
from thresher.embedding.table_plan import FieldTable, TablePlan
from thresher.kernels.layout import Combine
from thresher.methods.shared_rows import composition_of
from thresher.rundir import read_json, write_json
from thresher.tables.composition import Composition
from thresher.tables.format import unpack_masks

SCHEME = "scheme.json"
MASKS = "masks.safetensors"


def save_masks(path: Path, packed: dict[str, NDArray[np.uint8]]) -> None:
    """Write the packed masks of all tables to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(packed, str(path))


@dataclass(frozen=True)
class SchemeMasks:
    """The masks of a scheme, read from its file as they are asked for.

    Attributes:
        path: of the file.
    """

    path: Path

    def packed(self, table: str, first_row: int, rows: int) -> Tensor:
        """Some rows of a table's mask, uint8 [rows, ⌈D/8⌉].

        Raises:
            ValueError: if the file has no such table or rows.
        """
        with safe_open(str(self.path), framework="pt") as file:
            if table not in file.keys():  # noqa: SIM118 - not a dict
                raise ValueError(f"{self.path}: no mask for table {table}; run prune again")
            part = file.get_slice(table)
            total = part.get_shape()[0]
            if first_row + rows > total:
                raise ValueError(
                    f"{self.path}: the mask of {table} has {total} rows, but the table needs {first_row + rows}; run "
                    "prune again on this data and model"
                )
            mask: Tensor = part[first_row : first_row + rows]
            return mask


def describe_masked(packed_NK: NDArray[np.uint8], dim: int, composition: Composition | None) -> dict[str, Any]:
    """What a scheme says of a table of which some entries stay.

    Args:
        packed_NK: the mask of its rows.
        dim: its columns.
        composition: how ids share the rows; none where each has its own.
    """
    kept_ND = unpack_masks(packed_NK, dim)
    by_row = kept_ND.sum(1)
    shared = (
        {"ids": composition.ids, "combine": composition.combine, "partitions": composition.as_json()["partitions"]}
        if composition
        else {}
    )
    return {
        "representation": "masked",
        "rows": len(kept_ND),
        "dim": dim,
        "columns": dim,
        "kept": int(by_row.sum()),
        "rows_kept": int((by_row > 0).sum()),
        "kept_per_column": kept_ND.sum(0).tolist(),
        "rows_by_kept": np.bincount(by_row, minlength=dim + 1).tolist(),
        **shared,
    }


def describe_narrow(rows: int, columns: int, dim: int) -> dict[str, Any]:
    """What a scheme says of a table that gets fewer than the uniform `dim` columns; with 0 its field is left out."""
    by_kept = [0] * (dim + 1)
    by_kept[columns] = rows
    return {
        "representation": "narrow",
        "rows": rows,
        "dim": dim,
        "columns": columns,
        "kept": rows * columns,
        "rows_kept": rows if columns else 0,
        "kept_per_column": [rows] * columns + [0] * (dim - columns),
        "rows_by_kept": by_kept,
    }


def describe_shared(name: str, rows: int, table: FieldTable) -> dict[str, Any]:
    """What a scheme says of a table whose ids share the rows of buckets."""
    composition, own = composition_of(table, name, rows), table.outside
    assert composition is not None
    return {
        "representation": "composed",
        "rows": rows,
        "dim": table.dim,
        "columns": table.dim,
        "kept": table.params(name, rows),
        "combine": composition.combine,
        "partitions": [list(split) for split in composition.partitions],
        "own": composition.own,
        "hidden": own.hidden if isinstance(own, BucketPath) else None,
        "mean": own.mean if isinstance(own, BucketPath | DoubleHash) else None,
    }


def describe(
    budget: Budget, method: str, tables: dict[str, dict[str, Any]], dim: int, total_params: int, wanted: int, why: str
) -> dict[str, Any]:
    """A scheme in the form of `scheme.json`.

    Args:
        budget: as the user gave it.
        method: that made it.
        tables: what it says of each, by field.
        dim: columns of the model's vectors.
        total_params: of the uniform model's tables.
        wanted: parameters that the budget allows.
        why: what keeps the method from using exactly as many; empty if it does.
    """
    return {
        "budget": budget,
        "method": method,
        "dim": dim,
        "kept_params": sum(table["kept"] for table in tables.values()),
        "total_params": total_params,
        "wanted_params": wanted,
        "why_not_exact": why,
        "tables": tables,
    }


def table_plan(folder: Path) -> TablePlan:
    """The tables of a scheme, as a model is built from them."""
    scheme = read_scheme(folder)
    tables = {name: table for name, table in scheme["tables"].items() if table["columns"]}
    masked = Masked(SchemeMasks(folder / MASKS))
    entries = {name: masked if table["representation"] == "masked" else Dense() for name, table in tables.items()}
    outside = {name: _outside(table) for name, table in tables.items()}
    composed = _composed(
        {name: table for name, table in tables.items() if "combine" in table and outside[name] is None}, entries
    )
    fields = {
        name: FieldTable(table["columns"], composed.get(name, entries[name]), outside[name])
        for name, table in tables.items()
    }
    return TablePlan(scheme["dim"], fields)


def _outside(table: Mapping[str, Any]) -> Separate | DoubleHash | BucketPath | None:
    """What is done with the ids of a table that share rows outside of the collection."""
    if table["representation"] != "composed":
        return None
    if table["own"] is not None:
        ((_, hashed),) = table["partitions"]
        return DoubleHash(table["own"], hashed, table["mean"])
    if table["combine"] == "feature":
        return Separate(_partitions(table))
    return BucketPath(_partitions(table), table["hidden"], table["mean"]) if table["combine"] == "path" else None


def _partitions(table: Mapping[str, Any]) -> Partitions:
    return Partitions(tuple((divisor, modulus) for divisor, modulus in table["partitions"]))


def _composed(
    tables: Mapping[str, Mapping[str, Any]], entries: Mapping[str, Dense | Masked]
) -> dict[str, Representation]:
    """The representations of tables that are composed in the collection, one for all that combine alike."""
    groups: dict[tuple[str, Dense | Masked], dict[str, Partitions]] = {}
    for name, table in tables.items():
        groups.setdefault((table["combine"], entries[name]), {})[name] = _partitions(table)
    found: dict[str, Representation] = {}
    for (combine, own), partitions in groups.items():
        found |= dict.fromkeys(partitions, Composed(partitions, Combine[combine.upper()], own))
    return found


def write_scheme(folder: Path, scheme: dict[str, Any], packed: dict[str, NDArray[np.uint8]] | None) -> None:
    """Write the files of a scheme; that of the masks where it has any."""
    if packed is not None:
        save_masks(folder / MASKS, packed)
    write_json(folder / SCHEME, scheme)


def read_scheme(folder: Path) -> dict[str, Any]:
    """The counts of a scheme.

    Raises:
        ValueError: if there is none.
    """
    if not (folder / SCHEME).is_file():
        raise ValueError(f"{folder / SCHEME}: not there; run prune first")
    scheme: dict[str, Any] = read_json(folder / SCHEME)
    return scheme
