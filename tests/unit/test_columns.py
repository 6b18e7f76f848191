"""Methods that give fields a number of columns: budgets, and what each is known for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.methods.columns import mde, uniform
from thresher.methods.sseds import choose

ROWS = {"user": 6040, "item": 3706, "zip": 3439, "year": 81, "age": 7}
TOTAL = 16 * sum(ROWS.values())


def kept(columns: dict[str, int], rows: dict[str, int] = ROWS) -> int:
    return sum(rows[name] * d for name, d in columns.items())


@pytest.mark.parametrize(("params", "columns"), [(TOTAL, 16), (TOTAL // 2, 8), (TOTAL // 10, 1), (5, 1)])
def test_uniform_gives_all_fields_as_many_columns_as_fit(params: int, columns: int) -> None:
    found, why = uniform(ROWS, 16, params)
    assert found == dict.fromkeys(ROWS, columns)
    assert bool(why) == (kept(found) != params)


def test_mde_gives_small_tables_more_columns() -> None:
    found, _ = mde(ROWS, 16, TOTAL // 4, 0.5)
    assert found["age"] == 16
    assert found["age"] >= found["year"] >= found["zip"] >= found["item"] >= found["user"] >= 1
    assert all(d & (d - 1) == 0 for d in found.values())


@given(
    rows=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 10**9), min_size=1),
    share=st.floats(0.001, 1),
    alpha=st.floats(0, 1),
)
def test_mde_stays_within_the_budget_and_is_the_largest_that_does(
    rows: dict[str, int], share: float, alpha: float
) -> None:
    params = max(1, int(share * 16 * sum(rows.values())))
    found, why = mde(rows, 16, params, alpha)
    assert all(1 <= d <= 16 for d in found.values())
    if kept(found, rows) > params:  # the least there is
        assert set(found.values()) == {1}
        assert why


def test_sseds_takes_the_most_salient_columns() -> None:
    saliency_FD = np.array([[0.3, 0.05], [0.2, 0.1], [0.25, 0.1]])
    rows = {"a": 100, "b": 10, "c": 10}
    assert choose(saliency_FD, rows, 120, "saliency") == ({"a": 1, "b": 1, "c": 1}, "")
    assert choose(saliency_FD, rows, 40, "per_parameter") == ({"a": 0, "b": 2, "c": 2}, "")
    columns, why = choose(saliency_FD, rows, 35, "per_parameter")
    assert kept(columns, rows) == 30
    assert "5 parameters" in why
    columns, why = choose(saliency_FD, rows, 3, "saliency")
    assert columns == {"a": 0, "b": 1, "c": 0}
    assert "10 parameters" in why


@given(st.data())
def test_sseds_uses_what_the_budget_allows(data: st.DataObject) -> None:
    fields = data.draw(st.integers(1, 6))
    rows = {f"f{i}": data.draw(st.integers(1, 1000)) for i in range(fields)}
    saliency_FD = np.random.default_rng(data.draw(st.integers(0, 99))).random((fields, 4))
    params = data.draw(st.integers(min(rows.values()), 4 * sum(rows.values())))
    columns, why = choose(saliency_FD, rows, params, data.draw(st.sampled_from(["saliency", "per_parameter"])))
    left = params - kept(columns, rows)
    assert left >= 0
    assert bool(why) == (left > 0)
    assert all(d == 4 or rows[name] > left for name, d in columns.items())
