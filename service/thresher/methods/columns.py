"""Methods that give each field a number of columns without looking at a trained model.

Shapes: F fields, n_f rows of field f, D columns of the uniform model.
"""

from __future__ import annotations

from collections.abc import Mapping

Columns = dict[str, int]  # by field


def uniform(rows: Mapping[str, int], dim: int, params: int) -> tuple[Columns, str]:
    """Equally many columns for all fields: as many as the budget allows, at least 1.

    Args:
        rows: n_f of each field.
        dim: columns D at most.
        params: that may stay.

    Returns:
        The fields' columns, and why not exactly `params` stay; empty if they do.
    """
    all_rows = sum(rows.values())
    columns = max(1, min(dim, params // all_rows))
    kept = columns * all_rows
    why = "" if kept == params else f"all fields have equally many columns, and one column is {all_rows} parameters"
    return dict.fromkeys(rows, columns), why


def mde(rows: Mapping[str, int], dim: int, params: int, alpha: float) -> tuple[Columns, str]:
    """Mixed dimensions by popularity: d_f = λ n_f^−α, rounded to a power of 2 (Ginart et al., ISIT 2021, algorithm 2).

    λ is the largest that the budget allows.

    Args:
        rows: n_f of each field.
        dim: columns D at most.
        params: that may stay.
        alpha: α; 0 is uniform but for the rounding.

    Returns:
        The fields' columns, at least 1 and at most D, and why not exactly `params` stay; empty if they do.
    """

    def columns(log2_scale: float) -> Columns:
        found = {}
        for name, n in rows.items():
            exact = 2.0**log2_scale * n**-alpha
            power = 0
            while 2 ** (power + 1) <= dim and exact > 2**power * 1.5:  # to the nearer of two powers
                power += 1
            found[name] = 2**power
        return found

    low, high = -2.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(rows[name] * d for name, d in columns(middle).items()) <= params:
            low = middle
        else:
            high = middle
    found = columns(low)
    kept = sum(rows[name] * d for name, d in found.items())
    return found, "" if kept == params else "columns are powers of 2, and move all at once with their scale"
