"""DeepFM (Guo et al., IJCAI 2017). Shapes as in `fm`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.models.fm import FM, interactions


class DeepFM(FM):
    """A factorization machine and a network over the same factors and numeric inputs, added.

    Args:
        embeddings: collection with one table of D columns a field.
        fields: the fields, in the order of the batch.
        numeric: number of numeric inputs N.
        dim: columns D of a table.
        hidden: widths of the hidden layers.
        dropout: share of hidden units dropped in training.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        fields: Sequence[str],
        numeric: int,
        dim: int,
        hidden: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__(embeddings, fields, numeric)
        layers: list[nn.Module] = []
        width = len(fields) * (dim - 1) + numeric
        for units in hidden:
            layers += [nn.Linear(width, units), nn.ReLU(), nn.Dropout(dropout)]
            width = units
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, sparse: KeyedJaggedTensor, dense_BN: Tensor) -> Tensor:
        """Logits [B]."""
        vectors_BFD = self.vectors(sparse)
        factors_BFK = vectors_BFD[:, :, 1:]
        deep_B: Tensor = self.deep(torch.cat([factors_BFK.flatten(1), dense_BN], dim=1)).squeeze(1)
        logits_B: Tensor = self.bias + vectors_BFD[:, :, 0].sum(1) + interactions(factors_BFK) + deep_B
        return logits_B if self.numeric is None else logits_B + self.numeric(dense_BN).squeeze(1)
