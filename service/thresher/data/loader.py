"""Batches of prepared data, in an order that is a function of (seed, epoch) alone.

The order has two levels. Row groups are permuted; WINDOW_GROUPS of them at a time form a window, whose samples are
permuted in memory. Position p of an epoch therefore belongs to a known sample, found without reading what comes before
it: any number of ranks share one order, and an epoch can start at any step.

Memory of a loader is one window. A split that fits into one stays there from epoch to epoch.

Shapes: F fields, B samples of this rank's batch, D dense inputs, N samples of a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.data import shards
from thresher.data.splits import SPLITS
from thresher.rundir import read_json

WINDOW_GROUPS = 16  # row groups shuffled together: a million samples at the default size


@dataclass
class Batch:
    """One rank's share of a step.

    Attributes:
        sparse: ids of all fields in the order of meta.json, int64; values, lengths and offsets are int64.
        dense: float32[B, D].
        labels: float32[B], 0 or 1.
        weights: float32[B], 1 for a sample and 0 for padding.
        count: samples of this step over all ranks.
    """

    sparse: KeyedJaggedTensor
    dense: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    count: int

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.sparse.to(device, non_blocking),
            self.dense.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.weights.to(device, non_blocking=non_blocking),
            self.count,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until `stream` is done with it; TorchRec's pipelines ask for this."""
        self.sparse.record_stream(stream)
        for tensor in (self.dense, self.labels, self.weights):
            tensor.record_stream(stream)


class Loader:
    """Batches of one split for one rank.

    Each rank's batch has `batch_size // world_size` entries; the last step is filled up with empty bags of weight 0.
    Global batch b holds positions b * batch_size and on of the epoch's order; rank r takes its r-th contiguous slice.

    Args:
        data: folder that prepare wrote.
        split: train, validation or test.
        batch_size: samples a step over all ranks; a multiple of `world_size`.
        rank: of this process.
        world_size: number of ranks.
        seed: of the order.
        shuffle: whether the order is permuted; otherwise it is that of the files.

    Raises:
        ValueError: if the data are not there or not whole, or the arguments do not fit.
    """

    def __init__(
        self, data: Path, split: str, *, batch_size: int, rank: int, world_size: int, seed: int, shuffle: bool
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} must be a positive multiple of the {world_size} ranks")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} must be in 0..{world_size - 1}")
        if not (data / "meta.json").is_file():
            raise ValueError(f"{data}: no prepared data (meta.json is missing); run prepare first")
        meta = read_json(data / "meta.json")
        self.samples: int = meta["splits"][split]["samples"]
        self.steps_per_epoch = -(-self.samples // batch_size)
        self._batch_size = batch_size
        self._local = batch_size // world_size
        self._rank = rank
        self._seed = seed
        self._shuffle = shuffle
        self._fields: list[str] = [field["name"] for field in meta["fields"]]
        self._rows_F: list[int] = [field["rows"] for field in meta["fields"]]
        self._any_multi = not all(field["one_hot"] for field in meta["fields"])
        self._dense: list[str] = meta["dense"]
        self._reader = shards.ShardReader(data, meta["splits"][split]["files"])
        self._sizes = np.array([self._reader.read(group).num_rows for group in range(len(self._reader))], np.int64)
        if self._sizes.sum() != self.samples:
            raise ValueError(
                f"{data}: the {split} files hold {self._sizes.sum()} samples, meta.json says {self.samples}; "
                "run prepare again"
            )
        self._cached: tuple[tuple[int, ...], _Window] | None = None
        # Where all fields are one-hot these are the same in every whole batch.
        self._ones_FB = np.ones((len(self._fields), self._local), np.int64)
        self._one_hot_lengths = torch.ones(self._ones_FB.size, dtype=torch.int64)
        self._one_hot_offsets = torch.arange(self._ones_FB.size + 1)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch.

        Args:
            epoch: its number, which the order depends on.
            start_step: the first step to give; what comes before it is not read.

        Raises:
            ValueError: if there is no such step, or a shard holds an id outside its table.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step {start_step} must be in 0..{self.steps_per_epoch}, the steps of an epoch")
        order = _Order(self._sizes, self._seed, epoch, self._shuffle)
        for step in range(start_step, self.steps_per_epoch):
            first = step * self._batch_size + self._rank * self._local
            count = min(self._batch_size, self.samples - step * self._batch_size)
            yield self._batch(order, first, min(first + self._local, self.samples), count)

    def _batch(self, order: _Order, first: int, stop: int, count: int) -> Batch:
        """Positions `first` up to `stop` of an order, filled up to this rank's batch."""
        size = max(stop - first, 0)
        ids: list[list[np.ndarray]] = [[] for _ in self._fields]
        lengths_FB = self._ones_FB
        if self._any_multi or size < self._local:
            lengths_FB = self._ones_FB.copy()
            lengths_FB[:, size:] = 0
        dense_BD = np.zeros((self._local, len(self._dense)), np.float32)
        labels_B = np.zeros(self._local, np.float32)
        done = 0
        while done < size:  # twice where the batch lies in two windows
            groups, places = order.window(first + done, size - done)
            window = self._load(groups)
            here = slice(done, done + len(places))
            for f, column in enumerate(window.ids):
                if isinstance(column, _Lists):
                    entries, lengths_FB[f, here] = column.take(places)
                    ids[f].append(entries)
                else:
                    ids[f].append(column[places])
            for d, column in enumerate(window.dense):
                dense_BD[here, d] = column[places]
            labels_B[here] = window.labels[places]
            done += len(places)
        parts = [part for of_field in ids for part in of_field]
        values = np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, np.int64)
        if lengths_FB is self._ones_FB:
            lengths, offsets = self._one_hot_lengths, self._one_hot_offsets
        else:
            lengths = torch.from_numpy(lengths_FB.reshape(-1))
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        weights_B = torch.zeros(self._local)
        weights_B[:size] = 1
        sparse = KeyedJaggedTensor(
            keys=self._fields, values=torch.from_numpy(values), lengths=lengths, offsets=offsets, stride=self._local
        )
        return Batch(sparse, torch.from_numpy(dense_BD), torch.from_numpy(labels_B), weights_B, count)

    def _load(self, groups: tuple[int, ...]) -> _Window:
        """Row groups in memory, those of the last call again for nothing."""
        if self._cached is None or self._cached[0] != groups:
            self._cached = None  # lets go of the old window before the new one is there
            batches = [self._reader.read(group) for group in groups]
            ids: list[np.ndarray | _Lists] = []
            for name, rows in zip(self._fields, self._rows_F, strict=True):
                arrays = [batch.column(shards.sparse(name)) for batch in batches]
                for group, array in zip(groups, arrays, strict=True):
                    self._check_ids(name, rows, group, array)
                if pa.types.is_list(arrays[0].type):
                    lengths = np.concatenate([np.diff(array.offsets.to_numpy()) for array in arrays])
                    ids.append(_Lists(np.concatenate([array.flatten().to_numpy() for array in arrays]), lengths))
                else:
                    ids.append(np.concatenate([array.to_numpy() for array in arrays]))
            dense = [
                np.concatenate([batch.column(shards.dense(name)).to_numpy() for batch in batches])
                for name in self._dense
            ]
            labels = np.concatenate([batch.column(shards.LABEL).to_numpy() for batch in batches])
            self._cached = groups, _Window(ids, dense, labels)
        return self._cached[1]

    def _check_ids(self, name: str, rows: int, group: int, array: pa.Array) -> None:
        ids = array.flatten().to_numpy() if pa.types.is_list(array.type) else array.to_numpy()
        if len(ids) and (ids.max() >= rows or ids.min() < 0):
            index = int(np.flatnonzero((ids >= rows) | (ids < 0))[0])
            row = index
            if pa.types.is_list(array.type):
                row = int(np.searchsorted(array.offsets.to_numpy(), index, side="right")) - 1
            raise ValueError(
                f"{self._reader.where(group, row)}: id {ids[index]} of field `{name}` is outside its table "
                f"of {rows} rows; run prepare again"
            )


