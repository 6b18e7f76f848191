"""AutoInt (Song et al., CIKM 2019).

Shapes: B samples, V vectors (those of the F fields and of the N numeric inputs), D columns of a vector, H heads, A
columns of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.models.fields import Fields
from thresher.spec import ModelSpec


class AutoInt(nn.Module):
    """Layers in which every vector attends to all, and a linear layer over what comes out of the last.

    A layer makes x' = relu([head_1, …, head_H] + W_res x), with head_h = Σ_k softmax_k(⟨W_q x, W_k x_k⟩ / √A) W_v x_k;
    W_q, W_k and W_v are the head's own (equations 5 to 8; the root is the authors' code's). A numeric input enters as
    its value times a learned vector.

    Args:
        fields: the fields, equally wide.
        numeric: number of numeric inputs N.
        spec: of the model; `attention_layers`, `attention_heads`, `attention_dim` and `dropout` count here.
    """

    equal_dims = True

    def __init__(self, fields: Fields, numeric: int, spec: ModelSpec) -> None:
        super().__init__()
        self.fields = fields
        self.heads, self.dropout = spec.attention_heads, spec.dropout
        width, columns = fields.dims[0], spec.attention_heads * spec.attention_dim
        self.numeric_ND = None
        if numeric:  # they start as the tables do
            self.numeric_ND = nn.Parameter(torch.empty(numeric, width).uniform_(-spec.init_scale, spec.init_scale))
        self.layers = nn.ModuleList(  # W_q, W_k, W_v and W_res one below the other: one product instead of four
            nn.Linear(columns if layer else width, 4 * columns, bias=False) for layer in range(spec.attention_layers)
        )
        self.output = nn.Linear((len(fields.names) + numeric) * columns, 1)

    def forward(self, sparse: KeyedJaggedTensor, dense_BN: Tensor) -> Tensor:
        """Logits [B]."""
        x_BVD = self.fields.stacked(sparse)
        if self.numeric_ND is not None:
            x_BVD = torch.cat([x_BVD, dense_BN.unsqueeze(2) * self.numeric_ND], dim=1)
        for layer in self.layers:
            query, key, value, residual_BVD = layer(x_BVD).chunk(4, dim=2)
            query_BHVA, key_BHVA, value_BHVA = (
                x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (query, key, value)
            )
            heads_BHVA = scaled_dot_product_attention(
                query_BHVA, key_BHVA, value_BHVA, dropout_p=self.dropout if self.training else 0.0
            )
            x_BVD = torch.relu(heads_BHVA.transpose(1, 2).flatten(2) + residual_BVD)
        logits_B: Tensor = self.output(x_BVD.flatten(1)).squeeze(1)
        return logits_B
