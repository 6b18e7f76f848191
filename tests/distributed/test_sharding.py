"""Any number of ranks and any sharding: the same losses, checkpoints and masks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import jobs, pipelined
from tests.distributed.conftest import make_spec
from tests.distributed.ranks import run_ranks
from thresher import rundir
from thresher.spec import Spec

pytestmark = pytest.mark.timeout(600)  # the first test of a fixture waits for processes that train for minutes

NAMES = ["dense", "masked", "global", "table", "dimension", "table_dimension", "feature", "feature_dimension"]
COLUMNS = ["column_wise", "table_column_wise", "grid"]
SHARDINGS = ["table_wise", "row_wise", "table_row_wise", "data_parallel", *COLUMNS]
ENTRIES = [
    *((f"add of {name}", "row_wise") for name in ["masked", "dimension", "feature", "feature_dimension"]),
    *((f"mult of {name}", "table_wise") for name in ["masked", "table_dimension", "feature"]),
    *((name, "data_parallel") for name in ["add of masked", "add of table_dimension", "mult of feature_dimension"]),
    ("mult of masked", "data_parallel"),
    ("mult of feature_dimension", "column_wise"),
    ("add of table_dimension", "grid"),
]
COMPOSED = [
    *itertools.product(["add", "mult"], SHARDINGS),
    *(("concat", kind) for kind in SHARDINGS if kind not in COLUMNS),
]
CASES = [
    *((name, "adam", kind) for name, kind in itertools.product(NAMES, SHARDINGS)),
    *((name, "sgd", kind) for name, kind in itertools.product(["dense", "table_dimension", "feature"], SHARDINGS)),
    *(("dense", "rowwise_adagrad", kind) for kind in SHARDINGS),
    *(("dense", "adagrad", kind) for kind in COLUMNS),
    *((name, "rowwise_adagrad", kind) for name in ["mult", "concat"] for kind in ["row_wise", "table_row_wise"]),
    *((name, rule, kind) for name, kind in COMPOSED for rule in ["sgd", "adam"]),
    *((name, "adam", kind) for name, kind in ENTRIES),
    *((name, "sgd", kind) for name, kind in ENTRIES if name.endswith(("table_dimension", "feature"))),
]
CASES = [case for case in CASES if not (case[0] == "masked" and case[2] in COLUMNS)]  # they are never split so
REFUSED = [case for case in CASES if case[2] in COLUMNS and (case[0] == "feature" or case[1] == "rowwise_adagrad")]
CASES = [case for case in CASES if case not in REFUSED]
ON = {
    2: CASES + [(name, "sgd", "mixed") for name in ["dense", "table_dimension", "add", "mult"]],
    4: [case for case in CASES if case[1] == "adam" or case[:2] == ("table_dimension", "sgd")],
}
Losses = dict[jobs.Case, tuple[list[float], list[float]]]


def small_spec() -> Spec:
    """Columns that cannot be cut evenly, and a last batch of an epoch that leaves all ranks but one without ids."""
    return make_spec("unused", model={"name": "deepfm", "dim": 5, "hidden": [8]}, train={"batch_size": 80, "epochs": 1})


def test_the_last_batch_is_for_one_rank(data: Path) -> None:
    samples = rundir.read_json(data / "meta.json")["splits"]["train"]["samples"]
    assert 0 < samples % small_spec().train.batch_size <= 80 // 4


@pytest.fixture(scope="module")
def one_rank(data: Path) -> Losses:
    """Table-wise alone needs every representation and rule; one rank under another sharding is looked at once."""
    cases = sorted({(name, rule, "table_wise") for name, rule, _ in CASES})
    return run_ranks(1, jobs.losses, small_spec(), data, cases + [("dimension", "sgd", kind) for kind in SHARDINGS])[0]


@pytest.fixture(scope="module")
def many_ranks(data: Path) -> dict[int, Losses]:
    """Two ranks of one node; four ranks of two."""
    found = {}
    for world_size, per_node in [(2, 2), (4, 2)]:
        first, *others = run_ranks(world_size, jobs.losses, small_spec(), data, ON[world_size], per_node=per_node)
        assert all(other == first for other in others)
        found[world_size] = first
    return found


@pytest.mark.parametrize(
    ("world_size", "case"),
    [(world_size, case) for world_size, cases in ON.items() for case in cases],
    ids=lambda value: value if isinstance(value, int) else " ".join(value),
)
def test_many_ranks_have_the_losses_of_one(
    world_size: int, case: jobs.Case, one_rank: Losses, many_ranks: dict[int, Losses]
) -> None:
    (expected, expected_grads), (found, grads) = one_rank[*case[:2], "table_wise"], many_ranks[world_size][case]
    assert len(expected) == jobs.STEPS
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-3, atol=1e-6)
    assert expected[-1] != expected[0]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_one_rank_may_have_any_sharding(sharding: str, one_rank: Losses) -> None:
    (expected, _), (found, _) = one_rank["dimension", "sgd", "table_wise"], one_rank["dimension", "sgd", sharding]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_representations_change_the_losses(one_rank: Losses) -> None:
    """Else the comparison above would compare the plain lookup with itself."""
    names = [name for name in NAMES if name != "masked"] + ["add", "mult", "concat"]
    last = {name: one_rank[name, "adam", "table_wise"][0][-1] for name in names}
    assert len(set(last.values())) == len(last)


SAVED = [
    (name, kind)
    for name, kind in itertools.product(
        ["table_dimension", "feature", "feature_dimension"], ["row_wise", "data_parallel", "column_wise"]
    )
    if (name, kind) != ("feature", "column_wise")
] + [
    ("table_dimension", "mixed"), ("feature_dimension", "mixed"), ("masked", "row_wise"), ("masked", "data_parallel"),
    ("add", "row_wise"), ("mult", "column_wise"), ("mult", "row_wise"), ("concat", "table_wise"),
    ("concat", "row_wise"), ("add of masked", "row_wise"), ("mult of masked", "table_wise"),
    ("add of feature_dimension", "row_wise"), ("mult of feature", "data_parallel"),
]  # fmt: skip
LOADERS = {1: ["table_wise"], 2: ["data_parallel", "mixed"], 4: ["row_wise", "grid"]}
LOADED = [
    (world_size, (name, saved, kind))
    for world_size, kinds in LOADERS.items()
    for kind in kinds
    for name, saved in SAVED
    if not (name.split()[-1] in ("feature", "masked", "concat") and kind in [*COLUMNS, "mixed"])
    and not (name.startswith("mult of") and kind in ["row_wise", "grid"])
]


@pytest.fixture(scope="module")
def reloaded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Checkpoints of two ranks, and what other ranks and shardings make of them."""
    folder, spec = tmp_path_factory.mktemp("checkpoints"), small_spec()
    found: dict[Any, Any] = dict(run_ranks(2, jobs.save_trained, spec, data, SAVED, folder)[0])
    for world_size in LOADERS:
        cases = [case for ranks, case in LOADED if ranks == world_size]
        per_node = min(world_size, 2)
        found[world_size] = run_ranks(world_size, jobs.load_trained, spec, data, cases, folder, per_node=per_node)[0]
    return found


