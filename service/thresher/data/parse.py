"""Raw columns of any type as numbers, keys and lists of keys, one chunk at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_key(kind: pa.DataType) -> bool:
    """Whether a column's values can be ids: text, integers, numbers, truth values, dates and times."""
    types = pa.types
    if types.is_dictionary(kind):
        return is_key(kind.value_type)
    return (
        is_text(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_boolean(kind)
        or types.is_decimal(kind)
        or types.is_temporal(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def numbers(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """A column as numbers.

    Args:
        array: n numbers, truth values, times, or texts of numbers; null, NaN and empty text are missing.

    Returns:
        float64[n], NaN where missing or unreadable, and bool[n], true where unreadable or infinite.
    """
    array = _plain(array)
    if is_text(array.type):
        array = pc.if_else(pc.equal(pc.fill_null(array, ""), ""), None, array)
        converted = _cast_each(array)
        unreadable = np.asarray(converted.is_null()) & ~np.asarray(array.is_null())
    else:
        if pa.types.is_temporal(array.type):
            array = array.cast(pa.int64())
        converted = array.cast(pa.float64(), safe=False)
        unreadable = np.zeros(len(array), bool)
    values = converted.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    infinite = np.isinf(values)
    return np.where(infinite, np.nan, values), unreadable | infinite


def times(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """A column of times as uint64[n] that sort as the times do, and bool[n], true where it is no time.

    Integers and time stamps keep all their bits; texts and floats go by float64.
    """
    array = _plain(array)
    if pa.types.is_temporal(array.type) or pa.types.is_integer(array.type):
        missing = np.asarray(array.is_null())
        whole = array.cast(pa.int64(), safe=False).fill_null(0).to_numpy()
        return whole.view(np.uint64) ^ np.uint64(1 << 63), missing
    values, bad = numbers(array)
    bits = (values + 0.0).view(np.uint64)  # + 0.0 makes -0.0 equal to 0.0
    negative = bits >> np.uint64(63) == 1
    return np.where(negative, ~bits, bits | np.uint64(1 << 63)), bad | np.isnan(values)


def keys(array: pa.Array) -> tuple[list[str], np.ndarray]:
    """The different keys of a column, and which of them each row has.

    A key is text: an integer in decimals, a float of integral value as that integer, missing as the empty text.

    Returns:
        keys (one may stand there twice), and int64[n] of positions in them.
    """
    encoded = pc.dictionary_encode(_plain(array), null_encoding="encode")
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    distinct = encoded.dictionary
    values = distinct.to_pylist()
    if not is_text(distinct.type):
        return [_key(value) for value in values], codes
    return (["" if value is None else value for value in values] if distinct.null_count else values), codes


def lists(array: pa.Array, separator: str) -> tuple[pa.Array, np.ndarray]:
    """A column of lists as its entries and their number in each row; empty and missing entries are left out.

    Args:
        array: n lists, or n texts with `separator` between the entries.
        separator: one character.

    Returns:
        the entries, row after row, and int64[n] lengths.
    """
    array = _plain(array)
    if not is_list(array.type):
        text = array if is_text(array.type) else array.cast(pa.string())
        array = pc.split_pattern(text, separator)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    entries = pc.list_flatten(array)
    kept = entries.is_valid()
    if is_text(entries.type):
        kept = pc.and_(kept, pc.fill_null(pc.not_equal(entries, ""), False))
    kept_mask = np.asarray(kept)
    if not kept_mask.all():
        before = np.concatenate([[0], np.cumsum(kept_mask)])
        ends = np.cumsum(lengths)
        lengths = before[ends] - before[ends - lengths]
        entries = entries.filter(kept)
    return entries, lengths


def log_buckets(values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Keys of the log buckets of numbers, in the form of `keys`.

    x > 2 is in bucket 3 + floor(ln(x)^2), x <= 2 in bucket floor(x): small counts stay apart from each other and from
    the larger ones. A missing value (NaN) has the empty key.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        buckets = np.where(values > 2, 3 + np.floor(np.log(values) ** 2), np.floor(values))
    distinct, codes = np.unique(buckets, return_inverse=True)
    return ["" if math.isnan(bucket) else str(int(bucket)) for bucket in distinct.tolist()], codes.astype(np.int64)


def dense(values: np.ndarray) -> np.ndarray:
    """Numbers as dense inputs, float32[n]: ln(1 + x) of x >= 0, x itself below, 0 where missing."""
    known = np.nan_to_num(values, nan=0.0)
    inputs: np.ndarray = np.where(known >= 0, np.log1p(np.maximum(known, 0.0)), known)
    return inputs.astype(np.float32)


def _plain(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _key(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _cast_each(array: pa.Array) -> pa.Array:
    """Text as float64, null where it is no number: halves the array until the bad entries stand alone."""
    try:
        return array.cast(pa.float64())
    except pa.ArrowInvalid:
        if len(array) == 1:
            return pa.nulls(1, pa.float64())
        half = len(array) // 2
        return pa.concat_arrays([_cast_each(array.slice(0, half)), _cast_each(array.slice(half))])
