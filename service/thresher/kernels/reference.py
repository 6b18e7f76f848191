"""The lookup and its fused update in plain PyTorch: what every faster backend must equal.

Shapes: T tables, N rows of one or several, D columns, F features, B samples, L ids in a batch, U different rows in a
batch. A group of tables lies in one flat tensor, table after table, row after row; so do thresholds, masks and
optimizer states. Tables of one width that lie side by side are handled as one *block*, so that the number of PyTorch
calls does not grow with the number of tables. The cost of a step depends on L and U, never on N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby

import torch
from torch import Tensor


class Shared(IntEnum):
    """Which entries of one table share a threshold; `NONE` is a table without thresholds."""

    NONE = 0
    TABLE = 1
    COLUMN = 2
    ROW = 3
    ELEMENT = 4


class Optimizer(IntEnum):
    """Update rules of the fused backward."""

    SGD = 0
    ROWWISE_ADAGRAD = 1
    ADAGRAD = 2
    ADAM = 3


# Flat tensors of state an update rule keeps for each tensor it updates, and whether each holds one value a row.
STATES: dict[Optimizer, tuple[tuple[str, bool], ...]] = {
    Optimizer.SGD: (),
    Optimizer.ROWWISE_ADAGRAD: (("sum", True),),
    Optimizer.ADAGRAD: (("sum", False),),
    Optimizer.ADAM: (("exp_avg", False), ("exp_avg_sq", False)),
}
BETA1, BETA2 = 0.9, 0.999


@dataclass(frozen=True)
class Table:
    """One table of a group, and where its part of each flat tensor begins."""

    rows: int
    dim: int
    first_element: int
    first_row: int
    first_column: int
    number: int


def tables_of(rows: Sequence[int], dims: Sequence[int]) -> list[Table]:
    """The tables of a group in the order in which they lie in its flat tensors."""
    tables, element, row, column = [], 0, 0, 0
    for number, (n, d) in enumerate(zip(rows, dims, strict=True)):
        tables.append(Table(n, d, element, row, column, number))
        element, row, column = element + n * d, row + n, column + d
    return tables


def elements(flat: Tensor, table: Table) -> Tensor:
    """View of a flat tensor with one value an entry as the table's [N, D]."""
    return flat.narrow(0, table.first_element, table.rows * table.dim).view(table.rows, table.dim)


def per_row(flat: Tensor, table: Table) -> Tensor:
    """View of a flat tensor with one value a row as the table's [N, 1]."""
    return flat.narrow(0, table.first_row, table.rows).view(table.rows, 1)


def thresholds_of(flat: Tensor, table: Table, shared: Shared) -> Tensor:
    """The table's part of the flat thresholds: [1, 1], [1, D], [N, 1] or [N, D]."""
    if shared == Shared.TABLE:
        return flat[table.number].view(1, 1)
    if shared == Shared.COLUMN:
        return flat.narrow(0, table.first_column, table.dim).view(1, table.dim)
    return per_row(flat, table) if shared == Shared.ROW else elements(flat, table)


def soft_threshold(values: Tensor, threshold: Tensor) -> Tensor:
    """`sign(v) · max(|v| − g, 0)` (Liu et al., ICLR 2021, eq. 5), for g >= 0."""
    return values - values.clamp(-threshold, threshold)


def lookup(
    weights: Tensor,
    thresholds: Tensor,
    mask: Tensor,
    indices: Tensor,
    offsets: Tensor,
    pressure: float,
    rows: Sequence[int],
    dims: Sequence[int],
    feature_tables: Sequence[int],
    shared: int,
    mean: bool,
) -> Tensor:
    """Pooled vectors [B, Σ D over features]; arguments as in `ops`."""
    shared = Shared(shared)
    batch = (offsets.numel() - 1) // len(feature_tables)
    pooled = []
    for block in _blocks(rows, dims, feature_tables):
        ids = _Ids(block, indices, offsets, batch)
        vectors_LD = block.elements(weights)[ids.rows_L]
        if shared != Shared.NONE:
            s = block.thresholds(thresholds, shared)[ids.rows_L if shared >= Shared.ROW else ids.tables_L]
            vectors_LD = soft_threshold(vectors_LD, torch.sigmoid(s + pressure))
        if mask.numel():
            vectors_LD = vectors_LD * block.elements(mask)[ids.rows_L]
        pooled.append(ids.pool(vectors_LD, mean))
    return torch.cat(pooled, dim=1)


