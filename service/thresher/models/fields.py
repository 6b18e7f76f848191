"""The vectors of a model's fields, whatever their tables look like: what every model is built on.

Shapes: B samples, F fields, d_f columns of field f.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.embedding.expansion import Expansion


class Fields(nn.Module):
    """Looks the fields up, and makes their vectors equally wide for a model that needs it.

    Args:
        embeddings: collection that gives pooled vectors [B, d_f] by field, as a KeyedTensor.
        dims: columns d_f of each field's vectors, at least 1; in the model's order of fields.
        equal: columns that all vectors are to have: narrower and wider ones go through a linear map without bias.
            None leaves each its own.
        expansion: what becomes of the ids of some fields before the lookup.
        paths: modules that give the pooled vectors of fields that are not in the collection.
        projected: fields that go through a linear map also where they are as wide as `equal`; at first the identity.

    Attributes:
        names: of the fields.
        dims: columns of each field as `forward` gives them.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        dims: Mapping[str, int],
        equal: int | None = None,
        expansion: Expansion | None = None,
        paths: Mapping[str, nn.Module] | None = None,
        projected: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.expansion = expansion
        self.paths = nn.ModuleDict(paths or {})
        self.names = list(dims)
        self.dims = [equal or dim for dim in dims.values()]
        self.projections = nn.ModuleDict(
            {
                name: nn.Linear(dim, equal, bias=False)
                for name, dim in dims.items()
                if equal is not None and (name in projected or dim != equal) and name not in self.paths
            }
        )
        for name, projection in self.projections.items():
            if dims[name] == equal:
                nn.init.eye_(projection.weight)  # type: ignore[arg-type]

    def forward(self, sparse: KeyedJaggedTensor) -> list[Tensor]:
        """Pooled vectors [B, d_f] of each field."""
        # All fields are taken apart at once: taken one by one, each would cost a gradient of the size of all.
        pooled = self.embeddings(sparse if self.expansion is None else self.expansion.rows(sparse)).to_dict()
        return [self._vector(name, pooled, sparse) for name in self.names]

    def _vector(self, name: str, pooled: Mapping[str, Tensor], sparse: KeyedJaggedTensor) -> Tensor:
        if name in self.paths:
            return self.paths[name](sparse[name])  # type: ignore[no-any-return]
        vector_BD = pooled[name]
        if self.expansion is not None:
            vector_BD = self.expansion.pooled(name, vector_BD, sparse)
        return self.projections[name](vector_BD) if name in self.projections else vector_BD

    def stacked(self, sparse: KeyedJaggedTensor) -> Tensor:
        """Pooled vectors [B, F, D] of fields that are equally wide."""
        return torch.stack(self(sparse), dim=1)
