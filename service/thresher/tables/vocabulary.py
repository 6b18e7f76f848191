"""A field's vocabulary on disk: its raw keys in sorted order, and the table row of each.

Integer keys are one int64 array. Strings are their UTF-8 bytes one after another, in byte order, with where each
begins. Rows and beginnings take the narrowest unsigned type: for small fields they are most of the file. A string is
found by bisection in the mapped file, so that a vocabulary of any size costs no memory and no time to load.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from thresher.tables import safetensors_file

Keys = Sequence[str] | npt.NDArray[np.int64]
Form = Literal["utf8", "int64"]


def write(path: Path, keys: Keys, rows: npt.NDArray[np.int64], field: str) -> Form:
    """Write the vocabulary in which `keys[i]` has row `rows[i]`.

    Args:
        path: the file.
        keys: strings, or an array of int64; each once.
        rows: as many.
        field: name, for errors.

    Returns:
        The form that the file has.

    Raises:
        ValueError: if a key stands there twice, or is no string that UTF-8 can hold.
    """
    if isinstance(keys, np.ndarray):
        if keys.dtype != np.int64 or keys.ndim != 1:
            raise ValueError(f"field {field}: keys must be strings or one int64 array, not {keys.dtype} {keys.shape}")
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        if len(twice := ordered[1:][ordered[1:] == ordered[:-1]]):
            raise ValueError(f"field {field}: key {twice[0]} stands in the vocabulary twice")
        safetensors_file.write(path, {"keys": ordered, "rows": _narrow(rows[order])})
        return "int64"
    encoded = [_encode(key, field) for key in keys]
    by_bytes = sorted(range(len(encoded)), key=encoded.__getitem__)
    for left, right in itertools.pairwise(by_bytes):
        if encoded[left] == encoded[right]:
            raise ValueError(f"field {field}: key {keys[left]!r} stands in the vocabulary twice")
    starts = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(encoded[i]) for i in by_bytes], out=starts[1:])
    safetensors_file.write(
        path,
        {
            "bytes": np.frombuffer(b"".join(encoded[i] for i in by_bytes), np.uint8),
            "starts": _narrow(starts),
            "rows": _narrow(rows[np.array(by_bytes, np.int64)]),
        },
    )
    return "utf8"


def _narrow(numbers: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    top = int(numbers.max(initial=0))
    return numbers.astype(next(dtype for dtype in _UNSIGNED if top <= np.iinfo(dtype).max))


_UNSIGNED = (np.uint8, np.uint16, np.uint32, np.uint64)


def _encode(key: Any, field: str) -> bytes:
    if not isinstance(key, str):
        raise ValueError(f"field {field}: has strings as keys, got {key!r:.80}")
    try:
        return key.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {field}: key {key!r:.80} has half a surrogate pair, which UTF-8 cannot hold") from None


def _integer(key: str) -> int | None:
    """The integer that `key` is the decimal form of, where it fits into 64 bits."""
    try:
        value = int(key)
    except ValueError:
        return None
    return value if str(value) == key and -(2**63) <= value < 2**63 else None


class Vocabulary:
    """The raw keys of one field, for looking up their rows.

    Raises:
        ValueError: if the arrays are not a vocabulary of this form; names `where`.
    """

    def __init__(
        self, arrays: dict[str, npt.NDArray[Any]], form: Form, keys: int, rows: int, oov_row: int, where: str
    ) -> None:
        """Check the arrays of a vocabulary's file: `keys` keys of a field of `rows` ids; others have `oov_row`."""
        shapes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in arrays.items()}
        expected: dict[str, tuple[int, ...]] = {"rows": (keys,)}
        if form == "int64":
            expected["keys"] = (keys,)
        else:
            expected |= {"starts": (keys + 1,), "bytes": shapes.get("bytes", (0,))[:1]}
        if shapes != expected:
            raise ValueError(f"{where}: has tensors {shapes}, must have {expected} for {keys} keys of form {form}")
        for name, array in arrays.items():
            types = {"keys": (np.int64,), "bytes": (np.uint8,)}.get(name, _UNSIGNED)
            if array.dtype not in types:
                raise ValueError(f"{where}: {name}: type {array.dtype} is not allowed")
        self.form = form
        self._rows = arrays["rows"]
        self._oov_row = oov_row
        if keys and self._rows.max() >= rows:
            raise ValueError(f"{where}: rows: must be below {rows}, found {self._rows.max()}")
        if form == "int64":
            self._keys = arrays["keys"]
            if not (self._keys[1:] > self._keys[:-1]).all():
                raise ValueError(f"{where}: keys: must rise")
        else:
            starts = arrays["starts"]
            if starts[0] != 0 or starts[-1] != len(arrays["bytes"]) or not (starts[1:] >= starts[:-1]).all():
                raise ValueError(f"{where}: starts: must rise from 0 to the number of bytes, {len(arrays['bytes'])}")
            self._strings = _Strings(arrays["bytes"], starts)

    def rows(self, keys: Sequence[str] | npt.NDArray[np.integer[Any]], field: str) -> npt.NDArray[np.int64]:
        """The row `[L]` of each key, the OOV row where it is unknown.

        Args:
            keys: texts `[L]`, or, only in a vocabulary of integers, an array `[L]` of them.
            field: name, for errors.

        Raises:
            ValueError: if a text is not one that UTF-8 can hold.
        """
        if isinstance(keys, np.ndarray):
            return self._integer_rows(keys)
        # Requests repeat keys, and a bisection costs microseconds: each distinct key is searched once.
        distinct = dict.fromkeys(keys)
        if self.form == "utf8":
            found = [self._string_row(_encode(key, field)) for key in distinct]
        else:
            integers = [_integer(key) for key in distinct]
            known = np.array([integer is not None for integer in integers], np.bool_)
            rows = self._integer_rows(np.array([integer or 0 for integer in integers], np.int64))
            found = np.where(known, rows, self._oov_row).tolist()
        row = dict(zip(distinct, found, strict=True))
        return np.fromiter((row[key] for key in keys), np.int64, len(keys))

    def _integer_rows(self, keys: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        if not len(self._keys):
            return np.full(len(keys), self._oov_row)
        # In int64: beside unsigned keys, searchsorted would compare as floats. What wraps around is unequal below.
        place = np.searchsorted(self._keys, keys.astype(np.int64)).clip(max=len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._rows[place].astype(np.int64), self._oov_row)

    def _string_row(self, key: bytes) -> int:
        place = bisect.bisect_left(self._strings, key)
        known = place < len(self._strings) and self._strings[place] == key
        return int(self._rows[place]) if known else self._oov_row


class _Strings:
    """The sorted strings of a mapped vocabulary, as a sequence for `bisect`."""

    def __init__(self, text: npt.NDArray[np.uint8], starts: npt.NDArray[Any]) -> None:
        self._text = memoryview(text.data)
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, place: int) -> bytes:
        return bytes(self._text[self._starts[place] : self._starts[place + 1]])