def update(
    grad: Tensor,
    weights: Tensor,
    weight_states: Sequence[Tensor],
    thresholds: Tensor,
    threshold_states: Sequence[Tensor],
    mask: Tensor,
    seen: Tensor,
    indices: Tensor,
    offsets: Tensor,
    pressure: float,
    rows: Sequence[int],
    dims: Sequence[int],
    feature_tables: Sequence[int],
    shared: int,
    mean: bool,
    optimizer: int,
    learning_rate: float,
    weight_decay: float,
    threshold_learning_rate: float,
    threshold_weight_decay: float,
    eps: float,
    step: int,
) -> Tensor:
    """Backward and update in one: changes rows of the batch in place; returns the gradient of shared thresholds."""
    shared, rule = Shared(shared), Optimizer(optimizer)
    batch = (offsets.numel() - 1) // len(feature_tables)
    per_table = shared in (Shared.TABLE, Shared.COLUMN)
    threshold_grad = torch.zeros_like(thresholds) if per_table else thresholds.new_empty(0)
    column = 0
    for block in _blocks(rows, dims, feature_tables):
        ids = _Ids(block, indices, offsets, batch)
        width = len(block.features) * block.dim
        grad_LD = ids.spread(grad[:, column : column + width], mean)
        column += width
        rows_U, inverse_L = torch.unique(ids.rows_L, return_inverse=True)
        grad_UD = grad_LD.new_zeros(rows_U.numel(), block.dim).index_add_(0, inverse_L, grad_LD)
        values = block.elements(weights)
        if mask.numel():
            grad_UD = grad_UD * block.elements(mask)[rows_U]
        if shared != Shared.NONE:
            tables_U = torch.bucketize(rows_U, block.last_rows(rows_U.device), right=True)
            s = block.thresholds(thresholds, shared)
            v_UD = values[rows_U]
            g_UD = torch.sigmoid(s[tables_U if per_table else rows_U] + pressure)
            grad_UD = grad_UD * (v_UD.abs() > g_UD)
            grad_s_UD = -(g_UD * (1 - g_UD)) * grad_UD * v_UD.sign()
            if shared in (Shared.TABLE, Shared.ROW):
                grad_s_UD = grad_s_UD.sum(1, keepdim=True)
            if per_table:
                block.thresholds(threshold_grad, shared).index_add_(0, tables_U, grad_s_UD)
            else:
                states = block.states(threshold_states, rule, one_a_row=shared == Shared.ROW)
                _step(rule, s, rows_U, grad_s_UD, states, threshold_learning_rate, threshold_weight_decay, eps, step)
            seen[block.first_row + rows_U] = True
        states = block.states(weight_states, rule, one_a_row=False)
        _step(rule, values, rows_U, grad_UD, states, learning_rate, weight_decay, eps, step)
    return threshold_grad


def _step(
    rule: Optimizer,
    values_ND: Tensor,
    rows_U: Tensor,
    grad_UD: Tensor,
    states: Sequence[Tensor],
    learning_rate: float,
    weight_decay: float,
    eps: float,
    step: int,
) -> None:
    """One step of the update rule on the rows of the batch; L2 joins the gradient, as in torch.optim."""
    values_UD = values_ND[rows_U]
    grad_UD = grad_UD + weight_decay * values_UD if weight_decay else grad_UD
    if rule == Optimizer.SGD:
        change_UD = grad_UD
    elif rule == Optimizer.ADAM:  # the moments of rows outside the batch rest, as in torch.optim.SparseAdam
        first, second = states
        first_UD = first[rows_U].lerp_(grad_UD, 1 - BETA1)
        second_UD = second[rows_U].mul_(BETA2).addcmul_(grad_UD, grad_UD, value=1 - BETA2)
        first[rows_U], second[rows_U] = first_UD, second_UD
        root_UD = second_UD.div(1 - BETA2**step).sqrt_().add_(eps)
        change_UD = first_UD.div(1 - BETA1**step).div_(root_UD)
    else:
        (total,) = states
        square = grad_UD.square()
        total_U = total[rows_U] + (square.mean(1, keepdim=True) if rule == Optimizer.ROWWISE_ADAGRAD else square)
        total[rows_U] = total_U
        change_UD = grad_UD / (total_U.sqrt() + eps)
    values_ND[rows_U] = values_UD - learning_rate * change_UD


