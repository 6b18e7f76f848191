"""A finished run directory, read for the report.

Only `metrics.json` has to be there; what else is missing is None or left out, and the page says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from thresher.budget import Budget, budget_name
from thresher.rundir import MARKER, RunDir, read_json
from thresher.spec import Spec
from thresher.tables import manifest as manifest_file
from thresher.tables.format import MANIFEST
from thresher.tables.manifest import Manifest


class MetricsRow(TypedDict):
    """One row of `metrics.json`: a model's result on one split."""

    model: str
    method: str
    budget: Budget | None  # None: the uniform model
    seed: int
    split: str
    auc: float | None
    logloss: float | None
    kept_params: int
    total_params: int
    table_bytes: int
    total_bytes: int
    seconds: float | None


class HistoryPoint(TypedDict):
    """One validation of a training."""

    step: int
    epoch: float
    train_loss: float | None
    validation_auc: float | None
    validation_logloss: float | None


class SearchPoint(TypedDict):
    """One count of what the search keeps."""

    step: int
    kept_fraction: float
    target_fraction: float | None
    pressure: float
    threshold_quantiles: list[float]  # 5, 25, 50, 75, 95 %
    loss: float


class TableScheme(TypedDict):
    """What stays of one table: n rows, d columns. The last three are not there where ids share the rows of buckets."""

    rows: int
    dim: int
    kept: int
    rows_kept: NotRequired[int]
    kept_per_column: NotRequired[list[int]]
    rows_by_kept: NotRequired[list[int]]


class Scheme(TypedDict):
    """What stays under one budget."""

    budget: Budget
    kept_params: int
    total_params: int
    wanted_params: int
    why_not_exact: str
    method: str
    tables: dict[str, TableScheme]


BASELINE = "baseline"


@dataclass(frozen=True)
class Run:
    """What the report reads of a run; budgets are named as in file names, from the largest down."""

    dir: RunDir
    spec: Spec
    rows: dict[str, dict[str, MetricsRow]]  # model ("baseline" or a budget), then split
    meta: dict[str, Any] | None
    found: dict[str, Any]  # what the search says of itself
    search: list[SearchPoint]
    histories: dict[str, list[HistoryPoint]]
    schemes: dict[str, Scheme]
    manifests: dict[str, Manifest]  # of the exported tables, by model
    stage_s: list[tuple[str, float]]

    @property
    def budgets(self) -> list[str]:
        """The budgets that were scored, from the largest down."""
        return [name for name in self.rows if name != BASELINE]

    @property
    def baseline(self) -> dict[str, MetricsRow]:
        """The uniform model's rows, by split."""
        return self.rows.get(BASELINE, {})

    def masks(self, budget: str) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        """Each table's mask under a budget, one at a time: bits `[N, ceil(D / 8)]`. None where there is no file."""
        path = self.dir.scheme(budget) / "masks.safetensors"
        if path.is_file():
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    yield name, file.get_tensor(name)

    def counts(self, field: str) -> npt.NDArray[np.int64] | None:
        """Training occurrences of each row of a field's table, `[N]`."""
        path = self.dir.data / "counts" / f"{field}.npy"
        return np.load(path, allow_pickle=False) if path.is_file() else None


def read(run_dir: Path, spec: Spec) -> Run:
    """Read a run directory.

    Raises:
        ValueError: if there are no metrics, or a file does not hold what it should; names it and the mend.
    """
    files = RunDir(run_dir)
    rows = _metrics(files.metrics)
    models = [BASELINE, *(name for name in rows if name != BASELINE)]
    folders = {name: files.baseline if name == BASELINE else files.model(name) for name in models}
    stages = [("prepare", files.data), ("train", files.baseline), ("search", files.search)]
    stages += [
        (f"{stage} {name}", folder(name))
        for stage, folder in (("prune", files.scheme), ("retrain", files.model), ("export", files.tables))
        for name in models
        if stage == "export" or name != BASELINE
    ]
    return Run(
        dir=files,
        spec=spec,
        rows=rows,
        meta=_json(files.data / "meta.json"),
        found=_json(files.search / "search.json") or {},
        search=_json(files.search / "history.json") or [],
        histories={name: history for name in models if (history := _json(folders[name] / "history.json"))},
        schemes={name: scheme for name in models if (scheme := _json(files.scheme(name) / "scheme.json"))},
        manifests={name: manifest for name in models if (manifest := _manifest(files.tables(name)))},
        stage_s=[
            (stage, marker["seconds"]) for stage, folder in stages if (marker := _json(folder / MARKER)) is not None
        ],
    )


def _metrics(path: Path) -> dict[str, dict[str, MetricsRow]]:
    """Rows by model, the baseline first and then the budgets from the largest down, and by split."""
    rows: list[MetricsRow] = _json(path) or []
    if not rows:
        raise ValueError(f"{path}: not there or empty; run the evaluate stage first: the report is made from it")
    found: dict[str, dict[str, MetricsRow]] = {}
    for number, row in enumerate(rows):
        if absent := sorted(MetricsRow.__required_keys__ - set(row)):
            raise ValueError(f"{path}: row {number} has no {', '.join(absent)}; run the evaluate stage again")
        splits = found.setdefault(BASELINE if row["budget"] is None else budget_name(row["budget"]), {})
        if row["split"] in splits:
            raise ValueError(
                f"{path}: row {number} is a second one for budget {row['budget']}, {row['split']}; "
                "a run has one model a budget: give each seed its own runtime.run_dir"
            )
        splits[row["split"]] = row
    kept = {name: next(iter(splits.values()))["kept_params"] for name, splits in found.items()}
    return dict(sorted(found.items(), key=lambda item: (item[0] != BASELINE, -kept[item[0]])))


def _json(path: Path) -> Any:
    """The value in a file; None where there is no file."""
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it and run the stage that makes it again") from None


def _manifest(folder: Path) -> Manifest | None:
    path = folder / MANIFEST
    return manifest_file.from_bytes(path.read_bytes(), str(path), verify=False) if path.is_file() else None
