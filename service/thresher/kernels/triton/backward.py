"""The update: merge the gradients of equal rows, pass them through thresholds, and step the rows in place.

Shapes: P pairs of an id and one of its partitions at a time, sorted by the row that they mean, so that the pairs of one
row are a *run*; C positions of a chunk; B and D as in the lookup; P1 is [P, 1].

A run is cut at each multiple of CHUNK positions. What lies behind its first cut is summed chunk by chunk, side by side;
the program of the run's first position adds those sums. No atomics: the order of every sum is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.kernels.layout import BETA1, BETA2, Combine, Optimizer, Shared
from thresher.kernels.triton.metadata import Metadata
from thresher.kernels.triton.rows import (
    COLUMN,
    CONCAT,
    FIRST_COLUMN,
    FIRST_ROW,
    NONE,
    ROW,
    TABLE,
    combined,
    dim_of,
    field,
    parts_of,
    physical_rows,
    places,
    read,
    threshold_places,
    vectors,
)

_SGD: tl.constexpr = tl.constexpr(int(Optimizer.SGD))
_ROWWISE_ADAGRAD: tl.constexpr = tl.constexpr(int(Optimizer.ROWWISE_ADAGRAD))
_ADAM: tl.constexpr = tl.constexpr(int(Optimizer.ADAM))
_BETA1: tl.constexpr = tl.constexpr(BETA1)
_BETA2: tl.constexpr = tl.constexpr(BETA2)

# A row that occurs n times costs its program CHUNK + n / CHUNK steps, one after the other: n = 100,000 some 3,000 waits
# for the L2 cache, a millisecond or more, whatever else the step does.
_CHUNK = 32
_TILE = 1024  # entries of a program's tile; not tuned, since trying the update out would step the tables
_PROGRAMS = 8192  # at most about so many, of which each table gets its share


@triton.jit(do_not_specialize=["ids", "batch"])  # they change from step to step
def _pairs_kernel(
    keys, sources, scales, indices, offsets, bags, sample_weights, tables, features, partitions, ids, batch, width,
    no_row, PARTS: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # For each id: the keys of its pairs, where its bag's gradient begins, and by what that is to be multiplied.
    at_P = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there_P = at_P < ids
    ids_P = tl.load(indices + at_P, mask=there_P, other=0).to(tl.int64)
    bags_P = tl.load(bags + at_P, mask=there_P, other=1).to(tl.int64) - 1
    features_P = features + bags_P // batch * 2
    tables_P, columns_P = tl.load(features_P, mask=there_P, other=0), tl.load(features_P + 1, mask=there_P, other=0)
    tl.store(sources + at_P, bags_P % batch * width + columns_P, mask=there_P)
    if scales is not None:
        scale_P = tl.full([BLOCK], 1.0, dtype=tl.float32)
        if sample_weights is not None:
            scale_P *= tl.load(sample_weights + at_P, mask=there_P, other=0.0)
        if MEAN:
            first_P = tl.load(offsets + bags_P, mask=there_P, other=0)
            scale_P /= (tl.load(offsets + bags_P + 1, mask=there_P, other=1) - first_P).to(tl.float32)
        tl.store(scales + at_P, scale_P, mask=there_P)
    first_row_P = field(tables, tables_P, FIRST_ROW)
    if PARTS == 0:
        tl.store(keys + at_P, (first_row_P + ids_P).to(keys.dtype.element_ty), mask=there_P)
    else:
        for part in tl.static_range(PARTS):
            keys_P = first_row_P + physical_rows(ids_P, part, partitions, tables_P, PARTS)
            keys_P = tl.where(part < parts_of(partitions, tables_P, PARTS), keys_P, no_row)
            tl.store(keys + at_P * PARTS + part, keys_P.to(keys.dtype.element_ty), mask=there_P)


@triton.jit(do_not_specialize=["batch"])
def _ids_kernel(
    sample_weight_grads, pair_grads, grad, weights, thresholds, mask, starts, indices, offsets, pressure, tables,
    features, partitions, batch, width,
    PARTS: tl.constexpr, COMBINE: tl.constexpr, SHARED: tl.constexpr, MEAN: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr, MASK_BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # What needs the values before the update, walked as in the lookup: gradients of sample weights, and, for MULT, of
    # pairs, before their scales: the bag's gradient times the other partitions' rows.
    feature = tl.program_id(1).to(tl.int64)
    table, column = tl.load(features + 2 * feature), tl.load(features + 2 * feature + 1)
    dim = dim_of(tables, table, ALIGN)
    parts = parts_of(partitions, table, PARTS) if PARTS > 0 else 1
    samples_B1 = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    columns_1D = tl.arange(0, BLOCK_D)[None, :]
    there_B1 = samples_B1 < batch
    bags = offsets + feature * batch + samples_B1
    first_B1 = tl.load(bags, mask=there_B1, other=0).to(tl.int64)
    length_B1 = tl.load(bags + 1, mask=there_B1, other=0).to(tl.int64) - first_B1
    sources_B1 = tl.multiple_of(samples_B1 * width + column, (ALIGN, ALIGN))
    sources_BD = grad + sources_B1 + columns_1D
    for step in tl.range(0, tl.max(length_B1)):
        on_B1 = step < length_B1
        on_BD = on_B1 & (columns_1D < dim)
        ids_B1 = tl.load(indices + first_B1 + step, mask=on_B1, other=0).to(tl.int64)
        if sample_weight_grads is not None:
            sums_B1 = tl.zeros([BLOCK_B, 1], dtype=tl.float32)
            for part in tl.static_range(PARTS if COMBINE == CONCAT and PARTS > 1 else 1):
                on_part_B1 = on_B1 & (part < parts)
                vectors_BD = combined(
                    ids_B1, on_part_B1, part, columns_1D, weights, thresholds, pressure, mask, starts, tables, table,
                    partitions, PARTS, COMBINE, SHARED, ALIGN, MASK_BLOCK,
                )  # fmt: skip
                grad_BD = tl.load(sources_BD + part * dim, mask=on_BD & on_part_B1, other=0.0)
                sums_B1 += tl.sum(grad_BD * vectors_BD, axis=1, keep_dims=True)
            if MEAN:
                sums_B1 /= length_B1.to(tl.float32)
            tl.store(sample_weight_grads + first_B1 + step, sums_B1, mask=on_B1)
        if pair_grads is not None:
            grad_BD = tl.load(sources_BD, mask=on_BD, other=0.0)
            for own in tl.static_range(PARTS):
                others_BD = grad_BD
                for other in tl.static_range(PARTS):
                    if other != own:
                        on_part_B1 = on_B1 & (other < parts)
                        vectors_BD = vectors(
                            physical_rows(ids_B1, other, partitions, table, PARTS), on_part_B1, columns_1D, weights,
                            thresholds, pressure, mask, starts, tables, table, SHARED, ALIGN, MASK_BLOCK,
                        )  # fmt: skip
                        others_BD *= tl.where(other < parts, vectors_BD, 1.0)
                pairs_B1 = (first_B1 + step) * PARTS + own
                tl.store(
                    pair_grads + pairs_B1 * BLOCK_D + columns_1D,
                    others_BD,
                    mask=on_BD & (own < parts),
                )


@triton.jit
def _sum_of_run(
    at_P1, on_P1, keys_P1, end, columns_1D, dim, grad, pair_grads, sources, scales, keys, order,
    PARTS: tl.constexpr, COMBINE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # The gradient of runs from a position to their end or the end of the chunk: [P, D].
    next_PC = at_P1 + tl.arange(0, CHUNK)[None, :]
    within_PC = on_P1 & (next_PC < tl.minimum((at_P1 // CHUNK + 1) * CHUNK, end))
    same_PC = within_PC & (tl.load(keys + next_PC, mask=within_PC, other=-1) == keys_P1)
    length_P1 = tl.sum(same_PC.to(tl.int32), axis=1, keep_dims=True)
    sum_PD = tl.zeros([at_P1.shape[0], BLOCK_D], dtype=tl.float32)
    for step in tl.range(0, tl.max(length_P1)):
        now_P1 = step < length_P1
        now_PD = now_P1 & (columns_1D < dim)
        pairs_P1 = tl.load(order + at_P1 + step, mask=now_P1, other=0)
        ids_P1 = pairs_P1 // PARTS if PARTS > 1 else pairs_P1
        if pair_grads is not None:
            grad_PD = tl.load(pair_grads + pairs_P1 * BLOCK_D + columns_1D, mask=now_PD, other=0.0)
        else:
            sources_P1 = tl.load(sources + ids_P1, mask=now_P1, other=0)
            if COMBINE == CONCAT and PARTS > 1:
                sources_P1 += pairs_P1 % PARTS * dim
            sources_P1 = tl.multiple_of(sources_P1, (ALIGN, ALIGN))
            grad_PD = tl.load(grad + sources_P1 + columns_1D, mask=now_PD, other=0.0)
        if scales is not None:
            grad_PD *= tl.load(scales + ids_P1, mask=now_P1, other=0.0)
        sum_PD += grad_PD
    return sum_PD


@triton.jit
def _chunks_kernel(
    partials, grad, pair_grads, sources, scales, keys, order, ranges, tables,
    PARTS: tl.constexpr, COMBINE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    # For each chunk that begins within a run: the sum of the run's gradients in it.
    table = tl.program_id(1)
    begin, end = tl.load(ranges + table), tl.load(ranges + table + 1)
    dim = dim_of(tables, table, ALIGN)
    columns_1D = tl.arange(0, BLOCK_D)[None, :]
    first = begin // CHUNK + tl.program_id(0) * BLOCK_P
    for tile in tl.range(first, (end + CHUNK - 1) // CHUNK, tl.num_programs(0) * BLOCK_P):
        chunks_P1 = tile + tl.arange(0, BLOCK_P)[:, None]
        at_P1 = chunks_P1 * CHUNK
        on_P1 = (at_P1 > begin) & (at_P1 < end)
        keys_P1 = tl.load(keys + at_P1, mask=on_P1, other=-1)
        on_P1 &= keys_P1 == tl.load(keys + at_P1 - 1, mask=on_P1, other=-1)
        sum_PD = _sum_of_run(
            at_P1, on_P1, keys_P1, end, columns_1D, dim, grad, pair_grads, sources, scales, keys, order,
            PARTS, COMBINE, ALIGN, BLOCK_D, CHUNK,
        )  # fmt: skip
        tl.store(partials + chunks_P1 * BLOCK_D + columns_1D, sum_PD, mask=on_P1)


@triton.jit
def _step(
    flat, places_, there, values, grad, columns, first, second, state_places, state_there,
    learning_rate, weight_decay, eps, correction1, correction2, RULE: tl.constexpr,
):  # fmt: skip
    # One step of the update rule on entries [·, ·] of a flat tensor; ROWWISE_ADAGRAD has one state a row: [·, 1].
    grad += weight_decay * values
    change = grad
    if RULE == _ADAM:
        moment1 = read(first, state_places, state_there)
        moment2 = read(second, state_places, state_there)
        moment1 += (1 - _BETA1) * (grad - moment1)
        moment2 = _BETA2 * moment2 + (1 - _BETA2) * grad * grad
        change = moment1 / correction1 / (tl.sqrt(moment2 / correction2) + eps)
    elif RULE != _SGD:
        square = grad * grad
        if RULE == _ROWWISE_ADAGRAD:
            square = tl.sum(square, axis=1, keep_dims=True) / columns
        total = read(first, state_places, state_there) + square
        change = grad / (tl.sqrt(total) + eps)
    # What a row has once, every warp of the row loads: all of them must have it before one of them stores.
    tl.debug_barrier()
    if RULE == _ADAM:
        tl.store(first + state_places, moment1, mask=state_there)
        tl.store(second + state_places, moment2, mask=state_there)
    elif RULE != _SGD:
        tl.store(first + state_places, total, mask=state_there)
    tl.store(flat + places_, (values - learning_rate * change).to(flat.dtype.element_ty), mask=there)


@triton.jit
def _update_kernel(
    threshold_grads, threshold_stride, grad, pair_grads, sources, scales, keys, order, partials, ranges,
    weights, weight_state1, weight_state2, thresholds, threshold_state1, threshold_state2, mask, starts, seen, tables,
    pressure, learning_rate, weight_decay, threshold_learning_rate, threshold_weight_decay, eps, correction1,
    correction2,
    PARTS: tl.constexpr, COMBINE: tl.constexpr, SHARED: tl.constexpr, RULE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr, MASK_BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # The positions of one table, BLOCK_P at a time; those that begin a run do its row.
    table = tl.program_id(1)
    begin, end = tl.load(ranges + table), tl.load(ranges + table + 1)
    dim, first_row = dim_of(tables, table, ALIGN), field(tables, table, FIRST_ROW)
    columns_1D = tl.arange(0, BLOCK_D)[None, :]
    threshold_grad_1D = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    for tile in tl.range(begin + tl.program_id(0) * BLOCK_P, end, tl.num_programs(0) * BLOCK_P):
        at_P1 = tile + tl.arange(0, BLOCK_P)[:, None]
        on_P1 = at_P1 < end
        keys_P1 = tl.load(keys + at_P1, mask=on_P1, other=-1)
        on_P1 &= keys_P1 != tl.load(keys + at_P1 - 1, mask=on_P1 & (at_P1 > begin), other=-1)
        grad_PD = _sum_of_run(
            at_P1, on_P1, keys_P1, end, columns_1D, dim, grad, pair_grads, sources, scales, keys, order,
            PARTS, COMBINE, ALIGN, BLOCK_D, CHUNK,
        )  # fmt: skip
        chunks_P1 = at_P1 // CHUNK + 1
        more_P1 = on_P1 & (chunks_P1 * CHUNK < end)
        more_P1 &= tl.load(keys + chunks_P1 * CHUNK, mask=more_P1, other=-1) == keys_P1
        while tl.max(more_P1.to(tl.int32)) > 0:
            grad_PD += tl.load(partials + chunks_P1 * BLOCK_D + columns_1D, mask=more_P1, other=0.0)
            chunks_P1 += 1
            more_P1 &= chunks_P1 * CHUNK < end
            more_P1 &= tl.load(keys + chunks_P1 * CHUNK, mask=more_P1, other=-1) == keys_P1

        rows_P1 = keys_P1.to(tl.int64) - first_row
        stored_PD, places_PD = places(rows_P1, on_P1, columns_1D, mask, starts, tables, table, ALIGN, MASK_BLOCK)
        values_PD = read(weights, places_PD, stored_PD)
        grad_PD = tl.where(stored_PD, grad_PD, 0.0)
        states_P1 = first_row + rows_P1  # of states with one value a row
        if SHARED != NONE:
            there, places_ = threshold_places(rows_P1, on_P1, columns_1D, tables, table, ALIGN, SHARED)
            s = read(thresholds, places_, there)
            g = tl.sigmoid(s + pressure)
            grad_PD = tl.where(tl.abs(values_PD) > g, grad_PD, 0.0)
            sign_PD = tl.where(values_PD > 0, 1.0, -1.0)
            grad_s = -(g * (1 - g)) * grad_PD * sign_PD
            if SHARED < ROW:
                threshold_grad_1D += tl.sum(grad_s, axis=0, keep_dims=True)
            else:
                width = dim.to(tl.float32)
                if SHARED == ROW:
                    grad_s = tl.sum(grad_s, axis=1, keep_dims=True)
                    width = 1.0
                state_places, state_there = places_, there
                if RULE == _ROWWISE_ADAGRAD:
                    state_places, state_there = states_P1, on_P1
                _step(
                    thresholds, places_, there, s, grad_s, width, threshold_state1, threshold_state2, state_places,
                    state_there, threshold_learning_rate, threshold_weight_decay, eps, correction1, correction2, RULE,
                )  # fmt: skip
            tl.store(seen + first_row + rows_P1, tl.full([BLOCK_P, 1], 1, dtype=tl.uint8), mask=on_P1)
        state_places, state_there = places_PD, stored_PD
        if RULE == _ROWWISE_ADAGRAD:
            state_places, state_there = states_P1, on_P1
        _step(
            weights, places_PD, stored_PD, values_PD, grad_PD, dim.to(tl.float32), weight_state1, weight_state2,
            state_places, state_there, learning_rate, weight_decay, eps, correction1, correction2, RULE,
        )  # fmt: skip
    if SHARED == TABLE:
        tl.store(threshold_grads + tl.program_id(0) * threshold_stride + table, tl.sum(threshold_grad_1D))
    if SHARED == COLUMN:
        tl.store(
            threshold_grads + tl.program_id(0) * threshold_stride + field(tables, table, FIRST_COLUMN) + columns_1D,
            threshold_grad_1D,
            mask=columns_1D < dim,
        )


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
    """Backward and update in one; arguments as in `ops`, results as in `reference`.

    No step waits for the device: what is not known to the processor (how many rows are different, where a table's pairs
    begin) stays there, and buffers are as large as they could have to be.
    """
    grad = grad.contiguous()
    per_table = shared in (Shared.TABLE, Shared.COLUMN)
    ids, batch = indices.numel(), (offsets.numel() - 1) // len(feature_tables)
    weight_grads = grad.new_empty(ids if sample_weight_grad else 0)
    if not ids:
        return torch.zeros_like(thresholds) if per_table else thresholds.new_empty(0), weight_grads
    metadata = Metadata.of(rows, dims, feature_tables, partitions, combine, weights.device)
    pairs = ids * max(1, metadata.parts)
    block_p = metadata.block_rows(_TILE)
    kinds = {"PARTS": metadata.parts, "COMBINE": combine, "ALIGN": metadata.align, "BLOCK_D": metadata.block_d}
    values = {"SHARED": shared, "MASK_BLOCK": metadata.mask_block if mask.numel() else 0}

    positions = torch.arange(ids, dtype=offsets.dtype, device=offsets.device)
    bags = torch.searchsorted(offsets, positions, right=True, out_int32=True)
    keys = metadata.bounds.new_empty(pairs)
    sources = torch.empty(ids, dtype=torch.int64, device=grad.device)
    scales = grad.new_empty(ids) if mean or sample_weights is not None else None
    _pairs_kernel[(triton.cdiv(ids, 256),)](
        keys, sources, scales, indices, offsets, bags, sample_weights, metadata.tables, metadata.features,
        metadata.partitions, ids, batch, metadata.width, sum(rows), PARTS=metadata.parts, MEAN=mean, BLOCK=256,
    )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)
    ranges = torch.searchsorted(keys, metadata.bounds)

    pair_grads = None  # only MULT keeps a vector for each pair; the others' are columns of `grad`
    if metadata.parts > 1 and combine == Combine.MULT:
        pair_grads = grad.new_empty(pairs * metadata.block_d)
    if sample_weight_grad or pair_grads is not None:
        _ids_kernel[(triton.cdiv(batch, block_p), len(feature_tables))](
            weight_grads if sample_weight_grad else None, pair_grads, grad, weights, thresholds, mask, starts, indices,
            offsets, pressure, metadata.tables, metadata.features, metadata.partitions, batch,
            metadata.width, **kinds, **values, MEAN=mean, BLOCK_B=block_p,
        )  # fmt: skip

    share = max(1, _PROGRAMS // len(rows))
    chunks = triton.cdiv(pairs, _CHUNK)
    partials = grad.new_empty(chunks * metadata.block_d)
    _chunks_kernel[(min(share, triton.cdiv(chunks, block_p)), len(rows))](
        partials, grad, pair_grads, sources, scales, keys, order, ranges, metadata.tables, **kinds, CHUNK=_CHUNK,
        BLOCK_P=block_p,
    )  # fmt: skip
    programs = min(share, triton.cdiv(pairs, block_p))
    threshold_grads = thresholds.new_empty(programs if per_table else 0, thresholds.numel())
    weight_state1, weight_state2 = [*weight_states, None, None][:2]
    threshold_state1, threshold_state2 = [*threshold_states, None, None][:2]
    _update_kernel[(programs, len(rows))](
        threshold_grads, thresholds.numel(), grad, pair_grads, sources, scales, keys, order, partials, ranges, weights,
        weight_state1, weight_state2, thresholds, threshold_state1, threshold_state2, mask, starts,
        seen.view(torch.uint8), metadata.tables, pressure, learning_rate, weight_decay, threshold_learning_rate,
        threshold_weight_decay, eps, 1 - BETA1**step, 1 - BETA2**step, **kinds, **values, RULE=optimizer, CHUNK=_CHUNK,
        BLOCK_P=block_p,
    )  # fmt: skip
    return threshold_grads.sum(0) if per_table else thresholds.new_empty(0), weight_grads
