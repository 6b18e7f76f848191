"""The section `sweep` of a spec: its cells, and the words of its errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from thresher.cells import expand, merged, pairs
from thresher.specfile import SpecError, load_spec

BASE = """\
data: {format: synthetic}
train: {epochs: 3}
runtime: {run_dir: runs/s, ranks: 1, parallel: 4}
"""


def load(folder: Path, sweep: str, *overrides: str):
    path = folder / "s.yaml"
    path.write_text(BASE + sweep)
    return load_spec(path, overrides)


def errors(folder: Path, sweep: str, *overrides: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(folder, sweep, *overrides)
    return [error.replace(f"{folder}/", "") for error in caught.value.errors]


def test_a_cell_for_every_model_method_and_seed(tmp_path: Path) -> None:
    spec = load(
        tmp_path,
        """
sweep:
  methods:
    pep: {prune: {budgets: [0.5]}}
    again: [retrain.init=random, "train.clip_norm=null"]
  models:
    fm: {model: {name: fm, dim: 8}, retrain: {epochs: 7}}
    deep: {}
  seeds: [5, 6]
""",
    )
    cells = expand(spec)
    assert pairs(spec) == [("fm", "pep"), ("fm", "again"), ("deep", "pep"), ("deep", "again")]
    assert len(cells) == 8
    by = {(cell.model, cell.method, cell.seed): cell.spec for cell in cells}
    one = by["fm", "again", 6]
    assert (one.model.name, one.model.dim, one.seed, one.train.epochs, one.train.clip_norm) == ("fm", 8, 6, 3, None)
    assert (one.retrain.init, one.retrain.epochs) == ("random", 7)
    assert one.sweep is None
    assert (one.runtime.run_dir, one.runtime.parallel, one.runtime.ranks) == ("runs/s/cells/fm/again/6", 1, 1)
    assert by["deep", "pep", 5].prune.budgets == [0.5]
    assert by["deep", "pep", 5].model.name == "deepfm"
    assert len({cell.spec.runtime.run_dir for cell in cells}) == 8


def test_the_specs_own_model_and_method_are_the_default(tmp_path: Path) -> None:
    spec = load(tmp_path, "sweep: {seeds: [1]}")
    assert [(cell.model, cell.method, cell.seed) for cell in expand(spec)] == [("deepfm", "pep", 1)]


def test_the_command_line_reaches_into_a_sweep(tmp_path: Path) -> None:
    spec = load(tmp_path, "sweep: {methods: {a: {}}}", "sweep.methods.b.search.granularity=table", "sweep.seeds=[9]")
    assert [(c.method, c.seed, c.spec.search.granularity) for c in expand(spec)] == [
        ("a", 9, "feature_dimension"),
        ("b", 9, "table"),
    ]


def test_mappings_are_merged_and_all_else_is_replaced() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 5}
    assert merged(base, {"a": {"c": [3]}, "d": {"e": 1}, "f": None}) == {
        "a": {"b": 1, "c": [3]}, "d": {"e": 1}, "f": None,
    }  # fmt: skip
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 5}


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        (
            "sweep:\n  methods:\n    pep: {search: {granularty: table}}",
            "s.yaml:6:20: sweep.methods.pep: search.granularty: unknown key; expected one of method, granularity",
        ),
        (
            "sweep:\n  models:\n    big:\n      model: {dim: 1}",
            "s.yaml:7:15: sweep.models.big: model.dim: expected a number of at least 2, found 1",
        ),
        (
            "sweep: {methods: {a: [serch.epochs=1]}}",
            "override serch.epochs=1: sweep.methods.a: serch: unknown key; expected one of data",
        ),
        ("sweep: {methods: {a: [search.epochs]}}", "override search.epochs: expected KEY=VALUE with a dotted key"),
        (
            "sweep: {methods: {a: [search.epochs=1, search.epochs=2]}}",
            "override search.epochs=2: search.epochs: given twice; keep one",
        ),
        ("sweep: {methods: {a: 3}}", "s.yaml:4:19: sweep.methods.a: expected a mapping of keys"),
        ("sweep: {methods: {a: [3]}}", "s.yaml:4:19: sweep.methods.a: expected a mapping of keys"),
        ("sweep: {methods: {a: {seed: 1}}}", "s.yaml:4:23: sweep: methods.a.seed: the same for all cells of a sweep"),
        (
            "sweep: {models: {a: [runtime.run_dir=x]}}",
            "override runtime.run_dir=x: sweep: models.a.runtime.run_dir: the same for all cells",
        ),
        ("sweep: {seeds: [1, 2, 1]}", "s.yaml:4:9: sweep: seeds [1, 2, 1]: one stands there twice"),
        ("sweep: {seeds: []}", "s.yaml:4:9: sweep.seeds: expected at least 1 entries"),
        ("sweep: {methods: {a-b: {}}}", "s.yaml:4:19: sweep.methods.a-b: expected a name that matches"),
        ("sweep: {method: {}}", "s.yaml:4:9: sweep.method: unknown key; expected one of methods, models, seeds"),
    ],
)
def test_a_wrong_override_is_named_with_its_method_or_model(sweep: str, expected: str, tmp_path: Path) -> None:
    (error,) = errors(tmp_path, sweep)
    assert error.startswith(expected)


def test_what_only_goes_wrong_together_names_both(tmp_path: Path) -> None:
    sweep = "sweep: {methods: {small: {train: {batch_size: 1}}}, models: {wide: {runtime: {ranks: 2}}}}"
    (error,) = errors(tmp_path, sweep)
    assert "train.batch_size 1 must be a multiple of runtime.ranks 2" in error
    assert "sweep.methods.small" in error


def test_an_error_is_told_once_for_all_models(tmp_path: Path) -> None:
    found = errors(tmp_path, "sweep: {methods: {a: {trian: {}}}, models: {x: {}, y: {}, z: {modle: {}}}}")
    assert [error.partition(": ")[2].partition(": unknown")[0] for error in found] == [
        "sweep.methods.a: trian",
        "sweep.models.z: modle",
    ]
