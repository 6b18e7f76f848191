"""Means, intervals and the Pareto front of a sweep, against tables and by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.report.intervals import estimate, pareto_front, student_t
from thresher.report.sweep_page import finding, page
from thresher.report.sweep_summary import Line, smallest_that_held, summarize
from thresher.report.sweep_tables import markdown, tables
from thresher.spec import Spec


@pytest.mark.parametrize(
    ("degrees", "t_95", "t_99"),  # as every textbook prints them
    [(1, 12.706, 63.657), (2, 4.303, 9.925), (3, 3.182, 5.841), (4, 2.776, 4.604), (5, 2.571, 4.032),
     (10, 2.228, 3.169), (29, 2.045, 2.756), (30, 2.042, 2.750), (120, 1.980, 2.617)],
)  # fmt: skip
def test_student_t_is_that_of_the_tables(degrees: int, t_95: float, t_99: float) -> None:
    assert student_t(0.95, degrees) == pytest.approx(t_95, abs=6e-4)
    assert student_t(0.99, degrees) == pytest.approx(t_99, abs=6e-4)


def test_student_t_is_exact_where_it_is_known() -> None:
    assert student_t(0.95, 1) == pytest.approx(math.tan(0.95 * math.pi / 2), rel=1e-12)
    assert student_t(0.95, 2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)


def test_an_interval_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert estimate([5.0]).half_width is None


def test_the_front_by_hand() -> None:
    points = [(1, 1), (2, 3), (2, 2), (3, 3), (4, 5), (4, 5), (5, 4)]
    assert pareto_front(points) == [True, True, False, False, True, True, False]
    assert pareto_front([]) == []


def test_nearly_the_same_size_does_not_make_a_front() -> None:
    points = [(99.5, 0.6), (100.0, 0.7), (50.0, 0.5), (200.0, 0.7)]
    assert pareto_front(points) == [True, True, True, False]
    assert pareto_front(points, tolerance=0.01) == [False, True, True, False]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
def test_no_point_is_better_than_one_on_the_front_and_all_others_have_one(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points)
    assert any(front)
    on_front = [point for point, on in zip(points, front, strict=True) if on]
    for (cost, gain), on in zip(points, front, strict=True):
        beaten = any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in on_front)
        assert on != beaten


def spec(seeds: list[int]) -> Spec:
    return Spec.model_validate(
        {"data": {"format": "synthetic"}, "runtime": {"run_dir": "runs/s"}, "sweep": {"seeds": seeds}}
    )


def row(method: str, seed: int, budget: float | None, auc: float | None, **changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "sweep_model": "fm",
            "sweep_method": method,
            "baseline": "one",
            "model": "fm",
            "method": "pep",
            "budget": budget,
            "seed": seed,
            "split": split,
            "auc": auc,
            "logloss": 0.5,
            "kept_params": int(1000 * (budget or 1)),
            "total_params": 1000,
            "table_bytes": int(2000 * (budget or 1)),
            "total_bytes": 500 + int(2000 * (budget or 1)),
            "seconds": 1.0,
            **changes,
        }
        for split in ("validation", "test")
    ]


def rows() -> list[dict[str, Any]]:
    found = []
    for seed, base in ((1, 0.70), (2, 0.80), (3, 0.75)):
        for method, changes in (("good", (0.001, -0.001)), ("bad", (-0.01, -0.05))):
            found += row(method, seed, None, base)
            for budget, change in zip((0.5, 0.1), changes, strict=True):
                found += row(method, seed, budget, base + change)
    return found


def lines(found: list[dict[str, Any]]) -> dict[tuple[str, str | None], Line]:
    return {(line.method, line.budget): line for line in summarize(spec([1, 2, 3]), found, []).models["fm"]}


def test_differences_are_between_results_of_one_seed() -> None:
    found = lines(rows())
    assert list(found) == [("uniform", None), ("good", "0.5"), ("good", "0.1"), ("bad", "0.5"), ("bad", "0.1")]
    good = found["good", "0.5"]
    assert good.auc.mean == pytest.approx(0.751)
    assert good.auc.half_width == pytest.approx(4.302653 * 0.05 / math.sqrt(3), rel=1e-6)
    assert good.change is not None
    assert good.change.mean == pytest.approx(0.001)
    assert good.change.half_width == pytest.approx(0.0, abs=1e-12)  # the seeds' own ups and downs cancel out
    assert found["uniform", None].change is None
    assert found["uniform", None].auc.n == 3
    assert [at for at, line in found.items() if line.front] == [("good", "0.5"), ("good", "0.1")]


def test_a_missing_cell_narrows_its_line_alone() -> None:
    found = lines([r for r in rows() if (r["sweep_method"], r["seed"]) != ("bad", 2)])
    assert (found["bad", "0.5"].auc.n, found["good", "0.5"].auc.n, found["uniform", None].auc.n) == (2, 3, 3)
    assert found["bad", "0.5"].change is not None
    assert found["bad", "0.5"].change.mean == pytest.approx(-0.01)


def test_a_result_without_an_auc_counts_for_nothing() -> None:
    found = rows()
    for one in found:
        if (one["sweep_method"], one["seed"]) == ("bad", 1) and one["budget"] == 0.5:
            one["auc"] = None
        if (one["sweep_method"], one["budget"]) == ("bad", 0.1):
            one["auc"] = None
    assert ("bad", "0.1") not in lines(found)
    assert lines(found)["bad", "0.5"].auc.n == 2


def test_a_method_that_trains_otherwise_has_a_uniform_model_of_its_own() -> None:
    found = rows() + [r for s in (1, 2, 3) for b in (None, 0.5) for r in row("other", s, b, 0.6, baseline="two")]
    assert lines(found)["uniform of other", None].auc.mean == pytest.approx(0.6)
    change = lines(found)["other", "0.5"].change
    assert change is not None
    assert change.mean == pytest.approx(0.0)


def test_the_finding_is_the_smallest_that_held_on_validation() -> None:
    found = list(lines(rows()).values())
    smallest = smallest_that_held(found)
    assert smallest is not None
    assert (smallest.method, smallest.budget) == ("good", "0.1")
    assert (
        "good at 10\N{NO-BREAK SPACE}% keeps the AUC (\N{MINUS SIGN}0.0010 ± 0.0000 on test) in 3.6 times"
        in finding("fm", found)
    )
    assert "no method" in finding("fm", [line for line in found if line.method == "bad"])


def test_tables_hold_every_line() -> None:
    summary = summarize(spec([1, 2, 3]), rows(), [("fm bad seed 4", "ValueError: a | b\nc")])
    text = markdown(summary, {"Python": "3.11"})
    assert text.count("\n| ") == 1 + 1 + 5
    assert "| good | 10\N{NO-BREAK SPACE}% | 3 | 0.7490 ± 0.1242 | \N{MINUS SIGN}0.0010 ± 0.0000 | 100 |" in text
    assert "- fm bad seed 4: ValueError: a | b\n" in text
    assert tables(summary)[0].row_count == 5


def test_the_page_shows_hostile_names_as_text_and_one_seed_without_bars() -> None:
    found = [r for b in (None, 0.5) for r in row("a", 1, b, 0.7)]
    html = page(summarize(spec([1]), found, [("x", "<script>alert(1)</script>")]), {"a": "<b>"})
    assert "<script" not in html
    assert "±" not in re.sub(r"<p class=\"small\">.*?</p>", "", html)
