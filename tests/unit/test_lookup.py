"""The lookup and its fused update against dense autograd and torch.optim."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.kernel_cases import Case, make_tables
from thresher.kernels import layout, reference
from thresher.kernels.layout import Combine, Optimizer, Shared
from thresher.kernels.ops import Group

ROWS, DIMS, FEATURE_TABLES = [7, 5, 4], [3, 3, 6], [0, 0, 1, 2]
BATCH = 6


def make_group(
    shared: Shared = Shared.NONE,
    optimizer: Optimizer = Optimizer.SGD,
    mean: bool = False,
    masked: bool = False,
    dtype: torch.dtype = torch.float64,
    partitions: tuple[int, ...] = (),
    combine: Combine = Combine.ADD,
    **settings: float,
) -> Group:
    """A group of small tables with random values."""
    case = Case(
        shared, optimizer, rows=tuple(ROWS), dims=tuple(DIMS), feature_tables=tuple(FEATURE_TABLES), masked=masked,
        dtype=dtype,
    )  # fmt: skip
    tables = {name: value for name, value in vars(make_tables(case)).items() if name != "results"}
    return Group(
        **tables, rows=ROWS, dims=DIMS, feature_tables=FEATURE_TABLES, shared=shared, mean=mean, optimizer=optimizer,
        learning_rate=settings.pop("learning_rate", 0.1), partitions=list(partitions), combine=combine,
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip


def make_batch(seed: int, one_hot: bool = False) -> tuple[Tensor, Tensor]:
    """Ids and offsets with empty bags, ids twice in a bag, and ids of two features of one table."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.ones(4 * BATCH, dtype=torch.int64)
    if not one_hot:
        lengths = torch.randint(0, 4, (4 * BATCH,), generator=generator)
    ids = [
        torch.randint(0, ROWS[table], (int(part.sum()),), generator=generator)
        for table, part in zip(FEATURE_TABLES, lengths.view(4, BATCH), strict=True)
    ]
    return torch.cat(ids), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def every_row_twice() -> tuple[Tensor, Tensor]:
    """A batch in which lazy and dense updates are the same."""
    lengths = torch.tensor([[2 * ROWS[t]] + [0] * (BATCH - 1) for t in FEATURE_TABLES]).flatten()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.cat([torch.arange(ROWS[t]).repeat(2) for t in FEATURE_TABLES]), offsets


def dense_lookup(weights: list[Tensor], thresholds: list[Tensor], ids: Tensor, offsets: Tensor, group: Group) -> Tensor:
    """The same by autograd over whole tables, a bag at a time, written from the paper's equations."""
    columns = []
    for feature, table in enumerate(FEATURE_TABLES):
        v = weights[table]
        if thresholds:
            v = torch.sign(v) * torch.relu(v.abs() - torch.sigmoid(thresholds[table] + group.pressure))
        out = []
        for bag in range(BATCH):
            low, high = offsets[feature * BATCH + bag], offsets[feature * BATCH + bag + 1]
            total = v[ids[low:high]].sum(0)
            out.append(total / max(1, int(high - low)) if group.mean else total)
        columns.append(torch.stack(out))
    return torch.cat(columns, dim=1)


