"""The collection that replaces TorchRec's EmbeddingBagCollection in a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchRecEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.embedding.representation import (
    Composed,
    Dense,
    Representation,
    RowOptimizer,
    SoftThreshold,
    entries_of,
)


class EmbeddingBagCollection(TorchRecEmbeddingBagCollection):
    """Embedding tables whose representation can be pruned; sharded by `thresher.embedding.sharding.Sharder`.

    Args:
        tables: the tables, as TorchRec wants them; `num_embeddings` is how many ids there are, also of composed tables.
        representation: of every table, or of each by its name.
        optimizer: the fused update rule of every table.
        seed: of the initial values, a function of (seed, table name, row, column).
        init_scale: initial values are uniform in [-init_scale, init_scale).

    Attributes:
        representations: of each table, by its name.
        soft_threshold: the one representation of all tables that learn thresholds, if any do.

    Raises:
        ValueError: if a table has no representation, a composed one does not fit it, or thresholds learn in two ways.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        representation: Representation | Mapping[str, Representation] | None = None,
        optimizer: RowOptimizer | None = None,
        seed: int = 0,
        init_scale: float = 0.05,
    ) -> None:
        if not isinstance(representation, Mapping):
            representation = {table.name: representation or Dense() for table in tables}
        for table in tables:
            if table.name not in representation:
                raise ValueError(f"table {table.name} has no representation; name one, such as Dense()")
        self.representations = {table.name: representation[table.name] for table in tables}
        self.soft_threshold = _one_soft_threshold(self.representations)
        super().__init__([_stored(table, representation[table.name]) for table in tables], device=torch.device("meta"))
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


def _stored(table: EmbeddingBagConfig, representation: Representation) -> EmbeddingBagConfig:
    """The table with as many rows as are stored of it."""
    if not isinstance(representation, Composed):
        return table
    if table.name not in representation.partitions:
        raise ValueError(f"table {table.name} is composed, but has no partitions; name them, or make it Dense()")
    beside = representation.beside(table.name)
    if table.embedding_dim % beside:
        raise ValueError(
            f"table {table.name}, combine concat: {table.embedding_dim} columns cannot be shared by {beside} "
            f"partitions; take a multiple of {beside} columns, or combine add or mult"
        )
    return replace(table, num_embeddings=representation.rows(table.name))


def _one_soft_threshold(representations: Mapping[str, Representation]) -> SoftThreshold | None:
    """What the tables with learned thresholds have in common: some granularities share thresholds between tables."""
    found: dict[SoftThreshold, str] = {}
    for table, representation in representations.items():
        if isinstance(entries := entries_of(representation), SoftThreshold):
            found.setdefault(entries, table)
    if len(found) > 1:
        raise ValueError(f"tables {', '.join(found.values())} have different SoftThresholds; give all the same")
    return next(iter(found), None)
