"""Complementary partitions under a budget: how many buckets each table's partitions get (Shi et al., KDD 2020).

Tables with few rows stay plain. The others share what is left in proportion to their rows, so that equally many ids
share a bucket everywhere; the parameters that are over then go to the largest tables, bucket by bucket. All of it is
exact integer arithmetic, for up to 2^62 ids a table.

Shapes: n ids of a table, D columns, k partitions of m_1 … m_k buckets. A bucket of the first partition is `first`
parameters, one of the others `other`: they differ for `path` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from thresher.budget import Budget
from thresher.embedding.double_hash import DoubleHash
from thresher.embedding.partitions import Partitions
from thresher.embedding.path import BucketPath, map_params
from thresher.embedding.representation import Composed, Dense, Masked, SoftThreshold
from thresher.embedding.separate import Separate
from thresher.embedding.table_plan import FieldTable, TablePlan
from thresher.kernels.layout import Combine
from thresher.spec import SearchSpec
from thresher.tables.format import MAX_PARTITIONS

METHODS = frozenset({"remainder", "quotient_remainder", "mixed_radix", "chinese_remainder", "double_hash"})
FIRST_MODULUS = frozenset({"remainder", "quotient_remainder"})  # the first modulus decides about the others
COMBINES = {"add": Combine.ADD, "mult": Combine.MULT, "concat": Combine.CONCAT}
# Double hashing: 1 in so many rows of a table is of one frequent id alone.
OWN_ROWS = 2

_SHARES = 1 << 40  # steps in which the common share of all tables is found
_TRIES = 64  # first moduli looked at for one that the others can be coprime to

Moduli = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """The buckets of a table.

    Attributes:
        params: of the table.
        moduli: buckets of each partition; none for a plain table.
    """

    params: int
    moduli: Moduli = ()


@dataclass(frozen=True)
class Rule:
    """What decides about the partitions of one table under a number of parameters.

    Attributes:
        method: remainder, quotient_remainder, mixed_radix, chinese_remainder, or double_hash, whose one modulus stands
            for all rows of the table.
        dim: columns D of a plain table.
        combine: concat, add, mult, feature or path.
        path_hidden: width of the hidden layer of the maps of `path`; 0 for linear maps.
    """

    method: str
    dim: int
    combine: str
    path_hidden: int = 0

    @property
    def counts(self) -> list[int]:
        """How many partitions a table may have; the spec sees to it that there is one at least."""
        if self.method in ("remainder", "double_hash"):
            return [1]
        counts = [2] if self.method == "quotient_remainder" else range(2, MAX_PARTITIONS + 1)
        return [k for k in counts if self.combine != "concat" or self.dim % k == 0]

    def bucket_params(self, k: int) -> tuple[int, int]:
        """Parameters of a bucket of the first of k partitions, and of one of the others."""
        if self.combine == "concat" and k > 1:
            return self.dim // k, self.dim // k
        if self.combine == "path":
            return self.dim, map_params(self.dim, self.path_hidden)
        return self.dim, self.dim

    def params(self, moduli: Moduli) -> int:
        """Parameters of all buckets."""
        first, other = self.bucket_params(len(moduli))
        return first * moduli[0] + other * sum(moduli[1:])

    def least(self, n: int) -> Choice:
        """The fewest parameters that a table of n ids can have."""
        return _least(self, n)

    def within(self, n: int, params: int) -> Choice | None:
        """The choice of the fewest partitions that can do with so many parameters, which it uses as far as it can."""
        plain = n * self.dim
        if params >= plain:
            return Choice(plain)
        for k in self.counts:
            moduli = self._within(n, k, params)
            if moduli is not None:
                return Choice(self.params(moduli), moduli)
        return None

    def sharing(self, n: int, collisions: int) -> Choice:
        """The choice in which so many ids share a bucket of the first partition.

        With moduli that may be chosen freely the one of so many ids a row, or of the fewest rows that there can be.
        """
        if self.method not in FIRST_MODULUS:
            return self.within(n, -(-n // collisions) * self.dim) or self.least(n)
        m = -(-n // collisions)
        moduli = (m,) if self.method == "remainder" else (m, -(-n // m))
        if min(moduli) < 2 and len(moduli) > 1:
            return Choice(n * self.dim)
        found = Choice(self.params(moduli), moduli)
        return found if found.params < n * self.dim else Choice(n * self.dim)

    def partitions(self, n: int, moduli: Moduli) -> Partitions:
        """The partitions of a table of n ids."""
        if self.method == "remainder":
            return Partitions.remainder(moduli[0])
        if self.method == "chinese_remainder":
            return Partitions.chinese_remainder(n, moduli)
        return Partitions.mixed_radix(n, moduli)  # two digits are remainder and quotient

    def _within(self, n: int, k: int, params: int) -> Moduli | None:
        """Some k moduli with as large a first one as fits; none if no k moduli fit."""
        least = _least_of(self, n, k)
        if least is None or self.params(least) > params:
            return None
        first, other = self.bucket_params(k)
        if k == 1:
            return (params // first,)

        def fits(m: int) -> bool:
            rest = balanced(-(-n // m), k - 1)
            return rest is not None and first * m + other * sum(rest) <= params

        low, high = _first_of_least(n, k, first, other), params // first + 1
        low = low if fits(low) else least[0]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if self.method != "chinese_remainder":
            return (low, *(balanced(-(-n // low), k - 1) or ())) if fits(low) else least
        for m in range(low, max(1, low - _TRIES), -1):
            rest = coprimes(-(-n // m), k - 1, m)
            if rest is not None and self.params((m, *rest)) <= params:
                more = (params - self.params((m, *rest))) // first
                larger = next(j for j in range(m + more, m - 1, -1) if all(math.gcd(j, r) == 1 for r in rest))
                return (larger, *rest)
        return least


def choose(
    fields: Sequence[Mapping[str, Any]], dim: int, params: int, search: SearchSpec
) -> tuple[dict[str, FieldTable], str]:
    """The tables of each field under a budget.

    Args:
        fields: what `prepare` says of each: name, number of rows, encoding and pooling.
        dim: columns D.
        params: that may stay.
        search: the method, and its options `combine`, `path_hidden`, `collisions` and `threshold`.

    Returns:
        The fields' tables, and why not exactly `params` stay; empty if they do.
    """
    combine = "add" if search.method in ("remainder", "double_hash") else search.combine  # of a single row
    rule = Rule(search.method, dim, combine, search.path_hidden)
    ids = {field["name"]: int(field["rows"]) for field in fields}
    found, why = _choices(ids, params, rule, search)
    chosen = {name: own.moduli for name, own in found.items() if own.moduli}
    tables = {name: FieldTable(dim) for name in ids}
    if search.method == "double_hash":
        for field in fields:
            if (name := field["name"]) in chosen:
                (rows,) = chosen[name]
                # Rows of a vocabulary are in falling order of their count; a hash knows none.
                frequent = rows // OWN_ROWS if field["encoding"] == "vocabulary" else 0
                outside = DoubleHash(frequent, rows - frequent, field["pooling"] == "mean")
                tables[name] = FieldTable(dim, outside=outside)
        return tables, why
    partitions = {name: rule.partitions(ids[name], moduli) for name, moduli in chosen.items()}
    if combine in COMBINES:
        composed = Composed(partitions, COMBINES[combine])
        return tables | {name: FieldTable(dim, composed) for name in partitions}, why
    means = {field["name"]: field["pooling"] == "mean" for field in fields}
    for name, own in partitions.items():
        path = BucketPath(own, search.path_hidden, means[name])
        tables[name] = FieldTable(dim, outside=Separate(own) if combine == "feature" else path)
    return tables, why


def to_prune(
    fields: Sequence[Mapping[str, Any]], dim: int, search: SearchSpec, entries: SoftThreshold | Masked | None = None
) -> TablePlan:
    """The tables of which single entries stay: of a row for each id, or of `search.partitions` of the ids.

    Args:
        fields: as `prepare` describes them.
        dim: columns.
        search: the method.
        entries: of all tables; none if they are Dense.
    """
    plain = entries or Dense()
    ids = {field["name"]: field["rows"] for field in fields}
    if search.method != "pep" or search.partitions is None:
        return TablePlan.uniform(ids, dim, plain)
    assert search.collisions is not None  # the spec sees to it
    rule, partitions = Rule(search.partitions, dim, search.combine), {}
    for name, n in ids.items():
        if n >= search.threshold and (moduli := rule.sharing(n, search.collisions).moduli):
            partitions[name] = rule.partitions(n, moduli)
    composed = Composed(partitions, COMBINES[search.combine], plain)
    return TablePlan(dim, {name: FieldTable(dim, composed if name in partitions else plain) for name in ids})


def check_pruned(budget: Budget, params: int, stacked: int, search: SearchSpec) -> None:
    """Check that a budget prunes the buckets of `to_prune`.

    Args:
        budget: as the user gave it.
        params: that it keeps.
        stacked: parameters of the tables before anything is pruned.
        search: the method.

    Raises:
        ValueError: if the buckets have fewer parameters.
    """
    if params > stacked:
        raise ValueError(
            f"prune.budgets: {budget} keeps {params:,} parameters, but with search.collisions {search.collisions} the "
            f"tables have no more than {stacked:,}; take fewer collisions, or a smaller budget"
        )


def _choices(ids: Mapping[str, int], params: int, rule: Rule, search: SearchSpec) -> tuple[dict[str, Choice], str]:
    """The choice for each field, and why not exactly `params` stay."""
    small = {name for name, n in ids.items() if n < search.threshold}
    if rule.combine == "path":
        small.add(min(ids, key=lambda name: ids[name]))  # TorchRec cannot do without a table
    found = {name: Choice(ids[name] * rule.dim) for name in small}
    if search.collisions and rule.method in FIRST_MODULUS:
        found |= {name: rule.sharing(n, search.collisions) for name, n in ids.items() if name not in small}
        kept = sum(own.params for own in found.values())
        why = f"search.collisions {search.collisions} says how many rows stay, whatever the budget"
        return found, why if kept != params else ""
    found |= share({name: n for name, n in ids.items() if name not in small}, params - _total(found), rule)
    return found, explain(_total(found), params, search.threshold)


def share(ids: Mapping[str, int], params: int, rule: Rule) -> dict[str, Choice]:
    """Tables that share parameters in proportion to their ids; the least that each can have where that is too much."""

    def at(part: int) -> dict[str, Choice]:
        shares = {name: n * rule.dim * part // _SHARES for name, n in ids.items()}
        return {name: rule.within(n, shares[name]) or rule.least(n) for name, n in ids.items()}

    low, high = 0, _SHARES + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _total(at(middle)) <= params else (low, middle)
    found = at(low)
    for name in sorted(ids, key=lambda name: -ids[name]):
        over = params - _total(found)
        larger = rule.within(ids[name], found[name].params + over) if over > 0 else None
        if larger is not None and larger.params > found[name].params:
            found[name] = larger
    return found


def explain(kept: int, wanted: int, threshold: int) -> str:
    """Why a method of partitions does not use exactly what the budget allows; empty if it does."""
    if kept > wanted:
        return (
            f"{kept} parameters are the least that these partitions need, with tables of fewer than {threshold} rows "
            "as they are"
        )
    return (
        ""
        if kept == wanted
        else f"{wanted - kept} parameters are left, which no further bucket and no plain table takes"
    )


def _total(choices: Mapping[str, Choice]) -> int:
    return sum(own.params for own in choices.values())


@lru_cache(maxsize=4096)
def _least(rule: Rule, n: int) -> Choice:
    found = (_least_of(rule, n, k) for k in rule.counts)
    composed = [Choice(rule.params(moduli), moduli) for moduli in found if moduli is not None]
    return min([*composed, Choice(n * rule.dim)], key=lambda own: own.params)


@lru_cache(maxsize=65536)
def _least_of(rule: Rule, n: int, k: int) -> Moduli | None:
    """The k moduli of the fewest parameters; none if fewer moduli would do."""
    if k == 1:
        return (2,) if rule.method == "double_hash" else (1,)
    first, other = rule.bucket_params(k)
    near = _first_of_least(n, k, first, other)
    coprime = rule.method == "chinese_remainder"
    options = []
    for m in range(max(2, near - 2), near + (_TRIES // 4 if coprime else 4)):
        rest = coprimes(-(-n // m), k - 1, m) if coprime else balanced(-(-n // m), k - 1)
        if rest is not None:
            options.append((m, *rest))
    return min(options, key=rule.params, default=None)


def _first_of_least(n: int, k: int, first: int, other: int) -> int:
    """About the first modulus of the fewest parameters: the minimum of first · m + (k − 1) other (n / m)^(1/(k−1))."""
    if first == other:
        even = balanced(n, k)
        return even[0] if even else 2
    return max(2, integer_root(n * other ** (k - 1) // first ** (k - 1), k))


def balanced(n: int, k: int) -> Moduli | None:
    """Moduli of at least 2, k of them, the larger first, whose product is n or more and whose sum is the least.

    None if fewer would do. For a given sum the product of nearly equal numbers is the largest.
    """
    low = integer_root(n, k)
    if low < 2:
        return (2,) * k if n > 2 ** (k - 1) else None
    larger = 0
    while (low + 1) ** larger * low ** (k - larger) < n:
        larger += 1
    return (low + 1,) * larger + (low,) * (k - larger)


def coprimes(n: int, k: int, taken: int) -> Moduli | None:
    """Moduli that are pairwise coprime and coprime to `taken`, k of them, whose product is n or more.

    Each is as small as those before it allow. None if fewer would do.
    """
    found: list[int] = []
    for left in range(k, 0, -1):
        if n <= 1:
            return None
        m = max(2, integer_root(n - 1, left) + 1)  # the root, rounded up
        while math.gcd(m, taken) > 1:
            m += 1
        found.append(m)
        taken *= m
        n = -(-n // m)
    return tuple(found)


def integer_root(n: int, k: int) -> int:
    """The largest r with r^k <= n, exactly."""
    if k == 1:
        return n
    if k == 2:
        return math.isqrt(n)
    guess = int(n ** (1 / k))  # wrong by little, as n is below 2^63 times a few columns
    while pow(guess, k) > n:
        guess -= 1
    while pow(guess + 1, k) <= n:
        guess += 1
    return guess
