"""Factorization machine (Rendle, ICDM 2010).

Shapes: B samples, F fields, D columns of a vector (the first is the first-order weight, K = D − 1 are factors), N
numeric inputs. The first-order weight is a column of its field's table, not a table of its own: one lookup and one
exchange between ranks instead of two, and it is thresholded, pruned and counted with the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.models.fields import Fields
from thresher.spec import ModelSpec


def interactions(factors_BFK: Tensor) -> Tensor:
    """Sum over all pairs of fields of their factors' inner product, [B], in time linear in F (Rendle, lemma 3.1)."""
    return 0.5 * (factors_BFK.sum(1).square() - factors_BFK.square().sum(1)).sum(1)


class FM(nn.Module):
    """Bias, first-order weights and pairwise interactions of the fields; numeric inputs enter linearly.

    Args:
        fields: the fields, equally wide.
        numeric: number of numeric inputs N.
        spec: of the model; has no option that counts here.
    """

    equal_dims = True

    def __init__(self, fields: Fields, numeric: int, spec: ModelSpec) -> None:
        super().__init__()
        del spec
        self.fields = fields
        self.bias = nn.Parameter(torch.zeros(1))
        self.numeric = nn.Linear(numeric, 1, bias=False) if numeric else None

    def forward(self, sparse: KeyedJaggedTensor, dense_BN: Tensor) -> Tensor:
        """Logits [B]."""
        return self.logits(*self.terms(sparse), dense_BN)

    def terms(self, sparse: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """The fields' first-order weights [B, F] and factors [B, F, K]."""
        vectors_BFD = self.fields.stacked(sparse)
        first_BF1, factors_BFK = vectors_BFD.split([1, vectors_BFD.shape[2] - 1], dim=2)
        return first_BF1.squeeze(2), factors_BFK

    def logits(self, first_BF: Tensor, factors_BFK: Tensor, dense_BN: Tensor) -> Tensor:
        """Logits [B] of the fields' terms and the numeric inputs."""
        logits_B = self.bias + first_BF.sum(1) + interactions(factors_BFK)
        return logits_B if self.numeric is None else logits_B + self.numeric(dense_BN).squeeze(1)
