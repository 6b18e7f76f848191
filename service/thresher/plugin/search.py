"""PEP's search inside a user's own training loop (Liu et al., ICLR 2021, arXiv:2101.07577)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from thresher.budget import budget_name, budget_params
from thresher.embedding.fused import FusedEmbeddingBag
from thresher.embedding.representation import SoftThreshold, entries_of
from thresher.embedding.sharding import ShardedCollection, collections_of, reduce_shared_thresholds
from thresher.methods.masks import ShardMask, gather_masks
from thresher.methods.pep import Pressure, exact_masks, shard_masks, start_thresholds, table_shards
from thresher.plugin.scheme import Scheme
from thresher.spec import SearchSpec


class _Tables:
    """The tables of all collections of a model that learn thresholds, as if they were of one collection."""

    def __init__(self, model: nn.Module) -> None:
        self.collections: list[ShardedCollection] = collections_of(model)
        learned = [own.soft_threshold for own in self.collections if own.soft_threshold is not None]
        learning = [own for own in self.collections if own.soft_threshold is not None]
        if not learned:
            raise ValueError(
                "no table of the model learns thresholds; call thresher.replace(model, thresher.SoftThreshold(…)), "
                "then wrap the model in DistributedModelParallel(…, sharders=[thresher.Sharder()])"
            )
        self.representations = {name: own for each in learning for name, own in each.representations.items()}
        self.soft_threshold = learned[0]
        self.shared_thresholds = nn.ParameterDict(
            {
                f"{number}_{key}": parameter
                for number, each in enumerate(learning)
                for key, parameter in each.shared_thresholds.items()
            }
        )
        sizes = {
            config.name: config.num_embeddings * config.embedding_dim
            for each in learning
            for config in each._embedding_bag_configs
        }
        self.params = sum(
            size for name, size in sizes.items() if isinstance(entries_of(self.representations[name]), SoftThreshold)
        )

    def kernels(self) -> Iterator[FusedEmbeddingBag]:
        return chain.from_iterable(collection.kernels() for collection in self.collections)

    @property
    def pressure(self) -> float:
        """The same for all kernels of all ranks."""
        return next((kernel.group.pressure for kernel in self.kernels()), 0.0)


class Search:
    """Learns which parameters may stay: presses the learned thresholds up until each budget is reached.

    Call `step` once a training step, between `loss.backward()` and `optimizer.step()`, on every rank. It sums the
    gradients of thresholds that are shared by tables or columns over the ranks, raises the pressure u on all thresholds
    `sigmoid(s + u)` along a falling curve of kept parameters, and takes the exact mask of each budget when the curve
    passes it; after `total_steps` the pressure stays where it is. Where training never saw a row, it is pruned first.

    Args:
        model: sharded, some of its tables with `SoftThreshold`. Their thresholds get their first values here, around
            the `init` of their SoftThreshold; make the search before you load a checkpoint.
        budgets: what may stay of these tables: below 1 a share of their parameters, else a number.
        total_steps: training steps of the search.
        counts: training occurrences of each id, by table, as far as they are known. Rows seen more often start
            with lower thresholds, since optimizers move rare rows as far a visit as frequent ones.
        frequency_prior: by how much s of a row starts lower for each unit of ln(1 + its count) above the mean row; for
            the granularities feature and feature_dimension.
        column_prior: by how much s of column j starts higher for each unit of ln(1 + j); for granularities with
            columns. It leads tables to keep the same columns, as interactions of vectors need.
        warmup: share of the steps before the pressure starts.
        check_every: steps between two counts of what is kept.
        pressure: target: u follows the curve. published: u rises by 1e-3 a step, as in published code, and a budget
            that it does not reach is taken by ranking at the end.

    Attributes:
        history: what every count found: step, kept_fraction, target_fraction, pressure, threshold_quantiles.

    Raises:
        ValueError: if no table learns thresholds, there is no step, a budget keeps none or more than all parameters, or
            another argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        budgets: Sequence[float | int],
        total_steps: int,
        counts: Mapping[str, NDArray[np.integer[Any]]] | None = None,
        frequency_prior: float = 1.5,
        column_prior: float = 3.0,
        warmup: float = 0.5,
        check_every: int = 20,
        pressure: Literal["target", "published"] = "target",
    ) -> None:
        if total_steps < 1 or not budgets:
            raise ValueError(f"total_steps {total_steps}, budgets {list(budgets)}: a search needs one at least of each")
        self._tables = _Tables(model)
        kept = {budget_name(budget): budget_params(budget, self._tables.params) for budget in budgets}
        learned = self._tables.soft_threshold
        spec = SearchSpec(
            granularity=learned.granularity,
            threshold_init=learned.init,
            threshold_learning_rate=learned.learning_rate,
            threshold_weight_decay=learned.weight_decay,
            frequency_prior=frequency_prior,
            column_prior=column_prior,
            warmup=warmup,
            check_every=check_every,
            pressure=pressure,
        )
        start_thresholds(self._tables, spec, counts or {})
        self._budgets = {budget_name(budget): budget for budget in budgets}
        self._total_steps = total_steps
        self._step = 0
        self._state: dict[str, Any] = {}
        self._schemes: dict[str, Scheme] = {}
        self._pressure = Pressure(self._tables, spec, kept, self._tables.params, total_steps, self._take_masks)

    @property
    def history(self) -> list[dict[str, Any]]:
        """See the class."""
        found: list[dict[str, Any]] = self._state.get("history", [])
        return found

    def step(self) -> None:
        """Act between a step's backward and the optimizer's step; every rank must call it equally often."""
        for collection in self._tables.collections:
            reduce_shared_thresholds(collection)
        if self._step < self._total_steps:
            self._step += 1
            self._pressure(self._state, self._step, math.nan)

    def scheme(self, budget: float | int) -> Scheme:
        """The parameters that stayed when a budget was reached; `thresher.scheme` calls it.

        Raises:
            ValueError: if the search has no such budget, or did not reach it yet.
        """
        name = budget_name(budget)
        if name not in self._budgets:
            raise ValueError(f"budget {name}: the search has {', '.join(self._budgets)}")
        if name not in self._schemes:
            raise ValueError(
                f"budget {name}: not reached after {self._step} of {self._total_steps} steps; call step() in every "
                "training step, or rank as things stand with thresher.scheme(model, budget)"
            )
        return self._schemes[name]

    def state_dict(self) -> dict[str, Any]:
        """All that a search continues from, the masks it took included; alike on every rank."""
        masks = {name: scheme.masks for name, scheme in self._schemes.items()}
        return {"step": self._step, "steering": self._state, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave, on any number of ranks; the model has its own checkpoint."""
        self._step, self._state = state["step"], state["steering"]
        self._schemes = {name: Scheme(masks, self._budgets.get(name)) for name, masks in state["masks"].items()}
        for kernel in self._tables.kernels():
            kernel.group.pressure = self._state.get("pressure", 0.0)

    def _take_masks(self, name: str, masks_of: Callable[[int], list[ShardMask]]) -> None:
        kept = budget_params(self._budgets[name], self._tables.params)
        whole = gather_masks(masks_of(kept), everywhere=True)
        assert whole is not None
        self._schemes[name] = Scheme(whole, self._budgets[name])


def scheme(source: Search | nn.Module, budget: float | int) -> Scheme:
    """Exactly the parameters that stay under a budget, on every rank; all ranks must call it.

    Args:
        source: a search, for the parameters that stayed when it reached the budget; or a sharded model with learned
            thresholds, for those with the largest margins `|v| − sigmoid(s + u)` as things stand.
        budget: of the tables that learn thresholds: below 1 a share of their parameters, else a number.

    Raises:
        ValueError: if no table learns thresholds, the search has no such budget or has not reached it, or the budget
            keeps none or more than all parameters.
    """
    if isinstance(source, Search):
        return source.scheme(budget)
    tables = _Tables(source)
    shards = table_shards(tables)
    masks = exact_masks(shards, tables.pressure, budget_params(budget, tables.params))
    whole = gather_masks(shard_masks(shards, masks), everywhere=True)
    assert whole is not None
    return Scheme(whole, budget)
