"""Partitions under a budget: complementary, within it, and as near to it as rows allow."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distributed.conftest import make_spec
from thresher.embedding.partitions import Partitions
from thresher.embedding.path import BucketPath
from thresher.embedding.representation import Composed, SoftThreshold
from thresher.embedding.separate import Separate
from thresher.embedding.table_plan import FieldTable
from thresher.methods.compositional import Rule, balanced, choose, coprimes, integer_root, to_prune
from thresher.spec import SearchSpec, Spec
from thresher.tables.format import MAX_PARTITIONS

COMPLEMENTARY = ["quotient_remainder", "mixed_radix", "chinese_remainder"]
BUDGETED = ["remainder", *COMPLEMENTARY]
COMBINES = ["add", "mult", "concat", "feature", "path"]


def partitions_of(table: FieldTable, name: str) -> Partitions | None:
    if isinstance(table.outside, Separate | BucketPath):
        return table.outside.partitions
    return table.representation.partitions[name] if isinstance(table.representation, Composed) else None


def described(ids: dict[str, int], encoding: str = "vocabulary") -> list[dict[str, Any]]:
    return [{"name": name, "rows": n, "encoding": encoding, "pooling": "mean"} for name, n in ids.items()]


def params_of(tables: dict[str, FieldTable], ids: dict[str, int]) -> int:
    return sum(table.params(name, ids[name]) for name, table in tables.items())


@given(st.integers(0, 2**63), st.integers(1, 20))
def test_integer_roots_are_exact(n: int, k: int) -> None:
    root = integer_root(n, k)
    assert root**k <= n < (root + 1) ** k


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 4))
def test_balanced_moduli_have_the_least_sum(n: int, k: int) -> None:
    def least(n: int, k: int, low: int = 1) -> int:
        """By trying all."""
        if k == 1:
            return max(n, low)
        return min(m + least(-(-n // m), k - 1, m) for m in range(low, max(low, integer_root(n, k) + 1) + 1))

    found = balanced(n, k)
    if found is None:
        assert n <= 2 ** (k - 1)
    else:
        assert math.prod(found) >= n > math.prod(found[:-1])
        assert sum(found) == least(n, k)


@given(st.integers(2, 2**62), st.integers(1, 6), st.integers(1, 2**40))
def test_coprime_moduli_are_coprime(n: int, k: int, taken: int) -> None:
    found = coprimes(n, k, taken)
    if found is not None:
        assert math.prod(found) >= n
        assert all(math.gcd(a, b) == 1 for i, a in enumerate(found) for b in (*found[:i], taken))


@settings(deadline=None, max_examples=300)
@given(
    n=st.one_of(st.integers(1, 1000), st.integers(1, 2**62), st.sampled_from([10**9, 2**62, 2**31 + 11])),
    method=st.sampled_from(BUDGETED),
    combine=st.sampled_from(COMBINES),
    share=st.floats(0, 1.1),
)
def test_a_table_is_complementary_and_within_its_share(n: int, method: str, combine: str, share: float) -> None:
    rule = Rule(method, 12, combine)
    params = int(n**share) * 12
    least = rule.least(n)
    found = rule.within(n, params)
    if found is None:
        assert params < least.params
        return
    assert found.params <= params or found.params == n * 12 == least.params
    if not found.moduli:
        assert found.params == n * 12 <= params
        return
    partitions = rule.partitions(n, found.moduli)
    assert len(partitions) <= MAX_PARTITIONS
    assert partitions.splits[-1][0] < n
    columns = 12 // len(partitions) if combine == "concat" else 12
    assert found.params == rule.params(found.moduli)
    assert combine == "path" or found.params == partitions.rows * columns
    if method != "remainder":
        assert partitions.is_complementary(n)
    if method != "chinese_remainder" and combine != "concat":  # which may not have just any number of partitions
        assert params - found.params < rule.bucket_params(len(partitions))[0]  # less than one more row


@pytest.mark.parametrize("method", COMPLEMENTARY)
def test_small_tables_tell_all_ids_apart(method: str) -> None:
    rule = Rule(method, 4, "mult")
    for n in range(4, 130, 7):
        for rows in range(2, n):
            found = rule.within(n, rows * 4)
            if found is not None:
                splits = rule.partitions(n, found.moduli).splits
                assert len({tuple(x // a % m for a, m in splits) for x in range(n)}) == n


@pytest.mark.parametrize("method", COMPLEMENTARY)
def test_more_rows_take_fewer_partitions(method: str) -> None:
    rule = Rule(method, 4, "add")
    counts = [len(found.moduli) for rows in range(1, 10**4) if (found := rule.within(10**4, rows * 4))]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 2
    assert max(counts) == 2 if method == "quotient_remainder" else max(counts) > 3


TABLES = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10**6), min_size=1)


@settings(deadline=None, max_examples=150)
@given(
    ids=TABLES,
    share=st.floats(1e-4, 1),
    method=st.sampled_from(BUDGETED),
    combine=st.sampled_from(COMBINES),
    threshold=st.sampled_from([0, 200, 10**7]),
)
def test_budgets_are_met(ids: dict[str, int], share: float, method: str, combine: str, threshold: int) -> None:
    dim = 4
    wanted = max(1, int(share * sum(ids.values()) * dim))
    search = SearchSpec(method=method, combine=combine, threshold=threshold)
    tables, why = choose(described(ids), dim, wanted, search)
    assert list(tables) == list(ids)
    kept = params_of(tables, ids)
    for name, table in tables.items():
        partitions = partitions_of(table, name)
        if ids[name] < threshold:
            assert partitions is None
        if partitions is not None and method != "remainder":
            assert partitions.is_complementary(ids[name])
    assert len({table.representation for table in tables.values()} - {FieldTable(dim).representation}) <= 1
    if kept == wanted:
        assert why == ""
    elif kept > wanted:
        rule = Rule(method, dim, "add" if method == "remainder" else combine)
        plain = {name for name, n in ids.items() if n < threshold}
        if combine == "path" and method != "remainder":
            plain.add(min(ids, key=lambda name: ids[name]))
        assert kept == sum(n * dim if name in plain else rule.least(n).params for name, n in ids.items())
        assert f"{kept} parameters are the least" in why
    else:
        assert why == f"{wanted - kept} parameters are left, which no further bucket and no plain table takes"
        if method != "chinese_remainder" and combine != "concat":
            assert wanted - kept < dim or not any(partitions_of(table, name) for name, table in tables.items())


def test_tables_share_the_budget_in_proportion_to_their_ids() -> None:
    ids = {"a": 100_000, "b": 40_000, "small": 100}
    tables, why = choose(described(ids), 4, 4 * 28_100, SearchSpec(method="remainder"))
    assert why == ""
    assert [table.shape(name, ids[name])[0] for name, table in tables.items()] == [20_000, 8_000, 100]


@pytest.mark.parametrize("combine", ["add", "mult"])
@pytest.mark.parametrize("method", BUDGETED)
def test_partitions_to_prune_have_the_collisions(method: str, combine: str) -> None:
    ids = {"large": 40_000, "small": 150, "middle": 900}
    search = SearchSpec.model_validate({"partitions": method, "combine": combine, "collisions": 8})
    soft = SoftThreshold("feature")
    plan = to_prune(described(ids), 6, search, soft)
    assert plan.fields["small"].representation == soft
    for name in ("large", "middle"):
        own = plan.fields[name].representation
        assert isinstance(own, Composed)
        assert own.entries == soft
        assert own.combine.name.lower() == combine
        rows = -(-ids[name] // 8)
        assert rows <= own.partitions[name].rows <= rows + (0 if method == "mixed_radix" else 9)
        assert method == "remainder" or own.partitions[name].is_complementary(ids[name])
    assert plan.params(ids) == sum(math.prod(plan.fields[name].shape(name, n)) for name, n in ids.items())
    assert (
        not to_prune(described(ids), 6, SearchSpec(method="magnitude", partitions="remainder"))
        .fields["large"]
        .is_shared
    )


def test_collisions_replace_the_budget() -> None:
    ids = {"a": 1000, "b": 7, "c": 250}
    search = SearchSpec(method="quotient_remainder", collisions=4, threshold=0)
    tables, why = choose(described(ids), 4, 99, search)
    assert partitions_of(tables["a"], "a") == Partitions.quotient_remainder(1000, 250)
    assert partitions_of(tables["c"], "c") == Partitions.quotient_remainder(250, 63)
    assert partitions_of(tables["b"], "b") == Partitions.quotient_remainder(7, 2)
    assert why.startswith("search.collisions 4 says how many rows stay")
    tables, _ = choose(described(ids), 4, 99, SearchSpec(method="remainder", collisions=4, threshold=0))
    assert partitions_of(tables["a"], "a") == Partitions.remainder(250)
    tables, _ = choose(described(ids), 4, 99, SearchSpec(method="quotient_remainder", collisions=1, threshold=0))
    assert not any(table.is_shared for table in tables.values())


@pytest.mark.parametrize(("method", "dim", "counts"), [("quotient_remainder", 5, "2"), ("mixed_radix", 17, "2 to 16")])
def test_columns_that_cannot_be_shared_name_the_mend(method: str, dim: int, counts: str) -> None:
    def spec(**search: str) -> Spec:
        return make_spec("unused", model={"dim": dim}, search={"method": method, **search})

    message = f"model.dim {dim} columns cannot be shared evenly by {counts} partitions; take an even model.dim"
    with pytest.raises(ValueError, match=re.escape(message)):
        spec(combine="concat")
    spec(combine="mult")
    assert Rule("mixed_radix", 15, "concat").counts == [3, 5, 15]
