"""The pressure on a small collection: where thresholds start, what the curve is, and when masks are taken."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from thresher.budget import budget_name, budget_params
from thresher.embedding.representation import SoftThreshold
from thresher.embedding.table_plan import TablePlan
from thresher.kernels import layout
from thresher.methods.masks import ShardMask
from thresher.methods.pep import PUBLISHED_DRIFT, Pressure, exact_masks, start_thresholds, table_shards
from thresher.spec import Granularity, SearchSpec, Spec
from thresher.train.build import Job, build
from thresher.train.group import process_group

ROWS = {"a": 40, "b": 9}
META = {
    "fields": [{"name": name, "rows": rows, "pooling": "sum", "one_hot": True} for name, rows in ROWS.items()],
    "dense": [],
}
DIM = 4
TOTAL = sum(ROWS.values()) * DIM
COUNTS = {name: np.arange(rows) ** 2 for name, rows in ROWS.items()}


def make_job(granularity: Granularity, ranks: Any) -> Job:
    spec = Spec.model_validate({"data": {"format": "synthetic"}, "model": {"dim": DIM, "init_scale": 0.5}})
    job = build(spec, META, ranks, TablePlan.uniform(ROWS, DIM, SoftThreshold(granularity)), spec.train, 1, 1)
    for kernel in job.collection.kernels():
        kernel.group.seen.fill_(True)
    return job


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    spec = Spec.model_validate({"data": {"format": "synthetic"}})
    with process_group(spec) as group:
        yield group


def steer(
    job: Job, search: SearchSpec, budgets: list[float | int], steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the pressure alone, without training."""
    taken: dict[str, Any] = {}

    kept = {budget_name(budget): budget_params(budget, TOTAL) for budget in budgets}

    def take(name: str, masks_of: Callable[[int], list[ShardMask]]) -> None:
        taken[name] = {mask.name: mask.mask_ND for mask in masks_of(kept[name])}

    pressure = Pressure(job.collection, search, kept, TOTAL, steps, take)
    state: dict[str, Any] = {}
    for step in range(steps + 1):
        pressure(state, step, math.nan if step == 0 else 0.5)
    return state, taken


