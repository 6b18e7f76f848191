"""What the cells of a sweep say together: means over seeds with their confidence, and the Pareto front."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thresher.budget import budget_name
from thresher.report.intervals import Estimate, estimate, pareto_front
from thresher.report.verdict import TOLERANCE
from thresher.spec import Spec

SAME_SIZE = 0.01  # sizes nearer than this share differ by how compactly masks could be stored

Row = Mapping[str, Any]  # of a cell's metrics.json, with sweep_model, sweep_method, and baseline: which uniform model
Rows = Mapping[tuple[str, int], Row]  # by split and seed


@dataclass(frozen=True)
class Line:
    """A model's results with one method under one budget, over the seeds; or those of its uniform model."""

    method: str
    budget: str | None  # as in file names; None: the uniform model
    auc: Estimate  # on test, as is what follows
    logloss: Estimate | None
    change: Estimate | None  # of AUC, to the uniform model of the same seed
    validation_change: Estimate | None
    kept_params: float
    total_params: float
    table_bytes: float
    total_bytes: float
    seconds: float
    front: bool = False  # none of this model is as small and as good


@dataclass(frozen=True)
class Summary:
    """The results of a sweep; a cell that is missing only narrows what its line is made from."""

    spec: Spec
    rows: Sequence[Row]
    failures: Sequence[tuple[str, str]]  # name of the cell and why
    models: Mapping[str, Sequence[Line]]

    @property
    def methods(self) -> list[str]:
        """All methods with a result, in the spec's order: that of their colours."""
        return list(dict.fromkeys(line.method for lines in self.models.values() for line in lines if line.budget))

    def as_json(self) -> list[dict[str, Any]]:
        """All lines as plain values."""
        return [{"model": model, **dataclasses.asdict(line)} for model, lines in self.models.items() for line in lines]


def summarize(spec: Spec, rows: Sequence[Row], failures: Sequence[tuple[str, str]]) -> Summary:
    """Bring the rows of all cells together."""
    models = {}
    for model in dict.fromkeys(row["sweep_model"] for row in rows):
        lines = _lines([row for row in rows if row["sweep_model"] == model])
        front = pareto_front([(line.total_bytes, line.auc.mean) for line in lines], SAME_SIZE)
        if lines:
            models[model] = [dataclasses.replace(line, front=f) for line, f in zip(lines, front, strict=True)]
    return Summary(spec, rows, failures, models)


def smallest_that_held(lines: Sequence[Line]) -> Line | None:
    """The smallest whose AUC on validation is at most `TOLERANCE` below the uniform model's: test chooses nothing."""
    held = [line for line in lines if line.validation_change is not None and line.validation_change.mean >= -TOLERANCE]
    return min(held, key=lambda line: line.total_bytes, default=None)


def _lines(rows: Sequence[Row]) -> list[Line]:
    """One model's lines: its uniform models, then each method's budgets in the order that the cells have them."""
    baselines: dict[str, dict[tuple[str, int], Row]] = {}
    groups: dict[tuple[str, str], dict[tuple[str, int], Row]] = {}
    whose: dict[str, str] = {}
    for row in rows:
        at = row["split"], row["seed"]
        if row["budget"] is None:
            whose.setdefault(row["baseline"], row["sweep_method"])
            baselines.setdefault(row["baseline"], {})[at] = row
        else:
            groups.setdefault((row["sweep_method"], budget_name(row["budget"])), {})[at] = row
    first = next(iter(baselines), None)
    found = [
        # A method that changes how models are trained has a uniform model of its own.
        _line("uniform" if name == first else f"uniform of {whose[name]}", None, own, {})
        for name, own in baselines.items()
    ]
    for (method, budget), own in groups.items():
        found.append(_line(method, budget, own, baselines.get(next(iter(own.values()))["baseline"], {})))
    return [line for line in found if line is not None]


def _line(method: str, budget: str | None, rows: Rows, uniform: Rows) -> Line | None:
    test = [row for (split, _), row in rows.items() if split == "test" and row["auc"] is not None]
    if not test:
        return None
    losses = [row["logloss"] for row in test if row["logloss"] is not None]

    def mean(key: str) -> float:
        return estimate([row[key] or 0 for row in test]).mean

    return Line(
        method=method,
        budget=budget,
        auc=estimate([row["auc"] for row in test]),
        logloss=estimate(losses) if losses else None,
        change=_change(rows, uniform, "test"),
        validation_change=_change(rows, uniform, "validation"),
        kept_params=mean("kept_params"),
        total_params=mean("total_params"),
        table_bytes=mean("table_bytes"),
        total_bytes=mean("total_bytes"),
        seconds=mean("seconds"),
    )


def _change(rows: Rows, uniform: Rows, split: str) -> Estimate | None:
    """Mean of the differences of AUC, each of one seed: what the seeds have in common cancels out."""
    pairs = [(row["auc"], uniform[at]["auc"]) for at, row in rows.items() if at[0] == split and at in uniform]
    differences = [own - base for own, base in pairs if own is not None and base is not None]
    return estimate(differences) if differences else None
