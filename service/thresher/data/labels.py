"""What counts as a positive sample."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from thresher.data.parse import numbers
from thresher.spec import LabelSpec


def read_labels(array: pa.Array, label: LabelSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of a column of n values.

    Returns:
        uint8[n] labels, bool[n] false where the spec drops the sample, bool[n] true where the value is no label.
    """
    values, bad = numbers(array)
    bad = bad | np.isnan(values)
    kept = ~np.isin(values, label.drop)
    if label.positive_from is not None:
        return (values >= label.positive_from).astype(np.uint8), kept, bad
    return (values == 1).astype(np.uint8), kept, bad | (kept & (values != 0) & (values != 1))
