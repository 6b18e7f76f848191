"""The collection that replaces TorchRec's EmbeddingBagCollection in a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchRecEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.embedding.representation import Dense, Representation, RowOptimizer


class EmbeddingBagCollection(TorchRecEmbeddingBagCollection):
    """Embedding tables whose representation can be pruned; sharded by `thresher.embedding.sharding.Sharder`.

    Args:
        tables: the tables, as TorchRec wants them.
        representation: of every table.
        optimizer: the fused update rule of every table.
        seed: of the initial values, a function of (seed, table name, row, column).
        init_scale: initial values are uniform in [-init_scale, init_scale).
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        representation: Representation | None = None,
        optimizer: RowOptimizer | None = None,
        seed: int = 0,
        init_scale: float = 0.05,
    ) -> None:
        super().__init__(list(tables), device=torch.device("meta"))
        self.representation = representation or Dense()
        self.optimizer = optimizer or RowOptimizer()
        self.seed = seed
        self.init_scale = init_scale

    def forward(self, features: KeyedJaggedTensor) -> NoReturn:
        """Not possible before sharding: the tables have no memory yet.

        Raises:
            RuntimeError: always.
        """
        del features
        raise RuntimeError(
            "this collection holds no values before it is sharded; wrap the model in "
            "DistributedModelParallel(model, sharders=[thresher.embedding.sharding.Sharder()])"
        )