@dataclass
class _Window:
    """Row groups in memory: ids of each field, dense inputs [N] each, labels [N]."""

    ids: list[np.ndarray | _Lists]
    dense: list[np.ndarray]
    labels: np.ndarray


class _Lists:
    """N lists of ids, one after the other in one array."""

    def __init__(self, entries: np.ndarray, lengths_N: np.ndarray) -> None:
        self._entries = entries
        self._lengths_N = lengths_N
        self._starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N

    def take(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries and lengths of some of the lists."""
        lengths = self._lengths_N[places]
        ends = np.cumsum(lengths, dtype=np.int64)
        # Entry j of the result is entry j - (where its list begins here) + (where it begins in the window).
        shift = np.repeat(self._starts_N[places] - (ends - lengths), lengths)
        return self._entries[shift + np.arange(len(shift))], lengths


class _Order:
    """Which sample stands at which position of an epoch."""

    def __init__(self, sizes: np.ndarray, seed: int, epoch: int, shuffle: bool) -> None:
        """See `Loader`; `sizes` has the samples of each row group."""
        self._seed = seed
        self._epoch = epoch
        self._shuffle = shuffle
        groups = np.random.default_rng([seed, epoch]).permutation(len(sizes)) if shuffle else np.arange(len(sizes))
        # In a window the samples are permuted anyway: sorted, the same groups are the same window in each epoch.
        self._windows = [
            tuple(sorted(groups[start : start + WINDOW_GROUPS].tolist()))
            for start in range(0, len(groups), WINDOW_GROUPS)
        ]
        self._ends = np.cumsum([sizes[list(window)].sum() for window in self._windows])
        self._places: tuple[int, np.ndarray] | None = None

    def window(self, position: int, most: int) -> tuple[tuple[int, ...], np.ndarray]:
        """The row groups of the window at a position, and the places in it of up to `most` samples from there on."""
        which = int(np.searchsorted(self._ends, position, side="right"))
        start = int(self._ends[which - 1]) if which else 0
        if self._places is None or self._places[0] != which:
            size = int(self._ends[which]) - start
            generator = np.random.default_rng([self._seed, self._epoch, which + 1])  # [s, e, 0] equals [s, e]
            self._places = which, generator.permutation(size) if self._shuffle else np.arange(size)
        return self._windows[which], self._places[1][position - start : position - start + most]
