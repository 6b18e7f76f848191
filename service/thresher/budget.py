"""What may stay of the tables, as users give it: a share or a number of their parameters, or bytes of serving."""

from __future__ import annotations

import re
from fractions import Fraction

Budget = float | int | str

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([kMG]?B|[KMG]iB)")


def budget_name(budget: Budget) -> str:
    """The budget as it is written in file names and metrics: `0.05`, `20000p` for parameters, `12MB` for bytes."""
    if isinstance(budget, str):
        return budget.replace(" ", "")
    return f"{int(budget)}p" if budget > 1 or isinstance(budget, int) else f"{budget:g}"


def check_budget(budget: Budget) -> Budget:
    """The budget, if it can be understood.

    Raises:
        ValueError: if not.
    """
    if isinstance(budget, str):
        budget_bytes(budget)
    elif budget <= 0:
        raise ValueError(f"budget {budget}: must be above 0")
    elif budget > 1 and budget != int(budget):
        raise ValueError(f"budget {budget}: give a share below 1 or a whole number of parameters")
    return budget


def budget_bytes(budget: Budget) -> int | None:
    """Bytes that serving may take; none if the budget counts parameters.

    Raises:
        ValueError: if a text is no number of bytes.
    """
    if not isinstance(budget, str):
        return None
    match = _BYTES.fullmatch(budget)
    if match is None or not (found := int(Fraction(match[1]) * _UNITS[match[2]])):
        raise ValueError(f"budget {budget!r}: give bytes as a number and one of {', '.join(_UNITS)}, such as 12MB")
    return found


def budget_params(budget: float | int, total_params: int) -> int:
    """Parameters that may stay under `budget` of `total_params`: the exact product, rounded down.

    Raises:
        ValueError: if nothing could stay, or more is asked for than there is.
    """
    is_count = budget > 1 or isinstance(budget, int)
    kept = int(budget) if is_count else int(Fraction(str(budget)) * total_params)  # in decimals: 0.29 of 100 is 29
    if not 1 <= kept <= total_params:
        raise ValueError(
            f"prune.budgets: {budget} of {total_params} parameters would keep {kept}; "
            f"choose a budget that keeps 1 to {total_params}"
        )
    return kept
