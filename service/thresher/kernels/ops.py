"""The operators `thresher::lookup` and `thresher::update`: schemas, shape inference, autograd and dispatch.

A backend registers its own implementation of the two operators for its dispatch key (`CPU`: C++, `CUDA`: Triton);
where there is none the plain-PyTorch reference runs. A group of tables is described by lists: `rows` and `dims` of each
table, for each feature the number of its table, and the partitions of composed tables (`layout.partitions_of`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thresher.kernels import reference
from thresher.kernels.layout import Combine, Optimizer, Shared, output_dims

_BATCH = (
    "Tensor indices, Tensor offsets, Tensor? sample_weights, float pressure, int[] rows, int[] dims, "
    "int[] feature_tables, int[] partitions, int combine, int shared, bool mean"
)
_library = torch.library.Library("thresher", "DEF")
_library.define(f"lookup(Tensor weights, Tensor thresholds, Tensor mask, Tensor starts, {_BATCH}) -> Tensor")
_library.define(
    "update(Tensor grad, Tensor(a!) weights, Tensor(b!)[] weight_states, Tensor(c!) thresholds, "
    f"Tensor(d!)[] threshold_states, Tensor mask, Tensor starts, Tensor(e!) seen, {_BATCH}, int optimizer, "
    "float learning_rate, float weight_decay, float threshold_learning_rate, float threshold_weight_decay, float eps, "
    "int step, bool sample_weight_grad) -> (Tensor, Tensor)"
)
_library.impl("lookup", reference.lookup, "CompositeExplicitAutograd")
_library.impl("update", reference.update, "CompositeExplicitAutograd")


def _load_cpu_kernels() -> bool:
    """Load what `setup.py` built from `cpu/`; it registers itself for `CPU`."""
    for path in Path(__file__).parent.glob("_cpu*.so"):
        torch.ops.load_library(path)
        return True
    warnings.warn(
        "thresher was installed without its C++ kernels, so lookups run in plain PyTorch, several times slower; with "
        "torch and a C++20 compiler there, run `pip install --no-build-isolation --force-reinstall --no-deps thresher`",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


CPU_KERNELS = _load_cpu_kernels()
if torch.cuda.is_available():  # Triton comes with torch for CUDA
    from thresher.kernels import triton

    triton.register(_library)


@torch.library.register_fake("thresher::lookup", lib=_library)  # type: ignore[untyped-decorator]
def _(
    weights: Tensor,
    thresholds: Tensor,  # noqa: ARG001 - the operator's signature
    mask: Tensor,  # noqa: ARG001
    starts: Tensor,  # noqa: ARG001
    indices: Tensor,  # noqa: ARG001
    offsets: Tensor,
    sample_weights: Tensor | None,  # noqa: ARG001
    pressure: float,  # noqa: ARG001
    rows: Sequence[int],  # noqa: ARG001
    dims: Sequence[int],
    feature_tables: Sequence[int],
    partitions: Sequence[int],
    combine: int,
    *_: Any,
) -> Tensor:
    batch = (offsets.shape[0] - 1) // len(feature_tables)
    wide = output_dims(dims, partitions, combine)
    dtype = torch.promote_types(weights.dtype, torch.float32)
    return weights.new_empty(batch, sum(wide[table] for table in feature_tables), dtype=dtype)


@torch.library.register_fake("thresher::update", lib=_library)  # type: ignore[untyped-decorator]
def _(grad: Tensor, weights: Tensor, weight_states: Any, thresholds: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    indices, shared, sample_weight_grad = rest[4], rest[13], rest[-1]
    threshold_grad = torch.empty_like(thresholds if shared in (Shared.TABLE, Shared.COLUMN) else thresholds[:0])
    return threshold_grad, grad.new_empty(indices.shape[0] if sample_weight_grad else 0)


@dataclass
class Group:
    """The flat tensors of tables that are looked up together, and how they learn.

    With N rows and D columns of each table: `weights` [Σ N·D], in float32, float16 or bfloat16; `seen` [Σ N];
    `thresholds` by what shares them: none [0], table [tables], column [Σ D], row [Σ N], element [Σ N·D]. Thresholds
    shared by a table or a column are not here: they are replicated parameters, given to `lookup`. With `mask` and
    `starts` (see `layout`) weights and their states are compact; both are empty where nothing is masked. States are
    float32. `partitions` and `combine` are for composed tables: N is then the rows of all partitions together. `step`
    counts updates, in the processor's memory on every device.

    float64 is for checking gradients: it always runs the reference.
    """

    weights: Tensor
    weight_states: list[Tensor]
    thresholds: Tensor
    threshold_states: list[Tensor]
    mask: Tensor
    starts: Tensor
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
    partitions: list[int] = field(default_factory=list)
    combine: Combine = Combine.ADD
    step: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    anchor: Tensor = field(default_factory=lambda: torch.empty(0, requires_grad=True))

    def lookup(
        self,
        indices: Tensor,
        offsets: Tensor,
        sample_weights: Tensor | None = None,
        shared_thresholds: Tensor | None = None,
    ) -> Tensor:
        """Pooled vectors of a batch; its backward updates the tables in place.

        Args:
            indices: int32 or int64 [L], ids, feature by feature, bag by bag; features in any order.
            offsets: int32 or int64 [features · B + 1], where each bag begins in `indices`.
            sample_weights: float32 [L], a factor for each id's vector; gets a gradient like any tensor.
            shared_thresholds: thresholds shared by tables or columns; gets a gradient like any tensor.

        Returns:
            float32 [B, Σ D over features].
        """
        result: Tensor = _Lookup.apply(self.anchor, shared_thresholds, sample_weights, self, indices, offsets)  # type: ignore[no-untyped-call]
        return result

    def update(
        self,
        grad: Tensor,
        indices: Tensor,
        offsets: Tensor,
        sample_weights: Tensor | None,
        shared_thresholds: Tensor | None,
        pressure: float,
        sample_weight_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """Update the tables by the gradient of a lookup; gives those of shared thresholds and of sample weights."""
        self.step += 1
        thresholds = self.thresholds if shared_thresholds is None else shared_thresholds
        threshold_grad, factor_grad = _operators(self.weights).update(
            grad.contiguous(), self.weights, self.weight_states, thresholds, self.threshold_states, self.mask,
            self.starts, self.seen, indices, offsets, sample_weights, pressure, *self._layout(), self.optimizer,
            self.learning_rate, self.weight_decay, self.threshold_learning_rate, self.threshold_weight_decay, self.eps,
            int(self.step), sample_weight_grad,
        )  # fmt: skip
        return threshold_grad, factor_grad

    def _layout(self) -> tuple[Any, ...]:
        return self.rows, self.dims, self.feature_tables, self.partitions, self.combine, self.shared, self.mean


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        shared_thresholds: Tensor | None,
        sample_weights: Tensor | None,
        group: Group,
        indices: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        del anchor  # an input that asks for a gradient, so that backward is called although the weights do not
        ctx.group, ctx.pressure = group, group.pressure
        ctx.save_for_backward(indices, offsets, shared_thresholds, sample_weights)
        thresholds = group.thresholds if shared_thresholds is None else shared_thresholds
        return _operators(group.weights).lookup(  # type: ignore[no-any-return]
            group.weights, thresholds, group.mask, group.starts, indices, offsets, sample_weights, group.pressure,
            *group._layout(),
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group: Group = ctx.group
        indices, offsets, shared_thresholds, sample_weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2]
        threshold_grad, factor_grad = group.update(
            grad, indices, offsets, sample_weights, shared_thresholds, ctx.pressure, wanted
        )
        shared = threshold_grad if ctx.needs_input_grad[1] else None
        return None, shared, factor_grad if wanted else None, None, None, None


def _operators(weights: Tensor) -> Any:
    return reference if weights.dtype == torch.float64 else torch.ops.thresher