@pytest.mark.parametrize(
    "granularity", ["global", "table", "dimension", "table_dimension", "feature", "feature_dimension"]
)
def test_every_budget_is_met_to_the_parameter_and_masks_are_nested(granularity: Granularity, ranks: Any) -> None:
    job = make_job(granularity, ranks)
    start_thresholds(job.collection, SearchSpec(), COUNTS)
    state, taken = steer(job, SearchSpec(check_every=1), [0.5, 0.2, 7], steps=40)
    kept = {name: sum(int(mask.sum()) for mask in masks.values()) for name, masks in taken.items()}
    assert kept == {"0.5": TOTAL // 2, "0.2": TOTAL // 5, "7p": 7}
    assert state["taken"] == ["0.5", "0.2", "7p"]
    assert state["stalled"] == []
    for large, small in [("0.5", "0.2"), ("0.2", "7p")]:
        for name in ROWS:
            # Without training nothing but u moves. Where thresholds differ the order of margins may change with u.
            if granularity in ("global", "table"):
                assert not (taken[small][name] & ~taken[large][name]).any()


def test_the_share_left_follows_the_curve(ranks: Any) -> None:
    job = make_job("feature_dimension", ranks)
    state, _ = steer(job, SearchSpec(check_every=1, warmup=0.25), [0.1], steps=40)
    shares = [row["kept_fraction"] for row in state["history"]]
    targets = [row["target_fraction"] for row in state["history"]]
    assert targets[:10] == [1.0] * 10  # steps 1 to 10
    assert targets[-1] == pytest.approx(19 / TOTAL)
    assert all(later <= earlier for earlier, later in itertools.pairwise(targets))
    np.testing.assert_allclose(shares[10:], targets[10:], atol=1.01 / TOTAL)
    pressures = [row["pressure"] for row in state["history"]]
    assert pressures == sorted(pressures)
    for kernel in job.collection.kernels():
        assert kernel.group.pressure == pressures[-1]


def test_published_drift_rises_evenly_and_says_what_it_did_not_reach(ranks: Any) -> None:
    job = make_job("global", ranks)
    search = SearchSpec(pressure="published", check_every=10, threshold_init=-3.0, frequency_prior=0, column_prior=0)
    start_thresholds(job.collection, search, COUNTS)
    state, taken = steer(job, search, [0.99, 0.01], steps=50)
    assert state["pressure"] == pytest.approx(50 * PUBLISHED_DRIFT)
    assert set(taken) == {"0.99", "0.01"}
    assert state["stalled"] == ["0.01"]
    assert sum(int(mask.sum()) for mask in taken["0.01"].values()) == TOTAL // 100


def test_rows_that_training_never_saw_go_first(ranks: Any) -> None:
    job = make_job("feature", ranks)
    (kernel,) = job.collection.kernels()
    kernel.group.seen[5:30] = False
    kernel.group.weights[5 * DIM : 30 * DIM] = 100.0
    shards = table_shards(job.collection)
    masks = dict(zip([s.name for s in shards], exact_masks(shards, 0.0, TOTAL - 25 * DIM), strict=True))
    assert not masks["a"][5:30].any()
    assert masks["a"][:5].all()
    assert masks["a"][30:].all()
    assert masks["b"].all()


def test_margins_are_the_papers(ranks: Any) -> None:
    job = make_job("feature_dimension", ranks)
    for shard in table_shards(job.collection):
        expected = shard.weight_ND.abs() - torch.sigmoid(shard.threshold + 0.3)
        torch.testing.assert_close(shard.margins(0, len(shard.weight_ND), 0.3), expected)
        assert torch.equal(shard.margins(2, 5, 0.3), shard.margins(0, 9, 0.3)[2:5])


def test_thresholds_start_lower_for_frequent_rows_and_higher_for_later_columns(ranks: Any) -> None:
    job = make_job("feature_dimension", ranks)
    search = SearchSpec(threshold_init=-9.0, frequency_prior=2.0, column_prior=3.0)
    start_thresholds(job.collection, search, COUNTS)
    logs = {name: np.log(1 + count) for name, count in COUNTS.items()}
    mean = np.concatenate(list(logs.values())).mean()
    for shard in table_shards(job.collection):
        rows = -2.0 * (logs[shard.name] - mean)
        columns = 3.0 * (np.log([1, 2, 3, 4]) - np.log([1, 2, 3, 4]).mean())
        np.testing.assert_allclose(shard.threshold.numpy(), -9.0 + rows[:, None] + columns, rtol=1e-5)


def test_without_priors_thresholds_start_alike(ranks: Any) -> None:
    for granularity in ("dimension", "feature"):
        job = make_job(granularity, ranks)  # type: ignore[arg-type]
        start_thresholds(job.collection, SearchSpec(threshold_init=-6.0, frequency_prior=0, column_prior=0), COUNTS)
        assert all(bool((shard.threshold == -6.0).all()) for shard in table_shards(job.collection))


def test_replicated_thresholds_are_the_parameters_of_the_collection(ranks: Any) -> None:
    for granularity, count in [("global", 1), ("table", 2), ("dimension", 1), ("table_dimension", 2)]:
        job = make_job(granularity, ranks)  # type: ignore[arg-type]
        start_thresholds(job.collection, SearchSpec(column_prior=2.0), COUNTS)
        parameters = list(job.collection.shared_thresholds.values())
        assert len(parameters) == count
        assert {p.numel() for p in parameters} == {DIM if "dimension" in granularity else 1}
        if "dimension" in granularity:
            steps = [float(p.detach()[-1] - p.detach()[0]) for p in parameters]
            assert steps == pytest.approx([2.0 * np.log(DIM)] * count)
        for kernel in job.collection.kernels():
            assert kernel.group.shared == (layout.Shared.COLUMN if "dimension" in granularity else layout.Shared.TABLE)
