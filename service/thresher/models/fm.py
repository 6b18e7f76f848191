"""Factorization machine (Rendle, ICDM 2010).

Shapes: B samples, F fields, D columns of a table (the first is the first-order weight, K = D − 1 are factors), N
numeric inputs. The first-order weight is a column of its field's table, not a table of its own: one lookup and one
exchange between ranks instead of two, and it is thresholded, pruned and counted with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def interactions(factors_BFK: Tensor) -> Tensor:
    """Sum over all pairs of fields of their factors' inner product, [B], in time linear in F (Rendle, lemma 3.1)."""
    return 0.5 * (factors_BFK.sum(1).square() - factors_BFK.square().sum(1)).sum(1)


class FM(nn.Module):
    """Bias, first-order weights and pairwise interactions of the fields; numeric inputs enter linearly.

    Args:
        embeddings: collection with one table of D columns a field.
        fields: the fields, in the order of the batch.
        numeric: number of numeric inputs N.
    """

    def __init__(self, embeddings: nn.Module, fields: Sequence[str], numeric: int) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.fields = list(fields)
        self.bias = nn.Parameter(torch.zeros(1))
        self.numeric = nn.Linear(numeric, 1, bias=False) if numeric else None

    def vectors(self, sparse: KeyedJaggedTensor) -> Tensor:
        """The fields' pooled vectors [B, F, D]."""
        pooled = self.embeddings(sparse)
        return torch.stack([pooled[field] for field in self.fields], dim=1)

    def forward(self, sparse: KeyedJaggedTensor, dense_BN: Tensor) -> Tensor:
        """Logits [B]."""
        vectors_BFD = self.vectors(sparse)
        logits_B = self.bias + vectors_BFD[:, :, 0].sum(1) + interactions(vectors_BFD[:, :, 1:])
        return logits_B if self.numeric is None else logits_B + self.numeric(dense_BN).squeeze(1)
