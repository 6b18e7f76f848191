"""What a sweep runs: one cell for each model, method and seed, and the spec of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from thresher.spec import Spec, SweepSpec


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    model: str
    method: str
    seed: int
    spec: Spec

    @property
    def name(self) -> str:
        """`fm pep seed 1`, for people."""
        return f"{self.model} {self.method} seed {self.seed}"


def expand(spec: Spec) -> list[Cell]:
    """All cells of a spec with a sweep; each has a run directory of its own below the sweep's.

    Raises:
        ValueError: if a cell's spec has errors; there are none in a spec that `load_spec` has read.
    """
    assert spec.sweep is not None
    found = []
    for (model, method), seed in product(pairs(spec), spec.sweep.seeds):
        run_dir = Path(spec.runtime.run_dir) / "cells" / model / method / str(seed)
        own = {"seed": seed, "runtime": {"run_dir": str(run_dir), "parallel": 1}}
        found.append(Cell(model, method, seed, Spec.model_validate(merged(overridden(spec, model, method), own))))
    return found


def pairs(spec: Spec) -> list[tuple[str, str]]:
    """Names of every model with every method."""
    return list(product(_models(spec), _methods(spec)))


def overridden(spec: Spec, model: str, method: str) -> dict[str, Any]:
    """What the spec of a model's and a method's cells says, but for what is a cell's own; not validated.

    Only what was given stands in it, so that a default that depends on the method may differ between cells.
    """
    base = spec.model_dump(mode="json", exclude_unset=True, exclude={"sweep"})
    return merged(merged(base, _models(spec)[model]), _methods(spec)[method])


def merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the overrides' values in place of its own; mappings are merged key by key."""
    result = dict(base)
    for key, value in overrides.items():
        inner = result.get(key)
        result[key] = merged(inner if isinstance(inner, dict) else {}, value) if isinstance(value, dict) else value
    return result


def _models(spec: Spec) -> dict[str, dict[str, Any]]:
    return _sweep(spec).models or {spec.model.name: {}}


def _methods(spec: Spec) -> dict[str, dict[str, Any]]:
    return _sweep(spec).methods or {spec.search.method: {}}


def _sweep(spec: Spec) -> SweepSpec:
    return spec.sweep or SweepSpec()
