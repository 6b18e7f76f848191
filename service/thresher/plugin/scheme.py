"""A scheme: exactly the parameters that stay of a model's tables, in the memory of every rank or in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

_BUDGET = "budget"


class Scheme:
    """Which parameters of which tables stay; every rank has all of it, a bit for each parameter.

    Give it to `thresher.Masked`, to train what stays, or to `thresher.export`.

    Attributes:
        budget: that it holds: below 1 a share of the parameters, else their number; None if nobody said.
        masks: by table uint8 [N, ⌈D/8⌉], for N rows and D columns: bit j mod 8 of byte j div 8 says whether column j of
            a row stays.
    """

    def __init__(self, masks: Mapping[str, NDArray[np.uint8]], budget: float | int | None = None) -> None:
        self.masks = dict(masks)
        self.budget = budget

    def packed(self, table: str, first_row: int, rows: int) -> Tensor:
        """Some rows of a table's mask, uint8 [rows, ⌈D/8⌉].

        Raises:
            ValueError: if the scheme has no such table or rows.
        """
        if table not in self.masks:
            raise ValueError(f"table {table}: the scheme has none; it has {', '.join(self.masks)}")
        if first_row + rows > len(self.masks[table]):
            raise ValueError(
                f"table {table}: the scheme has {len(self.masks[table])} rows of it, but the table needs "
                f"{first_row + rows}; take a scheme made for these tables"
            )
        return torch.from_numpy(self.masks[table][first_row : first_row + rows])

    def kept(self, table: str) -> int:
        """Parameters of a table that stay.

        Raises:
            ValueError: if the scheme has no such table.
        """
        if table not in self.masks:
            raise ValueError(f"table {table}: the scheme has none; it has {', '.join(self.masks)}")
        return int(np.bitwise_count(self.masks[table]).sum())

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file; one rank is enough. Its folder must be there."""
        save_file(self.masks, str(path), metadata={_BUDGET: json.dumps(self.budget)})

    @classmethod
    def load(cls, path: str | Path) -> Scheme:
        """Read what `save` wrote, or the `masks.safetensors` of a job's scheme.

        Raises:
            ValueError: if there is no such file.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; a scheme's save() writes one")
        with safe_open(str(path), framework="np") as file:
            budget = json.loads((file.metadata() or {}).get(_BUDGET, "null"))
            return cls({name: file.get_tensor(name) for name in file.keys()}, budget)  # noqa: SIM118 - not a dict
