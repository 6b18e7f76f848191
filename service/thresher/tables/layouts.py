"""How each layout of a table turns row ids into vectors.

Shapes: N rows, D columns, B mask bytes of a row, K kept values, L ids of a lookup.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from thresher.tables.format import unpack_masks

# Rows that share one 64-bit start. Below 65: their other starts, less than 64 * 1,024, then fit into 16 bits.
BLOCK_ROWS = 64
# Values or rows looked at together when a table is checked: bounds the memory that this takes.
CHECK_ROWS = 1024 * BLOCK_ROWS


class Table(Protocol):
    """A table that is ready for lookups."""

    def lookup(self, ids_L: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Vectors `[L, D]` of rows that are within the table."""


class DenseTable:
    """Values `[N, D]`; a lookup is one gather.

    Raises:
        ValueError: if a value is not finite, or more than `kept` are not 0; names `where`.
    """

    def __init__(self, values_ND: npt.NDArray[Any], kept: int, where: str) -> None:
        """Check a mapped table."""
        check_finite(values_ND.reshape(-1), "values", where)
        nonzero = sum(
            int(np.count_nonzero(values_ND[first : first + CHECK_ROWS]))
            for first in range(0, len(values_ND), CHECK_ROWS)
        )
        if nonzero > kept:
            raise ValueError(f"{where}: values: {nonzero} are not 0, but the manifest says that {kept} are kept")
        self._values_ND = values_ND

    def lookup(self, ids_L: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Vectors `[L, D]` of rows that are within the table."""
        return self._values_ND[ids_L].astype(np.float32)


class BitmapTable:
    """A bit mask `[N, B]` and the kept values `[K]`, row by row.

    Where a row's values start is counted from the masks once, at load, into 2.125 bytes a row: one 64-bit start a block
    of 64 rows and a 16-bit distance from it. It is not stored: it would be as large as the masks at d = 16, and the
    masks have to be read anyway, to hold them against the number of values.

    Raises:
        ValueError: if masks and values do not fit together, or a value is not finite; names `where`.
    """

    def __init__(self, mask_NB: npt.NDArray[np.uint8], values_K: npt.NDArray[Any], dim: int, where: str) -> None:
        """Check a mapped table and count where its rows start."""
        check_finite(values_K, "values", where)
        rows = len(mask_NB)
        self._mask_NB = mask_NB
        self._values_K = values_K
        self._dim = dim
        self._block_starts = np.empty(-(-rows // BLOCK_ROWS), np.int64)
        self._distances_N = np.empty(rows, np.uint16)
        kept = 0
        for first in range(0, rows, CHECK_ROWS):
            chunk_NB = mask_NB[first : first + CHECK_ROWS]
            if dim % 8 and (chunk_NB[:, -1] >> dim % 8).any():
                raise ValueError(f"{where}: mask: bits beyond column {dim - 1} are set")
            counts_N = np.bitwise_count(chunk_NB).sum(axis=1, dtype=np.int64)
            starts_N = kept + np.cumsum(counts_N) - counts_N
            blocks = starts_N[::BLOCK_ROWS]
            self._block_starts[first // BLOCK_ROWS :][: len(blocks)] = blocks
            self._distances_N[first : first + CHECK_ROWS] = starts_N - np.repeat(blocks, BLOCK_ROWS)[: len(starts_N)]
            kept += int(counts_N.sum())
        if kept != len(values_K):
            raise ValueError(f"{where}: mask: has {kept} bits set for {len(values_K)} values")

    def lookup(self, ids_L: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Vectors `[L, D]` of rows that are within the table."""
        mask_LD = unpack_masks(self._mask_NB[ids_L], self._dim)
        counts_L = mask_LD.sum(axis=1)
        starts_L = self._block_starts[ids_L // BLOCK_ROWS] + self._distances_N[ids_L]
        # Of all values of the lookup, one after another: a row's k-th is at its start + k.
        before_L = np.cumsum(counts_L) - counts_L
        places = np.repeat(starts_L - before_L, counts_L) + np.arange(counts_L.sum())
        out_LD = np.zeros(mask_LD.shape, np.float32)
        out_LD[mask_LD] = self._values_K[places]
        return out_LD


def check_finite(values: npt.NDArray[Any], name: str, where: str) -> None:
    """Check a flat array in pieces.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    for first in range(0, len(values), CHECK_ROWS):
        if not np.isfinite(values[first : first + CHECK_ROWS]).all():
            raise ValueError(f"{where}: {name}: a value near position {first} is not finite")
