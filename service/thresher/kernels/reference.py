"""The lookup and its fused update in plain PyTorch: what every faster backend must equal.

Shapes: N rows of a table, D its columns, U different rows in a batch, L ids in a batch, B bags (samples of one
feature). A group of tables lies in one flat tensor, table after table, row after row; so do thresholds, masks and
optimizer states. The cost of a step depends on L and U, never on N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

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
    tables = tables_of(rows, dims)
    pooled = []
    for number, ids, bags, lengths in _features(indices, offsets, feature_tables):
        table = tables[number]
        vectors_LD = elements(weights, table)[ids]
        if shared != Shared.NONE:
            s = thresholds_of(thresholds, table, shared)
            s = s[ids] if shared >= Shared.ROW else s
            vectors_LD = soft_threshold(vectors_LD, torch.sigmoid(s + pressure))
        if mask.numel():
            vectors_LD = vectors_LD * elements(mask, table)[ids]
        if bags is not None:
            vectors_BD = vectors_LD.new_zeros(lengths.numel(), table.dim).index_add_(0, bags, vectors_LD)
            vectors_LD = vectors_BD / lengths.clamp(min=1).unsqueeze(1) if mean else vectors_BD
        pooled.append(vectors_LD)
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
    tables = tables_of(rows, dims)
    threshold_grad = (
        torch.zeros_like(thresholds) if shared in (Shared.TABLE, Shared.COLUMN) else thresholds.new_empty(0)
    )
    for table, ids, grad_LD in _by_table(grad, tables, indices, offsets, feature_tables, mean):
        rows_U, inverse = torch.unique(ids, return_inverse=True)
        grad_UD = grad_LD.new_zeros(rows_U.numel(), table.dim).index_add_(0, inverse, grad_LD)
        values = elements(weights, table)
        if mask.numel():
            grad_UD = grad_UD * elements(mask, table)[rows_U]
        if shared != Shared.NONE:
            s = thresholds_of(thresholds, table, shared)
            s_UD = s[rows_U] if shared >= Shared.ROW else s
            v_UD = values[rows_U]
            g_UD = torch.sigmoid(s_UD + pressure)
            grad_UD = grad_UD * (v_UD.abs() > g_UD)
            grad_s_UD = -(g_UD * (1 - g_UD)) * grad_UD * v_UD.sign()
            seen[table.first_row + rows_U] = True
            if shared >= Shared.ROW:
                grad_s_UD = grad_s_UD.sum(1, keepdim=True) if shared == Shared.ROW else grad_s_UD
                states = [
                    _state(flat, table, shared == Shared.ROW or one)
                    for flat, (_, one) in zip(threshold_states, STATES[rule], strict=True)
                ]
                _step(rule, s, rows_U, grad_s_UD, states, threshold_learning_rate, threshold_weight_decay, eps, step)
            else:
                part = thresholds_of(threshold_grad, table, shared)
                part += grad_s_UD.sum() if shared == Shared.TABLE else grad_s_UD.sum(0, keepdim=True)
        states = [_state(flat, table, one) for flat, (_, one) in zip(weight_states, STATES[rule], strict=True)]
        _step(rule, values, rows_U, grad_UD, states, learning_rate, weight_decay, eps, step)
    return threshold_grad


def _state(flat: Tensor, table: Table, one_a_row: bool) -> Tensor:
    return per_row(flat, table) if one_a_row else elements(flat, table)


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


def _features(
    indices: Tensor, offsets: Tensor, feature_tables: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor]]:
    """For each feature its table's number, its ids, the bag of each id (None: one id a bag), and the bags' lengths."""
    batch = (offsets.numel() - 1) // max(1, len(feature_tables))
    bounds = offsets[:: batch or 1].tolist() if batch else [0] * (len(feature_tables) + 1)
    lengths_FB = offsets.diff().view(len(feature_tables), batch)
    for number, low, high, lengths in zip(feature_tables, bounds, bounds[1:], lengths_FB, strict=False):
        one_hot = high - low == batch and bool((lengths == 1).all())
        bags = None if one_hot else torch.arange(batch, device=offsets.device).repeat_interleave(lengths)
        yield number, indices[low:high], bags, lengths


def _by_table(
    grad: Tensor,
    tables: Sequence[Table],
    indices: Tensor,
    offsets: Tensor,
    feature_tables: Sequence[int],
    mean: bool,
) -> Iterator[tuple[Table, Tensor, Tensor]]:
    """For each table that the batch names, the ids of all its features and the gradient of each id's vector."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    column = 0
    for number, ids, bags, lengths in _features(indices, offsets, feature_tables):
        grad_BD = grad[:, column : column + tables[number].dim]
        column += tables[number].dim
        if bags is not None and mean:
            grad_BD = grad_BD / lengths.clamp(min=1).unsqueeze(1)
        if ids.numel():
            found.setdefault(number, []).append((ids, grad_BD if bags is None else grad_BD[bags]))
    for number, parts in found.items():
        yield tables[number], torch.cat([ids for ids, _ in parts]), torch.cat([part for _, part in parts])
