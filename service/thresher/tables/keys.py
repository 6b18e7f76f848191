"""How a raw value of the data becomes the key that a vocabulary or a hash knows; the same as when data is prepared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

# Names that stand in a manifest: a changed function needs a new one.
HASH = "fnv1a64_mix64"
LOG_BUCKET = "floor_ln_squared"
NUMERIC = "ln_one_plus"
DEFINITIONS = {"hash": HASH, "log_bucket": LOG_BUCKET}


def texts(values: Iterable[Any], field: str) -> list[str]:
    """Raw values as keys: an integral number in decimals, a missing value (None, NaN) as the empty text.

    Raises:
        ValueError: if a value is neither text nor number; names `field`.
    """
    return [_text(value, field) for value in (values.tolist() if isinstance(values, np.ndarray) else values)]


def _text(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    raise ValueError(f"field {field}: a raw key is text or a number, got {value!r:.80}")


def log_buckets(values: Any, field: str) -> list[str]:
    """Keys of numbers' log buckets: 3 + floor(ln(x)^2) for x > 2, floor(x) for the others, empty for a missing one.

    Raises:
        ValueError: if a value is no finite number; names `field`.
    """
    try:
        numbers: npt.NDArray[np.float64] = np.array(values, np.float64)  # None becomes NaN
    except (TypeError, ValueError):
        raise ValueError(f"field {field}: is numeric, its keys must be numbers") from None
    if numbers.ndim != 1 or np.isinf(numbers).any():
        raise ValueError(f"field {field}: is numeric, its keys must be one row of finite numbers, or None")
    with np.errstate(invalid="ignore", divide="ignore"):
        buckets = np.where(numbers > 2, 3 + np.floor(np.log(numbers) ** 2), np.floor(numbers))
    return ["" if bucket != bucket else str(int(bucket)) for bucket in buckets.tolist()]
