"""Ids of composed tables as rows, where the rows are on several ranks.

TorchRec sends an id to the rank that has its row. Vectors that are sums of rows need no more than that: a bag of ids is
the bag of all of their buckets' rows, and every rank looks its part up like that of a plain table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.embedding.partitions import Partitions


def bucket_rows(features: KeyedJaggedTensor, partitions: Sequence[Partitions | None]) -> KeyedJaggedTensor:
    """The features with rows for the ids of composed tables; each row has its id's sample weight.

    Args:
        features: equally many bags of each.
        partitions: of each feature's table, none if it is not composed.
    """
    rows = [
        ids.long().unsqueeze(1) if own is None else own.rows_of(ids)
        for ids, own in zip(features.values().split(features.length_per_key()), partitions, strict=True)
    ]
    counts = torch.tensor([part.shape[1] for part in rows], device=features.device())
    lengths_FB = features.lengths().view(len(rows), -1) * counts.unsqueeze(1)
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=torch.cat([part.flatten() for part in rows]),
        weights=_repeated(features, rows),
        lengths=lengths_FB.flatten(),
        stride=features.stride(),
    )


def _repeated(features: KeyedJaggedTensor, rows: Sequence[Tensor]) -> Tensor | None:
    factors = features.weights_or_none()
    if factors is None:
        return None
    parts = factors.split([part.shape[0] for part in rows])
    return torch.cat([own.repeat_interleave(part.shape[1]) for own, part in zip(parts, rows, strict=True)])