def whole_tables(group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """Copies of a group's tables and thresholds that autograd may follow."""
    tables = layout.tables_of(ROWS, DIMS)
    weights = [layout.elements(group.weights, t).clone().requires_grad_() for t in tables]
    if group.shared == Shared.NONE:
        return weights, []
    return weights, [layout.thresholds_of(group.thresholds, t, group.shared).clone().requires_grad_() for t in tables]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("shared", list(Shared))
def test_forward_equals_dense(shared: Shared, one_hot: bool, mean: bool) -> None:
    group = make_group(shared, mean=mean, pressure=0.3)
    ids, offsets = make_batch(2, one_hot)
    torch.testing.assert_close(group.lookup(ids, offsets), dense_lookup(*whole_tables(group), ids, offsets, group))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("shared", list(Shared))
def test_gradients_equal_dense_autograd(shared: Shared, mean: bool) -> None:
    """With SGD of learning rate 1 the change of a parameter is its gradient."""
    group = make_group(shared, mean=mean, learning_rate=1.0, threshold_learning_rate=1.0, pressure=0.2)
    weights, thresholds = whole_tables(group)
    ids, offsets = make_batch(3)
    upstream = torch.randn(BATCH, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (dense_lookup(weights, thresholds, ids, offsets, group) * upstream).sum().backward()
    leaf = group.thresholds.clone().requires_grad_() if shared in (Shared.TABLE, Shared.COLUMN) else None
    (group.lookup(ids, offsets, shared_thresholds=leaf) * upstream).sum().backward()
    tables = layout.tables_of(ROWS, DIMS)
    for table, weight in zip(tables, weights, strict=True):
        expected = weight.detach() - weight.grad
        torch.testing.assert_close(layout.elements(group.weights, table), expected)
    for table, s in zip(tables, thresholds, strict=True) if thresholds else ():
        if leaf is not None:
            torch.testing.assert_close(layout.thresholds_of(leaf.grad, table, shared), s.grad)
        else:
            expected = s.detach() - s.grad
            torch.testing.assert_close(layout.thresholds_of(group.thresholds, table, shared), expected)


@pytest.mark.parametrize("shared", [Shared.NONE, Shared.ROW, Shared.ELEMENT])
@pytest.mark.parametrize("optimizer", [Optimizer.SGD, Optimizer.ADAGRAD, Optimizer.ADAM])
def test_ten_steps_equal_torch_optim(optimizer: Optimizer, shared: Shared) -> None:
    """With every row in every batch, lazy and dense updates are the same."""
    group = make_group(
        shared, optimizer, learning_rate=0.05, weight_decay=0.01, threshold_learning_rate=0.02,
        threshold_weight_decay=0.03, eps=1e-8,
    )  # fmt: skip
    weights, thresholds = whole_tables(group)
    kinds = {Optimizer.SGD: torch.optim.SGD, Optimizer.ADAGRAD: torch.optim.Adagrad, Optimizer.ADAM: torch.optim.Adam}
    eps = {} if optimizer == Optimizer.SGD else {"eps": 1e-8}
    other = kinds[optimizer](
        [
            {"params": weights, "lr": 0.05, "weight_decay": 0.01},
            {"params": thresholds, "lr": 0.02, "weight_decay": 0.03},
        ],
        **eps,
    )
    all_rows, offsets = every_row_twice()
    for step in range(10):
        upstream = torch.randn(BATCH, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        other.zero_grad()
        (dense_lookup(weights, thresholds, all_rows, offsets, group) * upstream).sum().backward()
        other.step()
        (group.lookup(all_rows, offsets) * upstream).sum().backward()
    for table, weight in zip(layout.tables_of(ROWS, DIMS), weights, strict=True):
        torch.testing.assert_close(layout.elements(group.weights, table), weight.detach())
    for table, s in zip(layout.tables_of(ROWS, DIMS), thresholds, strict=True) if thresholds else ():
        torch.testing.assert_close(layout.thresholds_of(group.thresholds, table, shared), s.detach())


def test_rowwise_adagrad_keeps_one_moment_a_row() -> None:
    group = make_group(optimizer=Optimizer.ROWWISE_ADAGRAD, learning_rate=0.1, eps=1e-8)
    before = group.weights.clone()
    ids, offsets = torch.tensor([2]), torch.tensor([0] + [1] * (4 * BATCH))
    out = group.lookup(ids, offsets)
    out[0, :3].backward(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    assert group.weight_states[0].shape == (sum(ROWS),)
    assert group.weight_states[0][2].item() == pytest.approx((1 + 4 + 16) / 3)
    step = 0.1 / 7**0.5
    torch.testing.assert_close(
        (before - group.weights)[6:9], torch.tensor([step, 2 * step, 4 * step], dtype=torch.float64)
    )


@pytest.mark.parametrize("optimizer", [Optimizer.SGD, Optimizer.ADAGRAD, Optimizer.ADAM])
def test_masked_tables_equal_full_ones_times_the_mask(optimizer: Optimizer) -> None:
    """Ten steps of torch.optim on V ⊙ M; what is pruned has no place in the compact storage."""
    group = make_group(masked=True, optimizer=optimizer, learning_rate=0.05, weight_decay=0.01, eps=1e-8)
    tables = layout.tables_of(ROWS, DIMS)
    masks = [layout.unpack_masks(layout.masks_of(group.mask, table), table.dim) for table in tables]
    assert group.weights.numel() == sum(int(mask.sum()) for mask in masks) < sum(mask.numel() for mask in masks)

    def whole() -> list[Tensor]:
        return [reference.Rows(t, torch.arange(t.rows), group.mask, group.starts).read(group.weights) for t in tables]

    full = [values.clone().requires_grad_() for values in whole()]
    kinds = {Optimizer.SGD: torch.optim.SGD, Optimizer.ADAGRAD: torch.optim.Adagrad, Optimizer.ADAM: torch.optim.Adam}
    eps = {} if optimizer == Optimizer.SGD else {"eps": 1e-8}
    other = kinds[optimizer](full, lr=0.05, weight_decay=0.01, **eps)
    ids, offsets = every_row_twice()
    for step in range(10):
        upstream = torch.randn(BATCH, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        other.zero_grad()
        times_mask = [weight * mask for weight, mask in zip(full, masks, strict=True)]
        (dense_lookup(times_mask, [], ids, offsets, group) * upstream).sum().backward()
        other.step()
        (group.lookup(ids, offsets) * upstream).sum().backward()
    for found, weight, mask in zip(whole(), full, masks, strict=True):
        torch.testing.assert_close(found, weight.detach() * mask)


PARTITIONS = (2, 1, 4, 4, 3, 2, 1, 2, 2, 3, 0)  # quotient and remainder of 12 ids, of 6, and a plain table


@pytest.mark.parametrize("combine", list(Combine))
def test_composed_tables_equal_their_definition(combine: Combine) -> None:
    """A bag combines the rows of each id's partitions first and sums then; with SGD the change is the gradient."""
    group = make_group(partitions=PARTITIONS, combine=combine, learning_rate=1.0)
    weights, _ = whole_tables(group)
    ids = [torch.tensor(values) for values in ([0, 5, 11, 11], [3, 7], [5, 0, 2], [1, 1])]
    lengths = torch.tensor([[2, 0, 1, 1, 0, 0], [0, 2, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [2, 0, 0, 0, 0, 0]])
    offsets = torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0))
    columns = []
    for table, own, count in zip(FEATURE_TABLES, ids, lengths, strict=True):
        if table == 2:
            vectors = weights[2][own]
        else:
            buckets = (4, 2)[table]
            parts = [weights[table][own % buckets], weights[table][buckets + own // buckets]]
            vectors = {
                Combine.ADD: parts[0] + parts[1], Combine.MULT: parts[0] * parts[1], Combine.CONCAT: torch.cat(parts, 1)
            }[combine]  # fmt: skip
        columns.append(torch.stack([part.sum(0) for part in vectors.split(count.tolist())]))
    expected = torch.cat(columns, dim=1)
    out = group.lookup(torch.cat(ids), offsets)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (expected * upstream).sum().backward()
    (out * upstream).sum().backward()
    for table, weight in zip(layout.tables_of(ROWS, DIMS), weights, strict=True):
        torch.testing.assert_close(layout.elements(group.weights, table), weight.detach() - weight.grad)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("shared", [Shared.TABLE, Shared.COLUMN, Shared.ROW])
def test_gradients_of_sample_weights_and_thresholds_are_numeric_ones(shared: Shared, mean: bool) -> None:
    group = make_group(shared, mean=mean, learning_rate=0.0)  # rows rest, so that it is a function
    ids, offsets = make_batch(7)
    factors = torch.randn(ids.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    factors.requires_grad_()
    if shared == Shared.ROW:
        assert torch.autograd.gradcheck(lambda w: group.lookup(ids, offsets, w), (factors,))
        return
    leaf = group.thresholds.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, s: group.lookup(ids, offsets, w, s), (factors, leaf))


@pytest.mark.parametrize("shared", [Shared.TABLE, Shared.COLUMN, Shared.ROW, Shared.ELEMENT])
def test_threshold_far_below_is_the_plain_lookup(shared: Shared) -> None:
    soft, plain = make_group(shared, pressure=-1000.0), make_group()
    soft.weights.copy_(plain.weights)
    batch = make_batch(5)
    assert torch.equal(soft.lookup(*batch), plain.lookup(*batch))


def test_only_rows_of_the_batch_change() -> None:
    group = make_group(Shared.ELEMENT, Optimizer.ADAM, weight_decay=0.1, threshold_learning_rate=0.1)
    before = [group.weights.clone(), group.thresholds.clone()]
    ids, offsets = torch.tensor([3]), torch.tensor([0] + [1] * (4 * BATCH))
    group.lookup(ids, offsets).sum().backward()
    touched = torch.zeros(group.weights.numel(), dtype=torch.bool)
    touched[9:12] = True
    for now, then in zip([group.weights, group.thresholds], before, strict=True):
        assert torch.equal(now[~touched], then[~touched])
    assert group.seen.nonzero().flatten().tolist() == [3]
    assert not torch.equal(group.weights[touched], before[0][touched])


def test_fake_tensors_have_the_right_shapes() -> None:
    group = make_group(Shared.ELEMENT, dtype=torch.float32)
    ids, offsets = make_batch(6)
    arguments = (
        group.weights, group.thresholds, group.mask, group.starts, ids, offsets, None, 0.0, ROWS, DIMS, FEATURE_TABLES,
        [], 0, 4, False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.thresher.lookup.default, arguments, test_utils=("test_schema", "test_faketensor"))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dims=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    batch=st.integers(1, 5),
    data=st.data(),
)
def test_any_shape_equals_embedding_bag(rows: list[int], dims: list[int], batch: int, data: st.DataObject) -> None:
    dims = dims[: len(rows)]
    lengths = torch.tensor(
        data.draw(st.lists(st.integers(0, 3), min_size=len(rows) * batch, max_size=len(rows) * batch))
    )
    ids = torch.cat(
        [torch.randint(0, n, (int(part.sum()),)) for n, part in zip(rows, lengths.view(len(rows), batch), strict=True)]
    )
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    weights = torch.randn(sum(n * d for n, d in zip(rows, dims, strict=True)))
    out = torch.ops.thresher.lookup(
        weights,
        weights[:0],
        weights[:0].byte(),
        ids[:0],
        ids,
        offsets,
        None,
        0.0,
        rows,
        dims,
        list(range(len(rows))),
        [],
        0,
        0,
        False,
    )
    expected = []
    for feature, table in enumerate(layout.tables_of(rows, dims)):
        part = offsets[feature * batch : (feature + 1) * batch + 1]
        expected.append(
            torch.nn.functional.embedding_bag(
                ids[part[0] : part[-1]], layout.elements(weights, table), part[:-1] - part[0], mode="sum"
            )
        )
    torch.testing.assert_close(out, torch.cat(expected, dim=1))
