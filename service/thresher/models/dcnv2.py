"""DCN-V2 (Wang et al., WWW 2021), stacked: the deep network stands on the cross network.

Shapes: B samples, I inputs (all columns of all fields, and the numeric inputs), N numeric inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.models.fields import Fields
from thresher.models.mlp import mlp
from thresher.spec import ModelSpec


class DCNv2(nn.Module):
    """Cross layers x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l over the concatenated inputs x_0, and a network over the last.

    With a rank r, W_l is a product of I × r and r × I (equation 2 of the paper).

    Args:
        fields: the fields, of any widths.
        numeric: number of numeric inputs N.
        spec: of the model; `cross_layers`, `cross_rank`, `hidden` and `dropout` count here.
    """

    equal_dims = False

    def __init__(self, fields: Fields, numeric: int, spec: ModelSpec) -> None:
        super().__init__()
        self.fields = fields
        inputs = sum(fields.dims) + numeric
        self.cross = (
            CrossNet(inputs, spec.cross_layers)
            if spec.cross_rank is None
            else LowRankCrossNet(inputs, spec.cross_layers, spec.cross_rank)
        )
        self.deep = mlp(inputs, spec.hidden, spec.dropout, outputs=1)

    def forward(self, sparse: KeyedJaggedTensor, dense_BN: Tensor) -> Tensor:
        """Logits [B]."""
        x_BI = torch.cat([*self.fields(sparse), dense_BN], dim=1)
        logits_B: Tensor = self.deep(self.cross(x_BI)).squeeze(1)
        return logits_B
