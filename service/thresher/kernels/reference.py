"""The lookup and its fused update in plain PyTorch: what every faster backend must equal.

Arguments as in `ops`, shapes as in `layout`. A table at a time, and only rows of the batch: the cost of a step depends
on L and U, never on N. Values of 16 bits are computed with in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.kernels.layout import (
    BETA1,
    BETA2,
    BLOCK_ROWS,
    STATES,
    Combine,
    Optimizer,
    Shared,
    Table,
    elements,
    masks_of,
    partitions_of,
    per_row,
    stacked_rows,
    tables_of,
    thresholds_of,
    unpack_masks,
)


def soft_threshold(values: Tensor, threshold: Tensor) -> Tensor:
    """`sign(v) · max(|v| − g, 0)` (Liu et al., ICLR 2021, eq. 5), for g >= 0."""
    return values - values.clamp(-threshold, threshold)


def lookup(
    weights: Tensor,
    thresholds: Tensor,
    mask: Tensor,
    starts: Tensor,
    indices: Tensor,
    offsets: Tensor,
    sample_weights: Tensor | None,
    pressure: float,
    rows: Sequence[int],
    dims: Sequence[int],
    feature_tables: Sequence[int],
    partitions: Sequence[int],
    combine: int,
    shared: int,
    mean: bool,
) -> Tensor:
    """Pooled vectors [B, Σ output columns over features]."""
    tables, splits = tables_of(rows, dims), partitions_of(partitions, len(rows))
    pooled = []
    for feature, number in enumerate(feature_tables):
        bags = _Bags(feature, len(feature_tables), indices, offsets, sample_weights)
        rows_LK = stacked_rows(bags.ids_L, splits[number])
        chosen = Rows(tables[number], rows_LK.flatten(), mask, starts)
        vectors_LKD = _vectors(chosen, weights, thresholds, Shared(shared), pressure).view(*rows_LK.shape, dims[number])
        pooled.append(bags.pool(combined(vectors_LKD, Combine(combine)), mean))
    return torch.cat(pooled, dim=1)


def update(
    grad: Tensor,
    weights: Tensor,
    weight_states: Sequence[Tensor],
    thresholds: Tensor,
    threshold_states: Sequence[Tensor],
    mask: Tensor,
    starts: Tensor,
    seen: Tensor,
    indices: Tensor,
    offsets: Tensor,
    sample_weights: Tensor | None,
    pressure: float,
    rows: Sequence[int],
    dims: Sequence[int],
    feature_tables: Sequence[int],
    partitions: Sequence[int],
    combine: int,
    shared: int,
    mean: bool,
    optimizer: int,
    learning_rate: float,
    weight_decay: float,
    threshold_learning_rate: float,
    threshold_weight_decay: float,
    eps: float,
    step: int,
    sample_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Backward and update in one; gives the gradients of shared thresholds and of sample weights."""
    shared, rule = Shared(shared), Optimizer(optimizer)
    per_table = shared in (Shared.TABLE, Shared.COLUMN)
    threshold_grad = torch.zeros_like(thresholds) if per_table else thresholds.new_empty(0)
    weight_grads = []
    columns = dict(enumerate(_feature_columns(grad, dims, feature_tables, partitions, combine)))
    splits = partitions_of(partitions, len(rows))
    for table in tables_of(rows, dims):
        rows_P, grads_PD = [], []  # of all pairs of an id and one of its partitions
        for feature in (f for f, number in enumerate(feature_tables) if number == table.number):
            bags = _Bags(feature, len(feature_tables), indices, offsets, sample_weights)
            rows_LK = stacked_rows(bags.ids_L, splits[table.number])
            chosen = Rows(table, rows_LK.flatten(), mask, starts)
            vectors_LKD = _vectors(chosen, weights, thresholds, shared, pressure).view(*rows_LK.shape, table.dim)
            grad_LD = bags.spread(columns[feature], mean)
            if sample_weight_grad:
                weight_grads.append((feature, (grad_LD * combined(vectors_LKD, Combine(combine))).sum(1)))
            rows_P.append(rows_LK.flatten())
            grads_PD.append(_grad_of_rows(bags.weighted(grad_LD), vectors_LKD, Combine(combine)).flatten(0, 1))
        if not rows_P:
            continue
        rows_U, inverse_P = torch.unique(torch.cat(rows_P), return_inverse=True)
        grad_UD = grads_PD[0].new_zeros(rows_U.numel(), table.dim).index_add_(0, inverse_P, torch.cat(grads_PD))
        chosen = Rows(table, rows_U, mask, starts)
        grad_UD = chosen.keep(grad_UD)
        if shared != Shared.NONE:
            s = thresholds_of(thresholds, table, shared)
            v_UD = chosen.read(weights)
            g_UD = torch.sigmoid((s if per_table else s[rows_U]) + pressure)
            grad_UD = grad_UD * (v_UD.abs() > g_UD)
            grad_s_UD = -(g_UD * (1 - g_UD)) * grad_UD * v_UD.sign()
            if shared in (Shared.TABLE, Shared.ROW):
                grad_s_UD = grad_s_UD.sum(1, keepdim=True)
            if per_table:
                thresholds_of(threshold_grad, table, shared).add_(grad_s_UD.sum(0, keepdim=True))
            else:
                _step_thresholds(
                    rule, table, rows_U, thresholds, grad_s_UD, threshold_states, shared,
                    threshold_learning_rate, threshold_weight_decay, eps, step,
                )  # fmt: skip
            per_row(seen, table)[rows_U] = True
        values_UD = chosen.read(weights)
        states = [
            per_row(state, table)[rows_U] if one_a_row else chosen.read(state)
            for state, (_, one_a_row) in zip(weight_states, STATES[rule], strict=True)
        ]
        values_UD, states = _step(rule, values_UD, grad_UD, states, learning_rate, weight_decay, eps, step)
        chosen.write(weights, values_UD)
        for state, new, (_, one_a_row) in zip(weight_states, states, STATES[rule], strict=True):
            if one_a_row:
                per_row(state, table)[rows_U] = new
            else:
                chosen.write(state, new)
    in_order = [grad_L for _, grad_L in sorted(weight_grads, key=lambda found: found[0])]
    return threshold_grad, torch.cat(in_order) if in_order else grad.new_empty(0)


