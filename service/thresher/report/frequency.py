"""Kept columns by how often training saw the id."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thresher.report.numbers import count
from thresher.report.read import Run


@dataclass(frozen=True)
class KeptByFrequency:
    """Rows of all tables, in bins of training occurrences: 0, 1, and 2 to 3, 4 to 7 and so on."""

    rows: npt.NDArray[np.int64]  # [bins]
    mean_kept: dict[str, npt.NDArray[np.float64]]  # per budget [bins]; NaN in a bin without rows

    def labels(self) -> list[str]:
        """What each bin holds, in words."""
        return ["0", "1"] + [f"{count(2**k)}–{count(2 ** (k + 1) - 1)}" for k in range(1, len(self.rows) - 1)]


def kept_by_frequency(run: Run) -> KeptByFrequency | None:
    """Mean kept columns a row, by bin and budget; None where counts or masks are missing."""
    rows: npt.NDArray[np.int64] | None = None
    mean_kept = {}
    for budget in run.budgets:
        kept, seen = np.zeros(64), np.zeros(64, np.int64)
        for table, mask_NB in run.masks(budget):
            count_N = run.counts(table)
            if count_N is None or len(count_N) != len(mask_NB):
                return None
            # frexp's exponent is the number of binary digits: 0, 1, 2 (for 2 and 3), 3 (4 to 7), …
            bin_N = np.frexp(count_N.astype(np.float64))[1]
            kept_N = np.bitwise_count(mask_NB).sum(axis=1)
            kept += np.bincount(bin_N, weights=kept_N, minlength=64)
            seen += np.bincount(bin_N, minlength=64)
        if seen.any():
            rows = seen
            with np.errstate(invalid="ignore"):
                mean_kept[budget] = kept / seen
    if rows is None:
        return None
    bins = max(2, int(np.flatnonzero(rows)[-1]) + 1)
    return KeptByFrequency(rows=rows[:bins], mean_kept={budget: mean[:bins] for budget, mean in mean_kept.items()})
