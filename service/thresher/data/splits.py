"""Which samples train, validate and test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from thresher.data.hashing import counter_bits, uniform

SPLITS = ("train", "validation", "test")
NO_SPLIT = 255  # in an array of split numbers: the column's value is none of the three
SPLIT_STREAM = 1 << 40
DIGIT_BITS = 16
BLOCK = 1 << 20  # times looked at together


def random_split(rows: np.ndarray, seed: int, fractions: Sequence[float]) -> np.ndarray:
    """Split numbers uint8[n] of raw row numbers int64[n], by a hash of (seed, row number)."""
    u = uniform(counter_bits(seed, SPLIT_STREAM, rows))
    return (u >= fractions[0]).astype(np.uint8) + (u >= fractions[0] + fractions[1])


def column_split(values: Sequence[str], wanted: Sequence[str | int]) -> np.ndarray:
    """Split numbers uint8[n] of a column's values, NO_SPLIT for any other value."""
    numbers = {str(value): number for number, value in enumerate(wanted)}
    return np.array([numbers.get(value, NO_SPLIT) for value in values], np.uint8)


class TimeSplit:
    """Oldest samples first into train; samples of one time in the order of their rows.

    The times lie in a file of uint64 and are looked at one block after the other: memory does not grow with them.
    """

    def __init__(self, path: Path, fractions: Sequence[float]) -> None:
        """Find the time at which each split ends, and how many samples of that very time it still takes."""
        count = path.stat().st_size // 8
        self._times = np.memmap(path, np.uint64, "r") if count else np.empty(0, np.uint64)
        ends = [round(fractions[0] * count), round((fractions[0] + fractions[1]) * count)]
        self._ends = [self._end(end) if 0 < end < count else None for end in ends]
        self._all = [end >= count for end in ends]  # of splits that take all or nothing
        self._equal_seen = [0, 0]
        self._position = 0

    def next(self, count: int) -> np.ndarray:
        """Split numbers uint8[count] of the next samples."""
        times = np.asarray(self._times[self._position : self._position + count])
        self._position += count
        split = np.zeros(len(times), np.uint8)
        for which, end in enumerate(self._ends):
            if end is None:
                split += not self._all[which]
                continue
            last, room = end
            equal = times == last
            nth = np.cumsum(equal) + self._equal_seen[which]
            split += (times > last) | (equal & (nth > room))
            self._equal_seen[which] += int(equal.sum())
        return split

    def _end(self, rank: int) -> tuple[int, int]:
        """The rank-th smallest time (from 1), and the number of samples of that time among the `rank` smallest."""
        prefix = 0
        for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):  # radix selection, most significant digit first
            counts = np.zeros(1 << DIGIT_BITS, np.int64)
            for start in range(0, len(self._times), BLOCK):
                block = np.asarray(self._times[start : start + BLOCK])
                if shift + DIGIT_BITS < 64:
                    block = block[block >> np.uint64(shift + DIGIT_BITS) == prefix]
                digits = (block >> np.uint64(shift)) & np.uint64((1 << DIGIT_BITS) - 1)
                counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
            below = np.cumsum(counts)
            digit = int(np.searchsorted(below, rank))
            rank -= int(below[digit] - counts[digit])
            prefix = prefix << DIGIT_BITS | digit
        return prefix, rank
