"""The types in which values stand on disk: from float32 and back.

A row of k values takes `value_bytes(dtype, k)` bytes in every type. bf16 is the upper half of a float32, as NumPy has
no such type. int8 and int4 are whole numbers that a scale turns into values; an int4 is stored as itself plus 8, the
first of two in the lower half of a byte.

Shapes: n rows of k values.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Dtype = Literal["fp32", "fp16", "bf16", "int8", "int4"]
# The type that a file declares for values; two int4 share a U8.
STORED: dict[Dtype, np.dtype[Any]] = {
    "fp32": np.dtype("<f4"),
    "fp16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
    "int4": np.dtype("u1"),
}
BITS: dict[Dtype, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
# The largest whole number of the types that need scales.
LIMITS: dict[Dtype, int] = {"int8": 127, "int4": 7}
MAX_SCALE = 2.0**120  # times 127 it is still finite

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def value_bytes(dtype: Dtype, count: int) -> int:
    """Bytes of a row of `count` values."""
    return (count * BITS[dtype] + 7) // 8


def scales_of(largest: Floats, dtype: Dtype) -> Floats:
    """Scales under which the largest absolute values become the type's largest whole number."""
    return largest / np.float32(LIMITS[dtype])


def encode(values_nk: Floats, dtype: Dtype, scales: Floats | None) -> Bytes:
    """Bytes `[n, value_bytes(dtype, k)]` of values; what the type cannot hold becomes infinite in it.

    Args:
        values_nk: finite values.
        dtype: of the bytes.
        scales: for int8 and int4, in a shape that broadcasts to that of the values.
    """
    rows = len(values_nk)
    if scales is not None:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            wholes = np.rint(np.where(scales > 0, values_nk / scales, 0))
        limit = LIMITS[dtype]
        wholes_nk = wholes.clip(-limit, limit).astype(np.int8)
        if dtype == "int8":
            return wholes_nk.view(np.uint8)
        halves_nk = (wholes_nk + 8).view(np.uint8)
        if halves_nk.shape[1] % 2:
            halves_nk = np.concatenate([halves_nk, np.zeros((rows, 1), np.uint8)], axis=1)
        return np.bitwise_or(halves_nk[:, ::2], np.left_shift(halves_nk[:, 1::2], 4))
    if dtype == "bf16":
        bits_nk = np.ascontiguousarray(values_nk).view(np.uint32)
        # To the nearest, and to the even one of two that are as near. In 64 bits, which cannot run over.
        even_nk = (bits_nk.astype(np.uint64) + 0x7FFF + (bits_nk >> 16 & 1)) >> 16
        return even_nk.astype("<u2").view(np.uint8).reshape(rows, 2 * values_nk.shape[1])
    with np.errstate(over="ignore"):
        stored_nk = np.ascontiguousarray(values_nk.astype(STORED[dtype]))
    return stored_nk.view(np.uint8).reshape(rows, value_bytes(dtype, values_nk.shape[1]))


def decode(data: Bytes, dtype: Dtype, count: int) -> Floats:
    """Values float32 `[n, count]` of bytes `[n, value_bytes(dtype, count)]`; of int8 and int4 the whole numbers."""
    if dtype == "int4":
        halves = np.stack([data & 15, data >> 4], axis=2).reshape(len(data), 2 * data.shape[1])[:, :count]
        return halves.astype(np.float32) - np.float32(8)
    stored = np.ascontiguousarray(data).view(STORED[dtype]).reshape(len(data), count)
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def all_finite(data: Bytes, dtype: Dtype) -> bool:
    """Whether all of the values in some rows' bytes are finite."""
    if dtype in LIMITS:
        return True
    stored = np.ascontiguousarray(data).reshape(-1).view(STORED[dtype])
    if dtype == "bf16":
        return not bool((stored & 0x7F80 == 0x7F80).any())
    return bool(np.isfinite(stored).all())


def check_scales(scales: npt.NDArray[Any], where: str) -> None:
    """Check the scales of a mapped table.

    Raises:
        ValueError: if one is not from 0 to 2^120.
    """
    if not ((scales >= 0) & (scales <= MAX_SCALE)).all():
        raise ValueError(f"{where}: scales: must be finite, from 0 to 2^120")
