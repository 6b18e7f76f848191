"""A made-up finished run directory: plausible numbers in the real formats, written in a moment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from thresher.budget import budget_name, budget_params
from thresher.rundir import MARKER, write_bytes, write_json
from thresher.spec import Spec
from thresher.tables.format import (
    choose_layout,
    pack_masks,
    rows_by_kept,
    table_file_bytes,
    table_path,
    vocabulary_path,
)
from thresher.tables.manifest import FieldEntry, FileEntry, Manifest, TableEntry, VocabularyEntry, to_bytes

DIM = 16
FIELDS = {
    "user_id": 944,
    "item_id": 1_652,
    "age": 62,
    "gender": 3,
    "occupation": 22,
    "zip_code": 796,
    "release_year": 73,
    "genre": 20,
}
BUDGETS = [0.5, 0.2, 0.1, 0.05]
SHA256 = "0123456789abcdef" * 4


def spec_of(run_dir: Path, budgets: list[float | int] = BUDGETS) -> Spec:
    return Spec.model_validate(
        {
            "data": {"format": "movielens", "path": "package:recbole/dataset_example/ml-100k"},
            "model": {"name": "deepfm", "dim": DIM},
            "prune": {"budgets": budgets},
            "runtime": {"run_dir": str(run_dir)},
        }
    )


def write_run(
    run_dir: Path,
    *,
    budgets: list[float | int] = BUDGETS,
    fields: dict[str, int] = FIELDS,
    auc_changes: list[float] | None = None,
    stalls_at: float = 0.0,
) -> Spec:
    """Write a finished run.

    Args:
        run_dir: where to.
        budgets: from the largest down.
        fields: rows of each field.
        auc_changes: test and validation AUC of each budget minus the uniform model's.
        stalls_at: kept fraction below which the search does not come.
    """
    auc_changes = auc_changes if auc_changes is not None else [0.0021, 0.0003, -0.0031, -0.0105][: len(budgets)]
    random = np.random.default_rng(7)
    total = sum(fields.values()) * DIM
    counts = {name: _zipf(random, rows) for name, rows in fields.items()}
    _write_data(run_dir, fields, counts)
    _write_search(run_dir, min(budget_params(budget, total) for budget in budgets) / total, stalls_at)

    importance = {
        name: random.normal(size=(rows, DIM)) + 0.55 * np.log1p(counts[name])[:, None] - np.linspace(0, 1.5, DIM)
        for name, rows in fields.items()
    }
    rows = _metrics_rows(None, total, total, _write_tables(run_dir, "baseline", None, fields, None), 0.0)
    _write_history(run_dir / "baseline", 0.7918, random)
    for budget, change in zip(budgets, auc_changes, strict=True):
        kept = budget_params(budget, total)
        edge = np.sort(np.concatenate([x.ravel() for x in importance.values()]))[-kept]
        masks = {name: x >= edge for name, x in importance.items()}
        _write_scheme(run_dir, budget, masks, total)
        manifest = _write_tables(run_dir, budget_name(budget), budget, fields, masks)
        rows += _metrics_rows(budget, kept, total, manifest, change)
        _write_history(run_dir / "models" / budget_name(budget), 0.7918 + change, random)
    write_json(run_dir / "metrics.json", rows)
    return spec_of(run_dir, budgets)


def _zipf(random: np.random.Generator, rows: int) -> np.ndarray:
    """Occurrences of each row, falling; row 0 is the unknown."""
    expected = 80_000 / (np.arange(1, rows) ** 1.05) / math.log(rows + 2)
    return np.concatenate([[0], np.sort(random.poisson(expected))[::-1]]).astype(np.int64)


def _write_data(run_dir: Path, fields: dict[str, int], counts: dict[str, np.ndarray]) -> None:
    (run_dir / "data" / "counts").mkdir(parents=True)
    for name, count in counts.items():
        np.save(run_dir / "data" / "counts" / f"{name}.npy", count)
    write_json(
        run_dir / "data" / "meta.json",
        {
            "fields": [
                {
                    "name": name,
                    "kind": "multi" if name == "genre" else "categorical",
                    "rows": rows,
                    "pooling": "mean",
                    "one_hot": name != "genre",
                    "encoding": "vocabulary",
                    "oov_row": 0,
                    "train_count": int(counts[name].sum()),
                    "oov_rate": {"train": 0.0, "validation": rows / 4e5, "test": rows / 3.7e5},
                }
                for name, rows in fields.items()
            ],
            "dense": [],
            "splits": {
                "train": {"samples": 80_011, "label_rate": 0.5541, "files": ["train/0.parquet"]},
                "validation": {"samples": 9_988, "label_rate": 0.5507, "files": ["validation/0.parquet"]},
                "test": {"samples": 10_001, "label_rate": 0.5562, "files": ["test/0.parquet"]},
            },
            "inputs": [{"path": "ml-100k.inter", "bytes": 1_979_203, "sha256": SHA256}],
            "bad_rows": {"count": 0, "first": []},
            "seed": 0,
        },
    )
    write_json(run_dir / "data" / MARKER, {"inputs": {}, "seconds": 2.31})


def _write_search(run_dir: Path, lowest: float, stalls_at: float) -> None:
    history: list[dict[str, Any]] = []
    for step in range(0, 481, 20):
        progress = max(0.0, (step - 96) / 384)
        target = lowest**progress * (1 - 0.05 * progress)
        kept = max(min(1.0, target * (1 + 0.08 * math.sin(step / 30))) - 0.0004 * (step > 0), stalls_at)
        pressure = 6.0 * progress**1.3
        middle = -8.0 + 0.001 * step + pressure
        quantiles = [1 / (1 + math.exp(-(middle + spread))) for spread in (-1.1, -0.4, 0.0, 0.35, 0.9)]
        history.append(
            {
                "step": step,
                "kept_fraction": kept,
                "target_fraction": target if step >= 96 else None,
                "pressure": pressure,
                "threshold_quantiles": quantiles,
                "loss": 0.69 - 0.14 * (1 - math.exp(-step / 120)),
            }
        )
    write_json(run_dir / "search" / "history.json", history)
    write_json(run_dir / "search" / MARKER, {"inputs": {}, "seconds": 41.8})


def _write_history(folder: Path, best: float, random: np.random.Generator) -> None:
    history = []
    for epoch in range(1, 9):
        way = 1 - math.exp(-epoch / 1.8)
        over = 0.0012 * max(0, epoch - 5) ** 1.5
        history.append(
            {
                "step": 79 * epoch,
                "epoch": epoch,
                "train_loss": 0.69 - 0.155 * way - 0.004 * epoch,
                "validation_auc": 0.5 + (best - 0.5) * way - over + random.normal() * 4e-4,
                "validation_logloss": 0.69 - 0.14 * (best / 0.79) * way + 2 * over,
            }
        )
    write_json(folder / "history.json", history)
    write_json(folder / MARKER, {"inputs": {}, "seconds": 33.4 + 2 * float(random.random())})


def _write_scheme(run_dir: Path, budget: float | int, masks: dict[str, np.ndarray], total: int) -> None:
    folder = run_dir / "schemes" / budget_name(budget)
    folder.mkdir(parents=True)
    save_file(
        {name: np.packbits(mask, axis=1, bitorder="little") for name, mask in masks.items()},
        folder / "masks.safetensors",
    )
    write_json(
        folder / "scheme.json",
        {
            "budget": budget,
            "kept_params": sum(int(mask.sum()) for mask in masks.values()),
            "total_params": total,
            "wanted_params": sum(int(mask.sum()) for mask in masks.values()),
            "why_not_exact": "",
            "method": "pep",
            "tables": {
                name: {
                    "rows": mask.shape[0],
                    "dim": DIM,
                    "kept": int(mask.sum()),
                    "rows_kept": int(mask.any(axis=1).sum()),
                    "kept_per_column": mask.sum(axis=0).tolist(),
                    "rows_by_kept": np.bincount(mask.sum(axis=1), minlength=DIM + 1).tolist(),
                }
                for name, mask in masks.items()
            },
        },
    )
    write_json(folder / MARKER, {"inputs": {}, "seconds": 0.4})


def _write_tables(
    run_dir: Path, model: str, budget: float | int | None, fields: dict[str, int], masks: dict[str, np.ndarray] | None
) -> Manifest:
    """The manifest alone: the report reads no other file of the tables."""
    tables, entries = [], []
    for name, rows in fields.items():
        kept = rows * DIM if masks is None else int(masks[name].sum())
        by_kept = [0] * DIM + [rows] if masks is None else rows_by_kept(pack_masks(masks[name]), DIM)
        layout = choose_layout("auto", "fp16", DIM, by_kept, renumber=True)
        size = table_file_bytes(layout, "fp16", DIM, by_kept)
        tables.append(TableEntry(name, rows, DIM, kept, layout, "fp16", FileEntry(table_path(name), size, SHA256)))
        vocabulary = VocabularyEntry("utf8", rows - 1, FileEntry(vocabulary_path(name), 180 + 9 * rows, SHA256))
        kind = "multi" if name == "genre" else "categorical"
        entries.append(FieldEntry(name, name, kind, "mean", "vocabulary", None, 0, vocabulary))
    manifest = Manifest(
        model="deepfm",
        seed=0,
        budget=budget,
        spec_fingerprint=SHA256,
        tables=tuple(tables),
        fields=tuple(entries),
        dense=FileEntry("dense.safetensors", 49_420, SHA256),
    )
    data = to_bytes(manifest)
    write_bytes(run_dir / "tables" / model / "manifest.json", data)
    write_json(run_dir / "tables" / model / MARKER, {"inputs": {}, "seconds": 0.2})
    return Manifest(**{**manifest.__dict__, "manifest_bytes": len(data)})


def _metrics_rows(
    budget: float | int | None, kept: int, total: int, manifest: Manifest, change: float
) -> list[dict[str, Any]]:
    return [
        {
            "model": "deepfm",
            "method": "uniform" if budget is None else "pep",
            "budget": budget,
            "seed": 0,
            "split": split,
            "auc": auc + change,
            "logloss": 0.5481 - change / 2,
            "kept_params": kept,
            "total_params": total,
            "table_bytes": manifest.table_bytes,
            "total_bytes": manifest.total_bytes,
            "seconds": 33.4 if budget is None else 31.2,
        }
        for split, auc in (("validation", 0.7903), ("test", 0.7918))
    ]
