"""Magnitude: of a trained uniform model, the entries with the largest absolute values stay.

The baseline that many elaborate methods do not beat. Rows that training never saw hold random initial values, which
say nothing: they go first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thresher.embedding.sharding import ShardedCollection
from thresher.kernels import layout
from thresher.methods.masks import ShardMask
from thresher.methods.ranking import RankedShard, select_largest


def magnitude_masks(
    collection: ShardedCollection, counts: Mapping[str, NDArray[np.integer[Any]]], kept: int
) -> list[ShardMask]:
    """Masks of this rank's shards that keep exactly `kept` entries over all ranks.

    Args:
        collection: plain tables.
        counts: training occurrences of each row [N], by table.
        kept: entries that stay.
    """
    place = {name: number for number, name in enumerate(collection._table_names)}
    held = [(kernel, part) for kernel in collection.kernels() for part in kernel.parts() if part.counted]
    ranked = []
    for kernel, part in held:
        values_ND = layout.elements(kernel.group.weights, part.table)
        last = part.first_row + part.table.rows
        unseen_N1 = torch.from_numpy(counts[part.name][part.first_row : last] == 0).unsqueeze(1).to(values_ND.device)

        def keys(start: int, stop: int, values_ND: Tensor = values_ND, unseen_N1: Tensor = unseen_N1) -> Tensor:
            return values_ND[start:stop].float().abs().masked_fill(unseen_N1[start:stop], -torch.inf)

        ranked.append(RankedShard(place[part.name], part.first_row, part.first_column, part.table.rows, keys))
    masks = select_largest(ranked, kept)
    return [
        ShardMask(part.name, shard.table, part.first_row, part.first_column, mask)
        for (_, part), shard, mask in zip(held, ranked, masks, strict=True)
    ]
