"""Budgets: how they are read, and what those in bytes allow."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.budget import budget_bytes, budget_name, budget_params, check_budget


@pytest.mark.parametrize(
    ("text", "size"),
    [("12MB", 12_000_000), ("1.5 kB", 1500), ("2GiB", 2**31), ("64KiB", 65536), ("7B", 7), ("0.5MiB", 2**19)],
)
def test_bytes_are_read(text: str, size: int) -> None:
    assert budget_bytes(text) == size
    assert budget_name(text) == text.replace(" ", "")


@pytest.mark.parametrize("text", ["12", "MB", "-1MB", "1e3MB", "0MB", "0.1B", "12 mb", "1TB", "../x", "1MB\n"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give bytes as a number and one of B, kB, MB"):
        check_budget(text)


@given(st.floats(1e-6, 1, exclude_max=True), st.integers(10**6, 10**12))
def test_a_share_is_rounded_down(share: float, total: int) -> None:
    assert budget_params(share, total) <= share * total * (1 + 1e-12)
    assert budget_params(share, total) > share * total * (1 - 1e-12) - 1


def test_a_name_is_a_safe_file_name(tmp_path: Path) -> None:
    for budget in (0.5, 20000, "1.5 kB", 1e-6):
        (tmp_path / budget_name(budget)).mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"0.5", "20000p", "1.5kB", "1e-06"}
