"""How tables may be split over ranks, by their representation and update rule."""

from __future__ import annotations

from torchrec.distributed.types import ShardingType

from thresher.embedding.representation import Masked, Representation, RowOptimizer, SoftThreshold
from thresher.kernels.layout import Optimizer, Shared

# TorchRec's names; what splits tables by rows leaves each row whole.
ROW_SPLIT = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
COLUMN_SPLIT = (
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
)
SHARDING_TYPES = (ShardingType.TABLE_WISE.value, ShardingType.DATA_PARALLEL.value, *ROW_SPLIT, *COLUMN_SPLIT)


def refusal(representation: Representation, optimizer: RowOptimizer, sharding_type: str) -> str | None:
    """Why such tables cannot have this sharding type, and the mend; None where they can.

    Every sharding must give what one rank gives. A value that is shared by the columns of a row changes by a sum over
    all of them in each step, which ranks that hold some of the columns do not know.
    """
    if sharding_type not in SHARDING_TYPES:
        return f"there is no such sharding; take one of {', '.join(SHARDING_TYPES)}"
    if sharding_type in COLUMN_SPLIT:
        instead = ", ".join(kind for kind in SHARDING_TYPES if kind not in COLUMN_SPLIT)
        if isinstance(representation, SoftThreshold) and representation.shared == Shared.ROW:
            return (
                f"granularity {representation.granularity} shares a threshold by the columns of a row, which may then "
                f"not be split; take one of {instead}, or granularity feature_dimension"
            )
        if isinstance(representation, Masked):
            return (
                "the kept values of a row lie side by side, so that its columns may not be split; take one of "
                f"{instead}"
            )
        if optimizer.rule == Optimizer.ROWWISE_ADAGRAD:
            return (
                "row-wise Adagrad has one moment for the columns of a row, which may then not be split; take one of "
                f"{instead}, or the optimizer adagrad"
            )
    return None


def allowed_types(representation: Representation, optimizer: RowOptimizer) -> list[str]:
    """The sharding types that such tables may have."""
    return [kind for kind in SHARDING_TYPES if refusal(representation, optimizer, kind) is None]
