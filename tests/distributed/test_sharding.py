"""Any number of ranks and any sharding: the same losses, checkpoints and masks."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import jobs
from tests.distributed.conftest import make_spec
from tests.distributed.ranks import run_ranks

NAMES = ["dense", "masked", "global", "table", "dimension", "table_dimension", "feature", "feature_dimension"]
SHARDINGS = ["table_wise", "row_wise"]
Losses = dict[tuple[str, str], list[float]]


@pytest.fixture(scope="module")
def one_rank(data: Path) -> Losses:
    cases = [(name, "table_wise") for name in NAMES]
    return run_ranks(1, jobs.losses, make_spec("unused"), data, cases)[0]


@pytest.fixture(scope="module")
def two_ranks(data: Path) -> Losses:
    cases = list(itertools.product(NAMES, SHARDINGS))
    first, second = run_ranks(2, jobs.losses, make_spec("unused"), data, cases)
    assert first == second
    return first


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_have_the_losses_of_one(name: str, sharding: str, one_rank: Losses, two_ranks: Losses) -> None:
    expected, found = one_rank[name, "table_wise"], two_ranks[name, sharding]
    assert len(expected) == jobs.STEPS
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert expected[-1] != expected[0]


def test_thresholds_change_the_losses(one_rank: Losses) -> None:
    """Else the comparison above would compare the plain lookup with itself."""
    last = {name: one_rank[name, "table_wise"][-1] for name in NAMES if name != "masked"}
    assert len(set(last.values())) == len(last)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_sharding_asked_for_is_used(sharding: str, data: Path) -> None:
    for used in run_ranks(2, jobs.shardings_used, make_spec("unused"), data, sharding):
        assert used == {sharding}


@pytest.mark.parametrize("name", ["dense", "global", "feature", "feature_dimension"])
def test_checkpoint_loads_on_other_ranks_and_sharding(name: str, data: Path, tmp_path: Path) -> None:
    saved_spec = jobs.with_sharding(make_spec("unused"), "row_wise")
    score, after = run_ranks(2, jobs.save_trained, saved_spec, data, name, tmp_path)[0]
    for world_size, sharding in [(1, "table_wise"), (2, "table_wise"), (4, "row_wise")]:
        spec = jobs.with_sharding(make_spec("unused"), sharding)
        loaded, continued = run_ranks(world_size, jobs.load_trained, spec, data, name, tmp_path)[0]
        assert loaded.auc == pytest.approx(score.auc, abs=1e-5)
        assert loaded.logloss == pytest.approx(score.logloss, rel=1e-6)
        np.testing.assert_allclose(continued, after, rtol=2e-5)


def test_masks_hold_the_budget_and_do_not_depend_on_the_ranks(data: Path) -> None:
    spec, kept = make_spec("unused"), 2_345
    whole = {
        k: np.concatenate(v) for k, v in run_ranks(1, jobs.masks, spec, data, "feature_dimension", kept)[0].items()
    }
    assert sum(int(mask.sum()) for mask in whole.values()) == kept
    # Values differ in the last bits between numbers of ranks, so a few entries at the border may change places.
    for world_size, sharding in [(2, "row_wise"), (3, "table_wise")]:
        spec = jobs.with_sharding(make_spec("unused", train={"batch_size": 66, "epochs": 1}), sharding)
        alone = jobs.with_sharding(spec, "table_wise")
        expected = {
            k: np.concatenate(v) for k, v in run_ranks(1, jobs.masks, alone, data, "feature_dimension", kept)[0].items()
        }
        parts = run_ranks(world_size, jobs.masks, spec, data, "feature_dimension", kept)[0]
        found = {k: np.concatenate(v) for k, v in parts.items()}
        assert sum(int(mask.sum()) for mask in found.values()) == kept
        assert sum(int((found[k] != expected[k]).sum()) for k in expected) <= 20
