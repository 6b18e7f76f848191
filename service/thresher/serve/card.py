"""The model card: what a published model is, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thresher.budget import Budget
from thresher.tables.manifest import FieldEntry, Manifest


def model_card(manifest: Manifest, metrics: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> str:
    """The card, in Markdown.

    Args:
        manifest: of the exported tables.
        metrics: the rows of metrics.json.
        data: the section of the spec.
    """
    total = sum(table.rows * table.dim for table in manifest.tables)
    kept = sum(table.kept for table in manifest.tables)
    pruned = f"The tables are not pruned: {total:,} parameters."
    if manifest.budget is not None:
        pruned = f"Tables pruned to budget {manifest.budget}: {kept:,} of {total:,} parameters stay."
    splits = [row["split"] for row in _rows(metrics, manifest.budget)]
    source = data.get("path") or "generated"
    lines = [
        f"# {manifest.model}",
        "",
        f"Gives the probability of the label 1. {len(manifest.fields)} fields with embedding tables, "
        f"{len(manifest.numeric)} numeric inputs. {pruned}",
        "",
        "## Quality",
        "",
        "| split | AUC | log loss | AUC of the uniform model |",
        "|---|---|---|---|",
        *(_quality(metrics, manifest.budget, split) for split in splits),
        "",
        f"Measured on the splits of the training data alone: `{data['format']}`, `{source}`. Seed {manifest.seed}; "
        f"SHA-256 of the spec `{manifest.spec_fingerprint}`.",
        "",
        "## Bytes",
        "",
        "| tables | vocabularies | dense part | manifest | all |",
        "|---|---|---|---|---|",
        f"| {manifest.table_bytes:,} | {manifest.vocabulary_bytes:,} | {manifest.dense_bytes:,} "
        f"| {manifest.manifest_bytes:,} | {manifest.total_bytes:,} |",
        "",
        "## Inputs",
        "",
        "| column | field | kind | ids from | table | kept |",
        "|---|---|---|---|---|---|",
        *(_input(manifest, field) for field in manifest.fields),
        *(f"| {entry.source} | {entry.name} | dense number | {entry.definition} | | |" for entry in manifest.numeric),
        "",
    ]
    return "\n".join(lines)


def _rows(metrics: Sequence[Mapping[str, Any]], budget: Budget | None) -> list[Mapping[str, Any]]:
    return [row for row in metrics if row["budget"] == budget]


def _quality(metrics: Sequence[Mapping[str, Any]], budget: Budget | None, split: str) -> str:
    own, uniform = (next(row for row in _rows(metrics, b) if row["split"] == split) for b in (budget, None))
    return f"| {split} | {own['auc']:.4f} | {own['logloss']:.4f} | {uniform['auc']:.4f} |"


def _input(manifest: Manifest, field: FieldEntry) -> str:
    table = next(table for table in manifest.tables if table.name == field.table)
    keys = f", {field.vocabulary.keys:,} keys" if field.vocabulary else ""
    return (
        f"| {field.source} | {field.name} | {field.kind} | {field.encoding}{keys} | {table.rows:,} × {table.dim}, "
        f"{table.layout} {table.dtype} | {table.kept:,} |"
    )
