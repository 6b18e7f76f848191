"""The page: tables and sentences beside the figures, in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from thresher.report import colours, environment, numbers, templates
from thresher.report.figures import Plot
from thresher.report.parts import PARTS, parts_bytes, table_bytes
from thresher.report.read import BASELINE, Run
from thresher.report.verdict import TOLERANCE, Verdict, auc_standard_error, difference, judge, label, reported

SECTIONS = (
    ("accuracy", "Accuracy"),
    ("kept", "What stays"),
    ("search", "Search"),
    ("training", "Training"),
    ("bytes", "Bytes"),
    ("fields", "Fields"),
    ("data", "Data"),
    ("time", "Time"),
    ("spec", "Spec"),
)


def render(run: Run, plots: Mapping[str, Plot | None]) -> str:
    """The report of a run as HTML.

    Args:
        run: the run.
        plots: what each of `figures.FIGURES` drew, by its name there.
    """
    verdict = judge(run)
    return templates.render(
        "page.html.j2",
        name=run.dir.path.name,
        model=reported(next(iter(run.rows.values())))["model"],
        sections=SECTIONS,
        plots=plots,
        verdict=verdict,
        tiles=_tiles(run, verdict),
        split=reported(next(iter(run.rows.values())))["split"],
        results=[_result(run, model, verdict) for model in run.rows],
        accuracy_notes=_accuracy_notes(run, verdict),
        search_words=_search_words(run),
        **_bytes(run),
        **_fields(run),
        **_data(run),
        **_time(run),
        spec_yaml=yaml.safe_dump(run.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        environment=environment.describe(),
    )


def _tiles(run: Run, verdict: Verdict) -> list[dict[str, str]]:
    tiles = []
    base = reported(run.baseline) if run.baseline else None
    if base is not None:
        tiles.append(
            {
                "what": f"Uniform model, {base['split']} AUC",
                "value": numbers.score(base["auc"]),
                "note": f"log loss {numbers.score(base['logloss'])}",
            }
        )
    if verdict.headline is None:
        return tiles
    row = reported(run.rows[verdict.headline])
    change = difference(run, verdict.headline)
    tiles += [
        {
            "what": f"At {label(verdict.headline)}, {row['split']} AUC",
            "value": numbers.score(row["auc"]),
            "note": f"{numbers.signed(change)} to the uniform model" if change is not None else "",
        },
        {
            "what": f"At {label(verdict.headline)}, bytes in all",
            "value": numbers.size(row["total_bytes"]),
            "note": f"uniform model: {numbers.size(base['total_bytes'])}" if base is not None else "",
        },
        {
            "what": f"At {label(verdict.headline)}, kept parameters",
            "value": numbers.count(row["kept_params"]),
            "note": f"of {numbers.count(row['total_params'])}",
        },
    ]
    return tiles


def _result(run: Run, model: str, verdict: Verdict) -> dict[str, Any]:
    """One row of the table of results."""
    row = reported(run.rows[model])
    is_baseline = model == BASELINE
    base = run.baseline.get(row["split"]) if not is_baseline else None
    logloss_change = (
        row["logloss"] - base["logloss"]
        if base is not None and row["logloss"] is not None and base["logloss"] is not None
        else None
    )
    return {
        "label": label(model),
        "colour": None if is_baseline else colours.variable(run.budgets.index(model)),
        "headline": model == verdict.headline,
        "lost": model in verdict.lost,
        "auc": numbers.score(row["auc"]),
        "auc_change": "" if is_baseline else numbers.signed(difference(run, model)),
        "logloss": numbers.score(row["logloss"]),
        "logloss_change": "" if is_baseline else numbers.signed(logloss_change),
        "kept": numbers.count(row["kept_params"]),
        "kept_exact": f"{row['kept_params']:,}",
        "share": numbers.percent(row["kept_params"] / row["total_params"]),
        "table_size": numbers.size(row["table_bytes"]),
        "table_exact": f"{row['table_bytes']:,} bytes",
        "total_size": numbers.size(row["total_bytes"]),
        "total_exact": f"{row['total_bytes']:,} bytes",
        "times": f"{base['total_bytes'] / row['total_bytes']:.1f} ×" if base is not None else "",
        "seconds": numbers.MISSING if row["seconds"] is None else numbers.duration(row["seconds"]),
    }


def _accuracy_notes(run: Run, verdict: Verdict) -> list[str]:
    notes = []
    if verdict.headline is not None and run.baseline:
        notes.append(
            f"In bold: the smallest budget whose validation AUC is at most {TOLERANCE} below the uniform model’s, "
            "or the best there where none is. The test split chose nothing."
        )
    notes += [
        f"At {label(budget)}, {numbers.count(scheme['kept_params'])} parameters stay where "
        f"{numbers.count(scheme['wanted_params'])} were allowed: {scheme['why_not_exact']}."
        for budget, scheme in run.schemes.items()
        if scheme.get("why_not_exact")
    ]
    row = reported(next(iter(run.rows.values())))
    split = (run.meta or {}).get("splits", {}).get(row["split"])
    if split and row["auc"] is not None and 0 < split["label_rate"] < 1:
        positives = split["samples"] * split["label_rate"]
        error = auc_standard_error(row["auc"], positives, split["samples"] - positives)
        notes.append(
            f"An AUC over {split['samples']:,} samples has a standard error of about {error:.4f}; differences between "
            f"models scored on the same samples are surer than that, but this is one run with one seed ({row['seed']})."
        )
    return notes


def _search_words(run: Run) -> str:
    """What the search of a method without a history did and cost."""
    found = run.found
    if found.get("method") == "sseds":
        worth = found["training_steps_worth"]
        steps = f", as long as {worth:g} training steps" if worth is not None else ""
        return (
            f"SSEDS looked once at {found['batches']} batches of the training samples, after the uniform model was "
            f"trained; it took {found['seconds']:.2f} s{steps}."
        )
    if found.get("method") == "magnitude":
        return f"The uniform model’s values were ranked by magnitude, in {numbers.duration(found['seconds'])}."
    if found.get("method", "pep") == "pep":  # its history says more, and where that is missing the page says so
        return ""
    return f"The method {found['method']} needs no search: it looks at the tables’ sizes alone."


def _bytes(run: Run) -> dict[str, Any]:
    rows = []
    for model, manifest in run.manifests.items():
        sizes = parts_bytes(manifest)
        rows.append(
            {
                "label": label(model),
                "sizes": [numbers.size(sizes[part]) for part in PARTS],
                "total": numbers.size(sum(sizes.values())),
            }
        )
    return {"byte_rows": rows, "parts": PARTS, "dtype": run.spec.export.dtype}


def _fields(run: Run) -> dict[str, Any]:
    """The table of fields, from whichever of the data's description, schemes and manifests there are."""
    described = {field["name"]: field for field in (run.meta or {}).get("fields", [])}
    names = list(described) or list(next((scheme["tables"] for scheme in run.schemes.values()), {}))
    budgets = [name for name in run.budgets if name in run.schemes]
    sizes = {name: table_bytes(manifest) for name, manifest in run.manifests.items()}
    splits = [
        split
        for split in ("validation", "test")
        if described and all(split in f["oov_rate"] for f in described.values())
    ]
    rows = []
    for name in names:
        field = described.get(name)
        tables = [run.schemes[budget]["tables"].get(name) for budget in budgets]
        table = next((table for table in tables if table), None)
        cells = [numbers.MISSING if t is None else f"{t['kept'] / t['rows']:.2f}" for t in tables]
        cells += [numbers.size(size[name]) if name in size else numbers.MISSING for size in sizes.values()]
        cells += [_rate(field["oov_rate"][split]) for split in splits if field]
        rows.append(
            {
                "name": name,
                "kind": f"{field['kind']}, {field['encoding'].replace('_', ' ')}" if field else numbers.MISSING,
                "rows": numbers.count(field["rows"] if field else table["rows"] if table else 0),
                "dim": table["dim"] if table else run.spec.model.dim,
                "cells": cells,
            }
        )
    return {
        "fields": rows,
        "field_budgets": [label(budget) for budget in budgets],
        "field_models": [label(model) for model in sizes],
        "oov_splits": splits,
    }


