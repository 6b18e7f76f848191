"""How tables may be split over ranks, by their representation and update rule."""

from __future__ import annotations

from torchrec.distributed.types import ShardingType

from thresher.embedding.representation import (
    Dense,
    Masked,
    Representation,
    RowOptimizer,
    SoftThreshold,
    composed_of,
    entries_of,
)
from thresher.kernels.layout import Combine, Optimizer, Shared

# TorchRec's names; a grid splits tables by rows and by columns.
ROW_SPLIT = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)
COLUMN_SPLIT = (
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
)
SHARDING_TYPES = (
    ShardingType.TABLE_WISE.value,
    ShardingType.DATA_PARALLEL.value,
    *(kind for kind in ROW_SPLIT if kind not in COLUMN_SPLIT),
    *COLUMN_SPLIT,
)


def refusal(representation: Representation, optimizer: RowOptimizer, sharding_type: str) -> str | None:
    """Why such tables cannot have this sharding type, and the mend; None where they can.

    Every sharding must give what one rank gives. A value that is shared by the columns of a row changes by a sum over
    all of them in each step, which ranks that hold some of the columns do not know.
    """
    if sharding_type not in SHARDING_TYPES:
        return f"there is no such sharding; take one of {', '.join(SHARDING_TYPES)}"
    found = _obstacle(representation, optimizer, sharding_type)
    if found is None:
        return None
    reason, mend = found
    return f"{reason}; take one of {', '.join(allowed_types(representation, optimizer))}{mend}"


def allowed_types(representation: Representation, optimizer: RowOptimizer) -> list[str]:
    """The sharding types that such tables may have."""
    return [kind for kind in SHARDING_TYPES if _obstacle(representation, optimizer, kind) is None]


def _obstacle(representation: Representation, optimizer: RowOptimizer, sharding_type: str) -> tuple[str, str] | None:
    """Why such tables cannot have this sharding type, and what else than another sharding would help."""
    composed, entries = composed_of(representation), entries_of(representation)
    if composed and composed.combine == Combine.CONCAT:
        if sharding_type in COLUMN_SPLIT:
            return (
                "combine concat has some of a vector's columns in each row, whose own may then not be split",
                ", or combine add or mult",
            )
        return None
    if composed and composed.combine == Combine.MULT and not isinstance(entries, Dense) and sharding_type in ROW_SPLIT:
        return (
            "combine mult sends rows to the ranks that multiply them, which have no thresholds and masks for them",
            ", or combine add",
        )
    if sharding_type in COLUMN_SPLIT:
        if isinstance(entries, SoftThreshold) and entries.shared == Shared.ROW:
            return (
                f"granularity {entries.granularity} shares a threshold by the columns of a row, which may then "
                "not be split",
                ", or granularity feature_dimension",
            )
        if isinstance(entries, Masked):
            return "the kept values of a row lie side by side, so that its columns may not be split", ""
        if optimizer.rule == Optimizer.ROWWISE_ADAGRAD:
            return (
                "row-wise Adagrad has one moment for the columns of a row, which may then not be split",
                ", or the optimizer adagrad",
            )
    return None
