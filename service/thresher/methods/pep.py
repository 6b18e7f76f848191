"""PEP: learned soft thresholds, steered down to the budgets (Liu et al., ICLR 2021, arXiv:2101.07577).

The threshold of an entry is `sigmoid(s + u)`: s is what the loss learns, u is the *pressure*, one number for all
entries that costs nothing to apply. Published code lets weight decay lift every s by about 1e-3 a step and stops where
that ends; here u follows a falling curve of kept parameters through all the budgets, and each budget's mask is taken
when the curve passes it, exactly, by ranking the margins `|v| − g(s)`.

Where the loss starts to learn s from matters, for a magnitude is a poor witness. Adam moves the row of a rare id as
far a visit as that of a frequent one, so |v| says nothing of the evidence behind it: rare rows start with higher
thresholds (`frequency_prior`). And a product of two vectors lives on the columns that both keep, so masks that choose
columns freely waste most of what they keep: later columns start with higher thresholds, the same for all rows
(`column_prior`), and fields come to share the first columns. Both are logarithms: with β ln(1 + occurrences) against
γ ln(1 + column) a row keeps columns by the power β / γ of its frequency, by its square root with the defaults, and the
first column, which holds the first-order weight, stays longest. With both priors 0 it is the published start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from thresher.embedding.fused import FusedEmbeddingBag, TablePart
from thresher.embedding.representation import Representation, SoftThreshold, composed_of, entries_of
from thresher.kernels import layout
from thresher.kernels.layout import Shared
from thresher.methods.masks import ShardMask
from thresher.methods.ranking import RankedShard, select_largest
from thresher.spec import SearchSpec

PUBLISHED_DRIFT = 1e-3  # rise of s a step in published code: Adam normalises the weight decay to its learning rate
_SAMPLE = 1 << 20  # entries over all ranks that a count looks at


class Tables(Protocol):
    """What a search must know of sharded tables: those of a `ShardedCollection`, or of several together."""

    @property
    def representations(self) -> Mapping[str, Representation]:
        """Of each table, by its name; alike on every rank."""

    @property
    def shared_thresholds(self) -> nn.ParameterDict:
        """The replicated thresholds."""

    def kernels(self) -> Iterator[FusedEmbeddingBag]:
        """This rank's groups of tables."""


@dataclass(frozen=True)
class TableShard:
    """A rank's part of one table with what decides about its entries."""

    name: str
    table: int
    first_row: int
    first_column: int
    columns: int  # of the whole table
    weight_ND: Tensor
    threshold: Tensor  # s as [1, 1], [1, D], [N, 1] or [N, D]
    seen_N1: Tensor

    def margins(self, start: int, stop: int, pressure: float) -> Tensor:
        """`|v| − g(s)` of some rows, −inf where training never saw the row: such values are still random."""
        s = self.threshold[start:stop] if self.threshold.shape[0] > 1 else self.threshold
        margin = self.weight_ND[start:stop].abs() - torch.sigmoid(s + pressure)
        return margin.masked_fill(~self.seen_N1[start:stop], -math.inf)


def table_shards(collection: Tables, replicas: bool = False) -> list[TableShard]:
    """This rank's shards of the tables that learn thresholds.

    Args:
        collection: the tables.
        replicas: also give the tables that every rank holds where this rank is not the one that speaks for them.
    """
    place = {name: number for number, name in enumerate(collection.representations)}
    return [
        _shard(kernel, part, place[part.name])
        for kernel in collection.kernels()
        if kernel.group.shared != Shared.NONE
        for part in kernel.parts()
        if part.counted or replicas
    ]


def _shard(kernel: FusedEmbeddingBag, part: TablePart, table: int) -> TableShard:
    group = kernel.group
    return TableShard(
        name=part.name,
        table=table,
        first_row=part.first_row,
        first_column=part.first_column,
        columns=part.columns,
        weight_ND=layout.elements(group.weights, part.table),
        threshold=kernel.thresholds_of(part),
        seen_N1=layout.per_row(group.seen, part.table),
    )


def exact_masks(shards: Sequence[TableShard], pressure: float, kept: int) -> list[Tensor]:
    """Masks [N, D] of the `kept` entries with the largest margins over all ranks, a mask for each shard."""

    def keys(shard: TableShard) -> Callable[[int, int], Tensor]:
        return lambda start, stop: shard.margins(start, stop, pressure)

    return select_largest(
        [
            RankedShard(shard.table, shard.first_row, shard.first_column, shard.weight_ND.shape[0], keys(shard))
            for shard in shards
        ],
        kept,
    )


def _ranked(shards: Sequence[TableShard], pressure: float, kept: int) -> list[ShardMask]:
    return shard_masks(shards, exact_masks(shards, pressure, kept))


def shard_masks(shards: Sequence[TableShard], masks: Sequence[Tensor]) -> list[ShardMask]:
    """The masks [N, D] of shards with their places in the tables."""
    return [
        ShardMask(shard.name, shard.table, shard.first_row, shard.first_column, mask_ND)
        for shard, mask_ND in zip(shards, masks, strict=True)
    ]