def _step(
    rule: Optimizer,
    values_UD: Tensor,
    grad_UD: Tensor,
    states: Sequence[Tensor],
    learning_rate: float,
    weight_decay: float,
    eps: float,
    step: int,
) -> tuple[Tensor, list[Tensor]]:
    """One step of the update rule on some rows; L2 joins the gradient, as in torch.optim."""
    grad_UD = grad_UD + weight_decay * values_UD if weight_decay else grad_UD
    if rule == Optimizer.SGD:
        return values_UD - learning_rate * grad_UD, []
    if rule == Optimizer.ADAM:  # the moments of rows outside the batch rest, as in torch.optim.SparseAdam
        first, second = states
        first_UD = first.lerp(grad_UD, 1 - BETA1)
        second_UD = (second * BETA2).addcmul_(grad_UD, grad_UD, value=1 - BETA2)
        root_UD = second_UD.div(1 - BETA2**step).sqrt_().add_(eps)
        change_UD = first_UD.div(1 - BETA1**step).div_(root_UD)
        return values_UD - learning_rate * change_UD, [first_UD, second_UD]
    square = grad_UD.square()
    total = states[0] + (square.mean(1, keepdim=True) if rule == Optimizer.ROWWISE_ADAGRAD else square)
    return values_UD - learning_rate * grad_UD / (total.sqrt() + eps), [total]


def _step_thresholds(
    rule: Optimizer,
    table: Table,
    rows_U: Tensor,
    thresholds: Tensor,
    grad: Tensor,
    flat_states: Sequence[Tensor],
    shared: Shared,
    learning_rate: float,
    weight_decay: float,
    eps: float,
    step: int,
) -> None:
    """Update the thresholds of the batch's rows, [U, 1] or [U, D], by the same rule as the values."""
    views = [
        per_row(state, table) if one_a_row or shared == Shared.ROW else elements(state, table)
        for state, (_, one_a_row) in zip(flat_states, STATES[rule], strict=True)
    ]
    s = thresholds_of(thresholds, table, shared)
    s[rows_U], states = _step(rule, s[rows_U], grad, [v[rows_U] for v in views], learning_rate, weight_decay, eps, step)
    for view, state in zip(views, states, strict=True):
        view[rows_U] = state


def _vectors(chosen: Rows, weights: Tensor, thresholds: Tensor, shared: Shared, pressure: float) -> Tensor:
    """The rows after thresholding, [·, D]."""
    values = chosen.read(weights)
    if shared == Shared.NONE:
        return values
    s = thresholds_of(thresholds, chosen.table, shared)
    return soft_threshold(values, torch.sigmoid((s[chosen.rows] if shared >= Shared.ROW else s) + pressure))


def combined(vectors_LKD: Tensor, combine: Combine) -> Tensor:
    """One vector for each id, [L, D], or [L, K·D] for `CONCAT`."""
    if combine == Combine.CONCAT:
        return vectors_LKD.flatten(1)
    return vectors_LKD.prod(1) if combine == Combine.MULT else vectors_LKD.sum(1)