@pytest.mark.parametrize(("world_size", "case"), LOADED, ids=str)
def test_checkpoint_loads_on_other_ranks_and_sharding(
    world_size: int, case: tuple[str, str, str], reloaded: dict[Any, Any]
) -> None:
    (seen, score, after), (loaded_seen, loaded_score, continued) = reloaded[case[:2]], reloaded[world_size][case]
    assert loaded_seen == seen
    assert (seen > 0) == (case[0].split()[-1] in ("table_dimension", "feature", "feature_dimension"))
    assert loaded_score == pytest.approx(score, rel=1e-6)
    np.testing.assert_allclose(continued, after, rtol=2e-5)


def test_masks_hold_the_budget_and_do_not_depend_on_the_ranks(data: Path) -> None:
    spec, kept = make_spec("unused", train={"batch_size": 66, "epochs": 1}), 2_345
    found = [
        run_ranks(world_size, jobs.masks, jobs.with_sharding(spec, sharding), data, "feature_dimension", kept)[0]
        for world_size, sharding in [(1, "table_wise"), (2, "row_wise"), (2, "data_parallel"), (3, "column_wise")]
    ]
    for masks in found:
        assert sum(int(mask.sum()) for mask in masks.values()) == kept
        # Values differ in the last bits between numbers of ranks, so a few entries at the border may change places.
        assert sum(int((masks[name] != found[0][name]).sum()) for name in found[0]) <= 20


def test_tables_of_one_collection_may_differ_in_sharding_and_pooling() -> None:
    """TorchRec divides all of them, as soon as one is split by rows and pooled to means."""
    (expected,) = run_ranks(1, jobs.pooled, small_spec())
    found = run_ranks(2, jobs.pooled, small_spec())
    assert set(expected) == {"shared@plain_mean", "shared@whole_sum", *"abcdef"}
    for key, vectors in expected.items():
        for rank, own in enumerate(found):
            np.testing.assert_allclose(own[key], vectors[rank::2], rtol=1e-6, atol=1e-7)


def test_torchrecs_pipeline_has_the_losses_of_a_plain_loop(data: Path) -> None:
    names, kinds = ["dense", "table_dimension"], ["table_wise", "row_wise", "column_wise", "data_parallel"]
    cases = [*itertools.product(names, kinds), ("add", "row_wise"), ("mult", "row_wise")]
    for found in run_ranks(2, pipelined.losses, small_spec(), data, cases):
        for in_turn, overlapped in found.values():
            assert len(in_turn) == pipelined.STEPS
            np.testing.assert_allclose(overlapped, in_turn, rtol=1e-6)
