"""DeepFM (Guo et al., IJCAI 2017). Shapes as in `fm`."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.models.fields import Fields
from thresher.models.fm import FM
from thresher.models.mlp import mlp
from thresher.spec import ModelSpec


class DeepFM(FM):
    """A factorization machine and a network over the same factors and numeric inputs, added.

    Args:
        fields: the fields, equally wide.
        numeric: number of numeric inputs N.
        spec: of the model; `hidden` and `dropout` are the network's.
    """

    def __init__(self, fields: Fields, numeric: int, spec: ModelSpec) -> None:
        super().__init__(fields, numeric, spec)
        self.deep = mlp(sum(dim - 1 for dim in fields.dims) + numeric, spec.hidden, spec.dropout, outputs=1)

    def forward(self, sparse: KeyedJaggedTensor, dense_BN: Tensor) -> Tensor:
        """Logits [B]."""
        first_BF, factors_BFK = self.terms(sparse)
        deep_B: Tensor = self.deep(torch.cat([factors_BFK.flatten(1), dense_BN], dim=1)).squeeze(1)
        return self.logits(first_BF, factors_BFK, dense_BN) + deep_B