@dataclass(frozen=True)
class _Block:
    """Tables of one width that lie side by side, and the features that look them up."""

    tables: list[Table]
    features: range
    feature_tables: list[int]  # of each feature, counted from the block's first table

    @property
    def dim(self) -> int:
        return self.tables[0].dim

    @property
    def first_row(self) -> int:
        return self.tables[0].first_row

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)

    def last_rows(self, device: torch.device) -> Tensor:
        """For each table, the block's row at which the next begins."""
        return torch.tensor([table.first_row + table.rows - self.first_row for table in self.tables], device=device)

    def elements(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.tables[0].first_element, self.rows * self.dim).view(-1, self.dim)

    def thresholds(self, flat: Tensor, shared: Shared) -> Tensor:
        """[T, 1], [T, D], [N, 1] or [N, D]."""
        if shared == Shared.TABLE:
            return flat.narrow(0, self.tables[0].number, len(self.tables)).view(-1, 1)
        if shared == Shared.COLUMN:
            return flat.narrow(0, self.tables[0].first_column, len(self.tables) * self.dim).view(-1, self.dim)
        return flat.narrow(0, self.first_row, self.rows).view(-1, 1) if shared == Shared.ROW else self.elements(flat)

    def states(self, flat: Sequence[Tensor], rule: Optimizer, one_a_row: bool) -> list[Tensor]:
        """The update rule's states as [N, D], or [N, 1] where it or what it updates has one value a row."""
        return [
            self.thresholds(state, Shared.ROW if one_a_row or one else Shared.ELEMENT)
            for state, (_, one) in zip(flat, STATES[rule], strict=True)
        ]


def _blocks(rows: Sequence[int], dims: Sequence[int], feature_tables: Sequence[int]) -> Iterator[_Block]:
    """The blocks of a group. Features come in the order of their tables."""
    first_feature = 0
    for _, members in groupby(tables_of(rows, dims), key=lambda table: table.dim):
        tables = list(members)
        numbers = {table.number for table in tables}
        own = [number - tables[0].number for number in feature_tables if number in numbers]
        yield _Block(tables, range(first_feature, first_feature + len(own)), own)
        first_feature += len(own)


class _Ids:
    """The ids of a block's features in a batch: their rows in the block, their tables, and their bags."""

    def __init__(self, block: _Block, indices: Tensor, offsets: Tensor, batch: int) -> None:
        first, last = block.features.start * batch, block.features.stop * batch
        self.batch, self.dim = batch, block.dim
        own = offsets[first : last + 1]
        self.lengths = own.diff()
        ids = indices[int(own[0]) : int(own[-1])]
        features = len(block.features)
        counts_F = own[::batch].diff() if batch else own.new_zeros(features)
        starts = [table.first_row - block.first_row for table in block.tables]
        tables_F = torch.tensor(block.feature_tables, device=ids.device)
        self.tables_L = tables_F.repeat_interleave(counts_F, output_size=ids.numel())
        self.rows_L = ids + torch.tensor(starts, device=ids.device)[self.tables_L]
        one_hot = ids.numel() == self.lengths.numel() and bool((self.lengths == 1).all())
        self.bags_L = None if one_hot else torch.repeat_interleave(self.lengths, output_size=ids.numel())

    def pool(self, vectors_LD: Tensor, mean: bool) -> Tensor:
        """Vectors of ids to vectors of samples, [B, F · D]."""
        if self.bags_L is not None:
            bags = vectors_LD.new_zeros(self.lengths.numel(), self.dim).index_add_(0, self.bags_L, vectors_LD)
            vectors_LD = bags / self.lengths.clamp(min=1).unsqueeze(1) if mean else bags
        return vectors_LD.view(-1, self.batch, self.dim).transpose(0, 1).reshape(self.batch, -1)

    def spread(self, grad: Tensor, mean: bool) -> Tensor:
        """Gradient of samples [B, F · D] to gradients of ids [L, D]."""
        grad = grad.reshape(self.batch, -1, self.dim).transpose(0, 1).reshape(-1, self.dim)
        if self.bags_L is None:
            return grad
        if mean:
            grad = grad / self.lengths.clamp(min=1).unsqueeze(1)
        return grad[self.bags_L]
