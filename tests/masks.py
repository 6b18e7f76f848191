"""Masks for tests that train masked tables without a search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.embedding.initial import fill_uniform


@dataclass(frozen=True)
class RandomMasks:
    """A share of every table's entries, drawn for each by itself; every seventh row keeps nothing."""

    dim: int
    share: float = 0.3

    def packed(self, table: str, first_row: int, rows: int) -> Tensor:
        """See `MaskSource`."""
        values = torch.empty(rows, self.dim)
        fill_uniform(values, 7, f"mask of {table}", 1.0, first_row)
        kept = (values < 2 * self.share - 1) & ((torch.arange(first_row, first_row + rows) % 7) != 3).unsqueeze(1)
        bits = torch.nn.functional.pad(kept, (0, -self.dim % 8)).view(rows, -(-self.dim // 8), 8).to(torch.uint8)
        return (bits << torch.arange(8, dtype=torch.uint8)).sum(2).to(torch.uint8)
