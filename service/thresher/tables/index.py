"""How a record says which of its D columns it has: a bit mask, or a list of its k columns where that is shorter.

A list is rising and split: each column's lowest `low_bits` bits stand one after another, k times `low_bits`; the rest
of each column, its group, in unary: column i of group g sets bit g + i of the k + groups - 1 bits that follow. Where
all columns are one group they are left out, and what remains is a plain list of columns. The form follows from D and k
alone, so that nothing of it is stored. Bits count from the lowest of the first byte. (Elias and Fano's code, of which
a record of k values has always as many bits: within 5 % of the least possible for 1 to 10 % of 16 to 256 columns.)

Shapes: n records, B bytes of an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Columns = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Index:
    """Form of the index of records that have k columns of D.

    Attributes:
        dim: D.
        kept: k.
        form: `none` where none or all of the columns are there.
        bytes: B.
        low_bits: of a list, bits of each column that stand apart from its group.
    """

    dim: int
    kept: int
    form: Literal["none", "mask", "list"]
    bytes: int
    low_bits: int = 0

    @property
    def groups(self) -> int:
        """Groups that the columns of a list are in."""
        return -(-self.dim >> self.low_bits)

    @property
    def high_bits(self) -> int:
        """Bits of a list that hold the groups."""
        return self.kept + self.groups - 1 if self.groups > 1 else 0

    def encode(self, mask_nD: npt.NDArray[np.bool_]) -> Bytes:
        """Indices `[n, B]` of rows that keep k columns each."""
        if self.form == "none":
            return np.empty((len(mask_nD), 0), np.uint8)
        if self.form == "mask":
            return np.packbits(mask_nD, axis=1, bitorder="little")
        columns_nk = np.nonzero(mask_nD)[1].reshape(-1, self.kept)
        low = columns_nk[:, :, None] >> np.arange(self.low_bits) & 1
        bits = np.zeros((len(mask_nD), 8 * self.bytes), np.uint8)
        bits[:, : self.kept * self.low_bits] = low.reshape(len(mask_nD), -1)
        if self.high_bits:
            ones_nk = (columns_nk >> self.low_bits) + np.arange(self.kept) + self.kept * self.low_bits
            np.put_along_axis(bits, ones_nk, 1, axis=1)
        return np.packbits(bits, axis=1, bitorder="little")

    def decode(self, data_nB: Bytes, where: str) -> Columns:
        """Columns `[n, k]` of indices, rising in each record.

        Raises:
            ValueError: if an index is none that `encode` gives; names `where`.
        """
        rows = len(data_nB)
        if self.form == "none":
            return np.broadcast_to(np.arange(self.kept), (rows, self.kept))
        bits = np.unpackbits(data_nB, axis=1, bitorder="little")
        if self.form == "mask":
            if bits[:, self.dim :].any():
                raise ValueError(f"{where}: bits beyond column {self.dim - 1} are set")
            if (bits.sum(axis=1, dtype=np.int64) != self.kept).any():
                raise ValueError(f"{where}: a mask does not have {self.kept} bits set")
            return np.nonzero(bits)[1].reshape(rows, self.kept)
        after_low = self.kept * self.low_bits
        low = bits[:, :after_low].reshape(rows, self.kept, self.low_bits).astype(np.int64)
        columns_nk: Columns = (low << np.arange(self.low_bits)).sum(axis=2)
        high = bits[:, after_low : after_low + self.high_bits]
        if bits[:, after_low + self.high_bits :].any():
            raise ValueError(f"{where}: bits after a list are set")
        if self.high_bits:
            if (high.sum(axis=1, dtype=np.int64) != self.kept).any():
                raise ValueError(f"{where}: a list does not have {self.kept} columns")
            groups_nk = np.nonzero(high)[1].reshape(rows, self.kept) - np.arange(self.kept)
            columns_nk += groups_nk << self.low_bits
        if (np.diff(columns_nk, axis=1) <= 0).any() or (columns_nk[:, -1] >= self.dim).any():
            raise ValueError(f"{where}: the columns of a list must rise and be below {self.dim}")
        return columns_nk


@lru_cache(maxsize=4096)
def index_of(dim: int, kept: int) -> Index:
    """The shortest form of index for `kept` of `dim` columns.

    Of equally short ones it is the fastest to read: a mask, then lists in the order of falling low bits.
    """
    if kept in (0, dim):
        return Index(dim, kept, "none", 0)
    forms = [Index(dim, kept, "mask", (dim + 7) // 8)]
    for low_bits in range((dim - 1).bit_length(), 0, -1):
        one = Index(dim, kept, "list", 0, low_bits)
        forms.append(Index(dim, kept, "list", (kept * low_bits + one.high_bits + 7) // 8, low_bits))
    return min(forms, key=lambda form: form.bytes)
