"""How a table turns an id into a vector, and how its parameters learn."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from thresher.embedding.partitions import Partitions
from thresher.kernels.layout import Combine, Optimizer, Shared
from thresher.spec import Granularity


@dataclass(frozen=True)
class Dense:
    """The plain lookup: V[i]."""


@dataclass(frozen=True)
class SoftThreshold:
    """S(V[i], s) with learned thresholds sigmoid(s + u) (Liu et al., ICLR 2021).

    Attributes:
        granularity: what shares one s.
        init: s at the start.
        learning_rate: of s, by the same rule as the values.
        weight_decay: L2 on s, for the rows of the batch.
    """

    granularity: Granularity = "feature_dimension"
    init: float = -8.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    @property
    def shared(self) -> Shared:
        """What shares a threshold within one table; `global` and `dimension` also share it between tables."""
        return _SHARED[self.granularity]

    @property
    def replicated(self) -> bool:
        """Whether the thresholds are the same small parameter on every rank, not part of a row's shard."""
        return self.shared in (Shared.TABLE, Shared.COLUMN)


_SHARED: dict[Granularity, Shared] = {
    "global": Shared.TABLE,
    "table": Shared.TABLE,
    "dimension": Shared.COLUMN,
    "table_dimension": Shared.COLUMN,
    "feature": Shared.ROW,
    "feature_dimension": Shared.ELEMENT,
}


class MaskSource(Hashable, Protocol):
    """Where the masks of tables come from. Sources are hashable; equal ones give equal masks."""

    def packed(self, table: str, first_row: int, rows: int) -> Tensor:
        """Some rows of a table's mask, uint8 [rows, ⌈D/8⌉]; bit j mod 8 of byte j div 8 says whether column j stays."""


@dataclass(frozen=True)
class Masked:
    """V[i] ⊙ M[i]: what a scheme pruned stays exactly 0 through training, and takes no memory.

    Attributes:
        masks: of every table.
    """

    masks: MaskSource


@dataclass(frozen=True)
class Composed:
    """The rows of an id's buckets added, multiplied or side by side (Shi et al., KDD 2020).

    All composed tables of a collection should have the same object: tables with equal ones are looked up together.

    Attributes:
        partitions: of each composed table, by its name.
        combine: how the rows become a vector.
        entries: what the rows are made of: Dense; or, where they are added or multiplied, SoftThreshold or Masked.

    Raises:
        ValueError: if rows that lie side by side are to have thresholds or masks.
    """

    partitions: Mapping[str, Partitions]
    combine: Combine
    entries: Dense | SoftThreshold | Masked = field(default_factory=Dense)

    def __post_init__(self) -> None:
        if self.combine == Combine.CONCAT and not isinstance(self.entries, Dense):
            raise ValueError(
                "combine concat has rows of some of a vector's columns, for which there are no thresholds and masks; "
                "combine add or mult, or take entries Dense()"
            )

    def __hash__(self) -> int:
        return hash((frozenset(self.partitions.items()), self.combine, self.entries))

    def beside(self, table: str) -> int:
        """Rows of buckets that lie side by side in one row of the table as TorchRec and state dicts have it.

        A row of `concat` has a part of a vector's columns. TorchRec, which knows one width of rows and of vectors, gets
        the same memory as rows of full width.
        """
        return len(self.partitions[table]) if self.combine == Combine.CONCAT else 1

    def rows(self, table: str) -> int:
        """Rows of the table as TorchRec and state dicts have it."""
        return -(-self.partitions[table].rows // self.beside(table))


Representation = Dense | SoftThreshold | Masked | Composed


def entries_of(representation: Representation) -> Dense | SoftThreshold | Masked:
    """What the entries of a table's rows are, whether each id has a row of its own or not."""
    return representation.entries if isinstance(representation, Composed) else representation


def composed_of(representation: Representation) -> Composed | None:
    """How ids share the rows of buckets; none where each has a row of its own."""
    return representation if isinstance(representation, Composed) else None


@dataclass(frozen=True)
class RowOptimizer:
    """The update rule that runs inside the lookup's backward.

    Attributes:
        rule: sgd, rowwise_adagrad, adagrad or adam (of the batch's rows only).
        learning_rate: of the values.
        weight_decay: L2 on the values of the batch's rows.
        eps: added to the denominator.
    """

    rule: Optimizer = Optimizer.ADAM
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    eps: float = 1e-8


@dataclass(frozen=True)
class TableKernel:
    """All that the fused kernel must know of a table; tables with equal ones are looked up together.

    Attributes:
        representation: how an id becomes a vector.
        optimizer: how the parameters learn.
        seed: of the initial values.
        init_scale: initial values are uniform in [-init_scale, init_scale).
    """

    representation: Representation
    optimizer: RowOptimizer
    seed: int
    init_scale: float