@torch.no_grad()
def start_thresholds(collection: Tables, spec: SearchSpec, counts: Mapping[str, NDArray[np.integer[Any]]]) -> None:
    """Give the thresholds their values before the first step.

    Args:
        collection: the tables, with learned thresholds.
        spec: the search.
        counts: training occurrences of each id [n], by table; rows of tables that are left out all start alike. The row
            of a bucket has occurred as often as all of its ids together.
    """
    learned = {
        name: own for name, own in collection.representations.items() if isinstance(entries_of(own), SoftThreshold)
    }
    logs = {name: np.log1p(_of_rows(count, learned[name], name)) for name, count in counts.items() if name in learned}
    mean = sum(log.sum() for log in logs.values()) / max(1, sum(log.size for log in logs.values()))
    for parameter in collection.shared_thresholds.values():  # also those of tables that other ranks hold
        parameter.copy_(spec.threshold_init + _column_prior(spec, 0, parameter.numel(), parameter.numel()))
    if collection.shared_thresholds:
        return
    for shard in table_shards(collection, replicas=True):
        rows, width = shard.threshold.shape
        s = torch.full((rows, 1), spec.threshold_init)
        if shard.name in logs:
            own = logs[shard.name][shard.first_row : shard.first_row + rows]
            s = s - spec.frequency_prior * torch.from_numpy(own - mean).float().unsqueeze(1)
        if width == shard.weight_ND.shape[1]:
            s = s + _column_prior(spec, shard.first_column, width, shard.columns)
        shard.threshold.copy_(s)


def _of_rows(counts: NDArray[np.integer[Any]], representation: Representation, table: str) -> NDArray[np.integer[Any]]:
    """Occurrences of a table's rows, of those of its ids."""
    composed = composed_of(representation)
    if composed is None:
        return counts
    found: NDArray[np.int64] = composed.partitions[table].sums(torch.from_numpy(counts.astype(np.int64))).numpy()
    return found


def _column_prior(spec: SearchSpec, first: int, width: int, columns: int) -> Tensor:
    """By how much s starts higher in some of a table's columns, against the mean column."""
    logs = torch.log1p(torch.arange(columns, dtype=torch.float64))
    return (spec.column_prior * (logs - logs.mean())[first : first + width]).float()


class Pressure:
    """Steers the search: called before every step, it moves u and takes the masks of the budgets that were reached.

    Args:
        collection: the tables in training.
        spec: the search.
        kept: parameters that stay under each budget, by its name.
        total_params: entries of all tables over all ranks.
        total_steps: of the search.
        take: called when a budget is reached, with its name and what gives the masks of this rank's shards for a
            number of entries that stay.
    """

    def __init__(
        self,
        collection: Tables,
        spec: SearchSpec,
        kept: Mapping[str, int],
        total_params: int,
        total_steps: int,
        take: Callable[[str, Callable[[int], list[ShardMask]]], None],
    ) -> None:
        self._collection = collection
        self._spec = spec
        self._total_params = total_params
        self._total_steps = total_steps
        self._take = take
        self._row_stride = max(1, total_params // _SAMPLE)
        self._kept = kept
        self._lowest = min(self._kept.values()) / total_params

    def target(self, step: int) -> float | None:
        """Share of the entries that should be left at a step; none where the published drift decides."""
        if self._spec.pressure == "published":
            return None
        start = self._spec.warmup * self._total_steps
        return float(self._lowest ** max(0.0, (step - start) / (self._total_steps - start)))

    def __call__(self, state: dict[str, Any], step: int, loss: float) -> None:
        """Act before a step, or after the last.

        Args:
            state: lives in the checkpoints; gets `pressure`, `taken` (the budgets whose masks exist), `stalled` (those
                that sparsity did not reach) and `history`.
            step: the step that comes.
            loss: mean loss of the step before; NaN before the first.
        """
        pressure = float(state.setdefault("pressure", 0.0))
        if self._spec.pressure == "published":
            pressure = PUBLISHED_DRIFT * step
        if step and (step % self._spec.check_every == 0 or step == self._total_steps):
            target = self.target(step)
            keys, thresholds = self._sample()
            if target is not None:
                place = min(int((1 - target) * keys.size), keys.size - 1)
                pressure = max(pressure, float(np.partition(keys, place)[place]))
            kept = float((keys > pressure).mean())
            self._take_reached(state, step, pressure, kept if target is None else target)
            quantiles = np.quantile(thresholds + pressure, [0.05, 0.25, 0.5, 0.75, 0.95])
            state.setdefault("history", []).append(
                {
                    "step": step,
                    "kept_fraction": kept,
                    "target_fraction": target,
                    "pressure": pressure,
                    "threshold_quantiles": [1 / (1 + math.exp(-q)) for q in quantiles],
                    "loss": loss if math.isfinite(loss) else None,
                }
            )
        state["pressure"] = pressure
        for kernel in self._collection.kernels():
            kernel.group.pressure = pressure

    def _take_reached(self, state: dict[str, Any], step: int, pressure: float, left: float) -> None:
        taken, stalled = state.setdefault("taken", []), state.setdefault("stalled", [])
        for name, params in self._kept.items():
            reached = left * self._total_params <= params + 0.5
            if name in taken or not (reached or step == self._total_steps):
                continue
            shards = table_shards(self._collection)
            self._take(name, partial(_ranked, shards, pressure))
            taken.append(name)
            if not reached:
                stalled.append(name)

    def _sample(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """For every n-th row of every table over all ranks, the pressure at which each entry falls, and its s."""
        falls, thresholds = [], []
        for shard in table_shards(self._collection):
            rows = slice(-shard.first_row % self._row_stride, None, self._row_stride)
            v = shard.weight_ND[rows].abs().clamp(max=1 - 1e-6)
            s = (shard.threshold[rows] if shard.threshold.shape[0] > 1 else shard.threshold).expand_as(v)
            fall = (torch.logit(v) - s).masked_fill(~shard.seen_N1[rows], -math.inf)
            falls.append(fall.flatten().cpu().numpy())
            thresholds.append(s.flatten().cpu().numpy())
        own = (np.concatenate(falls or [np.empty(0)]), np.concatenate(thresholds or [np.empty(0)]))
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        return np.concatenate([f for f, _ in gathered]), np.concatenate([t for _, t in gathered])
