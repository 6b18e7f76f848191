"""The lookup: gather, mask, threshold, combine and pool in one kernel.

Shapes: B bags of one feature at a time, D columns of the widest table, rounded up to a power of two; B1 is [B, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from thresher.kernels.layout import Combine
from thresher.kernels.triton.metadata import Metadata
from thresher.kernels.triton.rows import CONCAT, combined, dim_of, parts_of

# TILE: entries of a program's tile, several bags if they are short, so that many rows are on their way from memory at
# once. Tuning runs the kernel many times, and may: it writes only its output. The interpreter takes the first.
_CONFIGS = [
    triton.Config({"TILE": 1024, "UNROLL": 1}, num_warps=4),
    triton.Config({"TILE": 1024, "UNROLL": 4}, num_warps=4),
    triton.Config({"TILE": 256, "UNROLL": 4}, num_warps=1),
][: 1 if knobs.runtime.interpret else None]


@triton.autotune(
    configs=_CONFIGS,
    key=["PARTS", "COMBINE", "SHARED", "MEAN", "ALIGN", "BLOCK_D", "MASK_BLOCK"],
)
@triton.jit(do_not_specialize=["batch"])
def _lookup_kernel(
    out, weights, thresholds, mask, starts, indices, offsets, sample_weights, pressure, tables, features, partitions,
    batch, width,
    PARTS: tl.constexpr, COMBINE: tl.constexpr, SHARED: tl.constexpr, MEAN: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr, MASK_BLOCK: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # One program for BLOCK_B bags of one feature, and for CONCAT of one partition. It walks them side by side, as long
    # as the longest of them. A bag is summed in its own order, so the result does not depend on the tuning.
    BLOCK_B: tl.constexpr = TILE // BLOCK_D if TILE > 2 * BLOCK_D else 2  # see `block_rows`
    feature, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    table, column = tl.load(features + 2 * feature), tl.load(features + 2 * feature + 1)
    dim = dim_of(tables, table, ALIGN)
    samples_B1 = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns_1D = tl.arange(0, BLOCK_D)[None, :]
    there_B1 = samples_B1 < batch
    if COMBINE == CONCAT and PARTS > 1:
        there_B1 &= part < parts_of(partitions, table, PARTS)
    bags = offsets + feature * batch + samples_B1
    first_B1 = tl.load(bags, mask=there_B1, other=0).to(tl.int64)
    length_B1 = tl.load(bags + 1, mask=there_B1, other=0).to(tl.int64) - first_B1
    pooled_BD = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)
    for step in tl.range(0, tl.max(length_B1), loop_unroll_factor=UNROLL):
        on_B1 = step < length_B1
        ids_B1 = tl.load(indices + first_B1 + step, mask=on_B1, other=0).to(tl.int64)
        vectors_BD = combined(
            ids_B1, on_B1, part, columns_1D, weights, thresholds, pressure, mask, starts, tables, table, partitions,
            PARTS, COMBINE, SHARED, ALIGN, MASK_BLOCK,
        )  # fmt: skip
        if sample_weights is not None:
            vectors_BD *= tl.load(sample_weights + first_B1 + step, mask=on_B1, other=0.0)
        pooled_BD += vectors_BD
    if MEAN:
        pooled_BD /= tl.maximum(length_B1, 1).to(tl.float32)
    places_B1 = tl.multiple_of(samples_B1 * width + column + part * dim, (ALIGN, ALIGN))
    tl.store(out + places_B1 + columns_1D, pooled_BD, mask=there_B1 & (columns_1D < dim))


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
    """Pooled vectors [B, Σ output columns over features]; arguments as in `ops`, results as in `reference`."""
    metadata = Metadata.of(rows, dims, feature_tables, partitions, combine, weights.device)
    batch = (offsets.numel() - 1) // len(feature_tables)
    out = torch.empty(batch, metadata.width, dtype=torch.float32, device=weights.device)
    if not batch:
        return out
    parts = max(1, metadata.parts) if combine == Combine.CONCAT else 1
    _lookup_kernel[
        lambda meta: (triton.cdiv(batch, metadata.block_rows(meta["TILE"])), len(feature_tables), parts)
    ](
        out, weights, thresholds, mask, starts, indices, offsets, sample_weights, pressure, metadata.tables,
        metadata.features, metadata.partitions, batch, metadata.width,
        PARTS=metadata.parts, COMBINE=combine, SHARED=shared, MEAN=mean, ALIGN=metadata.align,
        BLOCK_D=metadata.block_d, MASK_BLOCK=metadata.mask_block if mask.numel() else 0,
    )  # fmt: skip
    return out