def _data(run: Run) -> dict[str, Any]:
    if run.meta is None:
        return {"splits": [], "inputs": [], "data_words": ""}
    meta = run.meta
    splits = [
        {
            "name": name,
            "samples": numbers.count(split["samples"]),
            "exact": f"{split['samples']:,}",
            "label_rate": _rate(split["label_rate"]),
        }
        for name, split in meta["splits"].items()
    ]
    rows = sum(field["rows"] for field in meta["fields"])
    dense = f" and {len(meta['dense'])} dense inputs" if meta["dense"] else ""
    bad = meta["bad_rows"]["count"]
    return {
        "splits": splits,
        "inputs": [
            {"path": file["path"], "size": numbers.size(file["bytes"]), "sha256": file["sha256"]}
            for file in meta["inputs"]
        ],
        "data_words": f"{run.spec.data.format}: {len(meta['fields'])} fields with {numbers.count(rows)} rows in all"
        f"{dense}. "
        + (f"{bad:,} rows of the raw data could not be read and were left out." if bad else "Every row could be read."),
    }


def _time(run: Run) -> dict[str, Any]:
    longest = max((seconds for _, seconds in run.stage_s), default=0.0) or 1.0
    ranks = run.spec.runtime.ranks
    return {
        "stages": [
            {"name": _stage(stage), "seconds": numbers.duration(seconds), "width": round(100 * seconds / longest, 1)}
            for stage, seconds in run.stage_s
        ],
        "stages_total": numbers.duration(sum(seconds for _, seconds in run.stage_s)),
        "ranks_words": f", with {ranks} ranks on {run.spec.runtime.device}"
        if ranks > 1
        else f", on {run.spec.runtime.device}",
    }


def _stage(stage: str) -> str:
    """`retrain 0.1` as people read it."""
    name, _, model = stage.partition(" ")
    return f"{name} {label(model)}" if model else name


def _rate(share: float | None) -> str:
    return numbers.MISSING if share is None else numbers.percent(share)
