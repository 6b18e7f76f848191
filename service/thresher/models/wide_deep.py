"""Wide & Deep (Cheng et al., DLRS 2016). Shapes as in `fields`, and N numeric inputs.

The wide part's weights are the first column of each field's table, as in `fm`. Its crossed columns are left out: give
a cross of two columns a field of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.models.fields import Fields
from thresher.models.mlp import mlp
from thresher.spec import ModelSpec


class WideDeep(nn.Module):
    """A linear model and a network over the fields' remaining columns and the numeric inputs, added.

    Args:
        fields: the fields, of any widths; one with a single column has the wide weight alone.
        numeric: number of numeric inputs N.
        spec: of the model; `hidden` and `dropout` are the network's.
    """

    equal_dims = False

    def __init__(self, fields: Fields, numeric: int, spec: ModelSpec) -> None:
        super().__init__()
        self.fields = fields
        self.bias = nn.Parameter(torch.zeros(1))
        self.numeric = nn.Linear(numeric, 1, bias=False) if numeric else None
        inputs = sum(dim - 1 for dim in fields.dims) + numeric
        self.deep = mlp(inputs, spec.hidden, spec.dropout, outputs=1) if inputs else None

    def forward(self, sparse: KeyedJaggedTensor, dense_BN: Tensor) -> Tensor:
        """Logits [B]."""
        vectors = self.fields(sparse)
        logits_B: Tensor = self.bias + torch.cat([vector_BD[:, :1] for vector_BD in vectors], dim=1).sum(1)
        if self.numeric is not None:
            logits_B = logits_B + self.numeric(dense_BN).squeeze(1)
        if self.deep is not None:
            inputs_BI = torch.cat([*(vector_BD[:, 1:] for vector_BD in vectors), dense_BN], dim=1)
            logits_B = logits_B + self.deep(inputs_BI).squeeze(1)
        return logits_B
