"""Vectors of ids that share the rows of buckets: what a field says of it in the manifest, and how they are made.

Shapes: L ids of a lookup, k partitions, R rows and D columns of the field's table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from thresher.tables.format import MAX_PARTITIONS

if TYPE_CHECKING:
    from thresher.tables.manifest import Checker

Combine = Literal["add", "mult", "concat"]
COMBINES = ("add", "mult", "concat")
_MOST = 2**62  # of ids, divisors and moduli: int64 holds all that is computed with them

Lookup = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Composition:
    """How a field's ids share the rows of its table.

    Attributes:
        ids: how many there are.
        combine: how the rows of an id's buckets become its vector.
        partitions: divisor a and modulus m of each: id x has bucket (x div a) mod m. The table has a row for each
            bucket, the partitions one after the other.
    """

    ids: int
    combine: Combine
    partitions: tuple[tuple[int, int], ...]

    def as_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return asdict(self) | {"partitions": [list(split) for split in self.partitions]}

    def columns(self, dim: int) -> int:
        """Columns of an id's vector, where the table has so many."""
        return dim * len(self.partitions) if self.combine == "concat" else dim

    def vectors(self, ids_L: npt.NDArray[np.int64], lookup: Lookup) -> npt.NDArray[np.float32]:
        """Vectors of ids that are within range; `lookup` gives rows of the table."""
        first, parts = 0, []
        for divisor, modulus in self.partitions:
            parts.append(lookup(first + ids_L // divisor % modulus))
            first += modulus
        if self.combine == "concat":
            return np.concatenate(parts, axis=1)
        found = parts[0]
        for part in parts[1:]:
            found = found + part if self.combine == "add" else found * part
        return found


def composition_entry(check: Checker, value: Any, at: str, rows: int) -> Composition:
    """A field's composition in the manifest, checked.

    Args:
        check: of the manifest.
        value: as it stands there.
        at: where it stands.
        rows: R of the field's table.

    Raises:
        ValueError: names the member and what it must be.
    """
    member = check.members(value, at, ["ids", "combine", "partitions"])
    items = check.items(member["partitions"], f"{at}.partitions")
    if len(items) > MAX_PARTITIONS:
        raise check.fail(f"{at}.partitions", f"at most {MAX_PARTITIONS} partitions", len(items))
    found = Composition(
        ids=check.whole(member["ids"], f"{at}.ids", 1, _MOST),
        combine=cast(Combine, check.one_of(member["combine"], f"{at}.combine", COMBINES)),
        partitions=tuple(_partition(check, item, f"{at}.partitions[{i}]") for i, item in enumerate(items)),
    )
    if (buckets := sum(modulus for _, modulus in found.partitions)) != rows:
        raise ValueError(f"{check.where}: {at}.partitions: have {buckets} buckets, the table has {rows} rows")
    return found


def _partition(check: Checker, value: Any, at: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise check.fail(at, "a divisor and a modulus", value)
    return check.whole(value[0], f"{at}[0]", 1, _MOST), check.whole(value[1], f"{at}[1]", 1, _MOST)