def _grad_of_rows(grad_LD: Tensor, vectors_LKD: Tensor, combine: Combine) -> Tensor:
    """Gradient of an id's vector to gradients of its rows, [L, K, D]."""
    partitions = vectors_LKD.shape[1]
    if combine == Combine.CONCAT:
        return grad_LD.view(-1, partitions, vectors_LKD.shape[2])
    if combine == Combine.ADD:
        return grad_LD.unsqueeze(1).expand(-1, partitions, -1)
    others = [torch.cat([vectors_LKD[:, :own], vectors_LKD[:, own + 1 :]], dim=1).prod(1) for own in range(partitions)]
    return grad_LD.unsqueeze(1) * torch.stack(others, dim=1)


def _feature_columns(
    grad: Tensor, dims: Sequence[int], feature_tables: Sequence[int], partitions: Sequence[int], combine: int
) -> tuple[Tensor, ...]:
    """The columns of each feature in the gradient of the pooled vectors."""
    splits = partitions_of(partitions, len(dims))
    wide = [dims[t] * (len(splits[t]) or 1) if combine == Combine.CONCAT else dims[t] for t in feature_tables]
    columns: tuple[Tensor, ...] = grad.split(wide, dim=1)
    return columns


@dataclass(frozen=True)
class Rows:
    """Some rows of a table [U], read from and written to full or compact storage."""

    table: Table
    rows: Tensor
    mask: Tensor
    starts: Tensor

    def read(self, flat: Tensor) -> Tensor:
        """The rows [U, D], 0 where pruned, in float32 at least."""
        wide = torch.promote_types(flat.dtype, torch.float32)
        if not self.mask.numel():
            return elements(flat, self.table)[self.rows].to(wide)
        kept_UD, places_UD = self._places()
        values = torch.zeros(kept_UD.shape, dtype=wide, device=flat.device)
        values[kept_UD] = flat[places_UD[kept_UD]].to(wide)
        return values

    def write(self, flat: Tensor, values_UD: Tensor) -> None:
        """Store the rows, each of which may be there only once; what is pruned has no place."""
        if not self.mask.numel():
            elements(flat, self.table)[self.rows] = values_UD.to(flat.dtype)
            return
        kept_UD, places_UD = self._places()
        flat[places_UD[kept_UD]] = values_UD[kept_UD].to(flat.dtype)

    def keep(self, grad_UD: Tensor) -> Tensor:
        """The gradient of the rows' values: 0 where pruned."""
        return grad_UD * self._places()[0] if self.mask.numel() else grad_UD

    def _places(self) -> tuple[Tensor, Tensor]:
        """Which entries are kept, and where each of them lies in compact storage; both [U, D]."""
        masks_NK = masks_of(self.mask, self.table)
        blocks = self.rows // BLOCK_ROWS
        kept_UD = unpack_masks(masks_NK[self.rows], self.table.dim)
        before_U = self.starts[self.table.first_start + blocks]
        for other in range(BLOCK_ROWS - 1):
            row_U = blocks * BLOCK_ROWS + other
            earlier = row_U < self.rows
            kept_U = unpack_masks(masks_NK[torch.where(earlier, row_U, 0)], self.table.dim).sum(1)
            before_U = before_U + kept_U * earlier
        return kept_UD, before_U.unsqueeze(1) + kept_UD.cumsum(1) - 1


class _Bags:
    """The ids of one feature in a batch, and the bags that they are in."""

    def __init__(
        self, feature: int, features: int, indices: Tensor, offsets: Tensor, sample_weights: Tensor | None
    ) -> None:
        batch = (offsets.numel() - 1) // features
        own = offsets[feature * batch : (feature + 1) * batch + 1].long()
        ids = slice(int(own[0]), int(own[-1]))
        self.ids_L = indices[ids].long()
        self.lengths_B = own.diff()
        self.bags_L = torch.repeat_interleave(self.lengths_B, output_size=self.ids_L.numel())
        self.sample_weights_L = None if sample_weights is None else sample_weights[ids]

    def weighted(self, vectors_LD: Tensor) -> Tensor:
        """Each id's vector times its sample weight, if there are any."""
        return vectors_LD if self.sample_weights_L is None else vectors_LD * self.sample_weights_L.unsqueeze(1)

    def pool(self, vectors_LD: Tensor, mean: bool) -> Tensor:
        """Vectors of ids to vectors of bags [B, D]; a mean divides by the number of ids, whatever their weights."""
        bags_BD = vectors_LD.new_zeros(self.lengths_B.numel(), vectors_LD.shape[1])
        bags_BD.index_add_(0, self.bags_L, self.weighted(vectors_LD))
        return bags_BD / self.lengths_B.clamp(min=1).unsqueeze(1) if mean else bags_BD

    def spread(self, grad_BD: Tensor, mean: bool) -> Tensor:
        """Gradient of bags to gradients of ids [L, D], before their sample weights."""
        if mean:
            grad_BD = grad_BD / self.lengths_B.clamp(min=1).unsqueeze(1)
        return grad_BD[self.bags_L]
