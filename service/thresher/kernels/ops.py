"""The operators `thresher::lookup` and `thresher::update`: schemas, shape inference, autograd and dispatch.

A faster backend registers its own implementation of the two operators for its dispatch key (`CPU`, `CUDA`); where
there is none the reference runs. A group of tables is described by lists: `rows` and `dims` of each table, and for
each feature the number of its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thresher.kernels import reference
from thresher.kernels.reference import STATES, Optimizer, Shared

_GROUP = (
    "Tensor indices, Tensor offsets, float pressure, SymInt[] rows, int[] dims, int[] feature_tables, "
    "int shared, bool mean"
)
_library = torch.library.Library("thresher", "DEF")
_library.define(f"lookup(Tensor weights, Tensor thresholds, Tensor mask, {_GROUP}) -> Tensor")
_library.define(
    "update(Tensor grad, Tensor(a!) weights, Tensor(b!)[] weight_states, Tensor(c!) thresholds, "
    f"Tensor(d!)[] threshold_states, Tensor mask, Tensor(e!) seen, {_GROUP}, int optimizer, float learning_rate, "
    "float weight_decay, float threshold_learning_rate, float threshold_weight_decay, float eps, int step) -> Tensor"
)
_library.impl("lookup", reference.lookup, "CompositeExplicitAutograd")
_library.impl("update", reference.update, "CompositeExplicitAutograd")


@torch.library.register_fake("thresher::lookup", lib=_library)  # type: ignore[untyped-decorator]
def _(
    weights: Tensor,
    thresholds: Tensor,  # noqa: ARG001 - the operator's signature
    mask: Tensor,  # noqa: ARG001
    indices: Tensor,  # noqa: ARG001
    offsets: Tensor,
    pressure: float,  # noqa: ARG001
    rows: Sequence[int],  # noqa: ARG001
    dims: Sequence[int],
    feature_tables: Sequence[int],
    *_: Any,
) -> Tensor:
    batch = (offsets.shape[0] - 1) // len(feature_tables)
    return weights.new_empty(batch, sum(dims[table] for table in feature_tables))


@torch.library.register_fake("thresher::update", lib=_library)  # type: ignore[untyped-decorator]
def _(grad: Tensor, weights: Tensor, weight_states: Any, thresholds: Tensor, *rest: Any) -> Tensor:  # noqa: ARG001
    return torch.empty_like(thresholds if rest[8] in (Shared.TABLE, Shared.COLUMN) else thresholds[:0])


@dataclass
class Group:
    """The flat tensors of tables that are looked up together, and how they learn.

    With N rows and D columns of each table: `weights`, `mask` [Σ N·D]; `seen` [Σ N]; `thresholds` by what shares
    them: none [0], table [tables], column [Σ D], row [Σ N], element [Σ N·D]. `mask` is empty where nothing is masked.
    Thresholds shared by a table or a column are not here: they are replicated parameters, given to `lookup`.
    `step` counts updates, in the processor's memory on every device.
    """

    weights: Tensor
    weight_states: list[Tensor]
    thresholds: Tensor
    threshold_states: list[Tensor]
    mask: Tensor
    seen: Tensor
    rows: list[int]
    dims: list[int]
    feature_tables: list[int]
    shared: Shared
    mean: bool
    optimizer: Optimizer
    learning_rate: float
    weight_decay: float = 0.0
    threshold_learning_rate: float = 0.0
    threshold_weight_decay: float = 0.0
    eps: float = 1e-8
    pressure: float = 0.0
    step: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    anchor: Tensor = field(default_factory=lambda: torch.empty(0, requires_grad=True))

    def lookup(self, indices: Tensor, offsets: Tensor, shared_thresholds: Tensor | None = None) -> Tensor:
        """Pooled vectors of a batch; its backward updates the tables in place.

        Args:
            indices: int64 [L], row numbers, feature by feature, bag by bag.
            offsets: int64 [features · B + 1], where each bag begins in `indices`.
            shared_thresholds: thresholds shared by tables or columns; gets a gradient like any tensor.

        Returns:
            float [B, Σ D over features].
        """
        thresholds = self.thresholds if shared_thresholds is None else shared_thresholds
        result: Tensor = _Lookup.apply(self.anchor, thresholds, self, indices, offsets)  # type: ignore[no-untyped-call]
        return result


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, thresholds: Tensor, group: Group, indices: Tensor, offsets: Tensor) -> Tensor:
        del anchor  # an input that asks for a gradient, so that backward is called although the weights do not
        ctx.group, ctx.pressure = group, group.pressure
        ctx.save_for_backward(indices, offsets, thresholds)
        return torch.ops.thresher.lookup(  # type: ignore[no-any-return]
            group.weights, thresholds, group.mask, indices, offsets, group.pressure,
            group.rows, group.dims, group.feature_tables, group.shared, group.mean,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group: Group = ctx.group
        indices, offsets, thresholds = ctx.saved_tensors
        group.step += 1
        threshold_grad = torch.ops.thresher.update(
            grad.contiguous(), group.weights, group.weight_states, thresholds, group.threshold_states, group.mask,
            group.seen, indices, offsets, ctx.pressure, group.rows, group.dims, group.feature_tables, group.shared,
            group.mean, group.optimizer, group.learning_rate, group.weight_decay, group.threshold_learning_rate,
            group.threshold_weight_decay, group.eps, int(group.step),
        )  # fmt: skip
        return None, threshold_grad if threshold_grad.numel() else None, None, None, None


__all__ = ["STATES", "Group", "Optimizer", "Shared"]
