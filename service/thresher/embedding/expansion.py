"""Ids of a batch as rows of plain tables, before the lookup: what needs more of a batch than a table's kernel sees."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.embedding.double_hash import DoubleHash
from thresher.embedding.separate import Separate


class Expansion:
    """Puts rows in the place of some fields' ids.

    Args:
        fields: how, by name; the others keep their ids.
    """

    def __init__(self, fields: Mapping[str, Separate | DoubleHash]) -> None:
        self._fields = fields

    def rows(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The batch with rows.

        Raises:
            ValueError: if ids have sample weights.
        """
        if sparse.weights_or_none() is not None:
            raise ValueError("ids with sample weights cannot be expanded; leave out the weights, or the method")
        names: list[str] = []
        parts: list[tuple[Tensor, Tensor]] = []
        lengths_FB = sparse.lengths().view(len(sparse.keys()), -1)
        for key, ids_L, lengths_B in zip(
            sparse.keys(), sparse.values().split(sparse.length_per_key()), lengths_FB, strict=True
        ):
            own = self._fields.get(key)
            names += [key] if own is None else own.names(key)
            parts += [(ids_L, lengths_B)] if own is None else own.expanded(ids_L, lengths_B)
        return KeyedJaggedTensor(
            keys=names,
            values=torch.cat([rows_L.long() for rows_L, _ in parts]),
            lengths=torch.cat([lengths_B.long() for _, lengths_B in parts]),
            stride=sparse.stride(),
        )

    def pooled(self, name: str, vectors_BD: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """A field's pooled vectors, from those that the collection gives."""
        own = self._fields.get(name)
        if isinstance(own, DoubleHash) and own.mean:
            lengths_B: Tensor = sparse[name].lengths()
            return vectors_BD / lengths_B.clamp(min=1).unsqueeze(1)
        return vectors_BD
