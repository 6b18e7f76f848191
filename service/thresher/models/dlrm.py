"""DLRM (Naumov et al., arXiv 1906.00091).

Shapes: B samples, V vectors (those of the fields, and the bottom network's where there are numeric inputs), D columns
of a vector, P pairs of vectors, N numeric inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.models.fields import Fields
from thresher.models.mlp import mlp
from thresher.spec import ModelSpec


class DLRM(nn.Module):
    """The inner products of all pairs of vectors, each once, and a network over them.

    A bottom network makes a vector of the numeric inputs, which the top network sees besides. Fields of different
    widths come through projections: mixed dimension embeddings (Ginart et al., ISIT 2021).

    Args:
        fields: the fields, equally wide.
        numeric: number of numeric inputs N; 0 leaves the bottom network out.
        spec: of the model; `bottom_hidden`, `hidden` (the top's) and `dropout` (the top's) count here.

    Raises:
        ValueError: if there is no pair.
    """

    equal_dims = True
    pairs_2P: Tensor

    def __init__(self, fields: Fields, numeric: int, spec: ModelSpec) -> None:
        super().__init__()
        dim, vectors = fields.dims[0], len(fields.names) + bool(numeric)
        if vectors < 2:
            raise ValueError(
                "model.name dlrm: it sees pairs of vectors alone, and the data have one field and no numeric input; "
                "give data.fields one more, or take another model"
            )
        self.fields = fields
        self.bottom = MLP(numeric, [*spec.bottom_hidden, dim]) if numeric else None  # with a rectifier at its end
        self.register_buffer("pairs_2P", torch.triu_indices(vectors, vectors, offset=1), persistent=False)
        inputs = self.pairs_2P.shape[1] + (dim if numeric else 0)
        self.top = mlp(inputs, spec.hidden, spec.dropout, outputs=1)

    def forward(self, sparse: KeyedJaggedTensor, dense_BN: Tensor) -> Tensor:
        """Logits [B]."""
        vectors_BVD = self.fields.stacked(sparse)
        beside = []
        if self.bottom is not None:
            bottom_BD = self.bottom(dense_BN)
            vectors_BVD = torch.cat([bottom_BD.unsqueeze(1), vectors_BVD], dim=1)
            beside = [bottom_BD]
        products_BVV = vectors_BVD @ vectors_BVD.transpose(1, 2)
        products_BP = products_BVV[:, self.pairs_2P[0], self.pairs_2P[1]]
        logits_B: Tensor = self.top(torch.cat([*beside, products_BP], dim=1)).squeeze(1)
        return logits_B
