"""Vectors of ids that share the rows of buckets: what a field says of it in the manifest, and how they are made.

Shapes: L ids of a lookup, k partitions, R rows and D columns of the field's table, H hidden units of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from thresher.data.hashing import GOLDEN, mix64
from thresher.tables.format import MAX_PARTITIONS

if TYPE_CHECKING:
    from thresher.tables.manifest import Checker

Combine = Literal["add", "mult", "concat", "feature", "path"]
COMBINES = ("add", "mult", "concat", "feature", "path")
_MOST = 2**62  # of ids, divisors and moduli: int64 holds all that is computed with them
_CHUNK = 1 << 12  # ids whose matrices are in memory together

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Lookup = Callable[[Ids], Vectors]
Dense = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Composition:
    """How a field's ids share the rows of its table.

    Attributes:
        ids: how many there are.
        combine: how the rows of an id's buckets become its vector; `concat` and `feature` have them side by side.
        partitions: divisor a and modulus m of each: id x has bucket (x div a) mod m. The table has a row for each
            bucket, the partitions one after the other; for `path` those of the first partition only.
        own: for double hashing, the ids that have the row of their number. All others have two hashed rows, added, of
            the m that follow: `partitions` has one, which says m.
        maps: for `path`, the arrays of the dense part that hold the maps of each partition but the first: one of
            matrices [m, D, D], or three of inner matrices [m, H, D], biases [m, H] and outer matrices [m, D, H].
    """

    ids: int
    combine: Combine
    partitions: tuple[tuple[int, int], ...]
    own: int | None = None
    maps: tuple[tuple[str, ...], ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        lists = {"partitions": [list(split) for split in self.partitions]}
        return asdict(self) | lists | {"maps": None if self.maps is None else [list(names) for names in self.maps]}

    @property
    def rows(self) -> int:
        """Rows of the field's table."""
        moduli = [modulus for _, modulus in self.partitions]
        return moduli[0] if self.combine == "path" else sum(moduli) + (self.own or 0)

    def columns(self, dim: int) -> int:
        """Columns of an id's vector, where the table has so many."""
        return dim * len(self.partitions) if self.combine in ("concat", "feature") else dim

    def vectors(self, ids_L: Ids, lookup: Lookup, dense: Dense) -> Vectors:
        """Vectors of ids that are within range.

        Args:
            ids_L: the ids.
            lookup: gives rows of the table.
            dense: arrays of the dense part.
        """
        if self.own is not None:
            return self._double_hashed(ids_L, self.own, lookup)
        if self.maps is not None:
            return self._along_path(ids_L, self.maps, lookup, dense)
        first, parts = 0, []
        for divisor, modulus in self.partitions:
            parts.append(lookup(first + ids_L // divisor % modulus))
            first += modulus
        if self.combine in ("concat", "feature"):
            return np.concatenate(parts, axis=1)
        found = parts[0]
        for part in parts[1:]:
            found = found + part if self.combine == "add" else found * part
        return found

    def _double_hashed(self, ids_L: Ids, own: int, lookup: Lookup) -> Vectors:
        ((_, modulus),) = self.partitions
        first_L = mix64(ids_L.astype(np.uint64) + GOLDEN)
        hashes = (first_L, mix64(first_L + GOLDEN))
        one_L, two_L = (own + (each_L % np.uint64(modulus)).astype(np.int64) for each_L in hashes)
        shared_L = ids_L >= own
        found = lookup(np.where(shared_L, one_L, ids_L))
        found[shared_L] += lookup(two_L[shared_L])
        return found

    def _along_path(self, ids_L: Ids, maps: tuple[tuple[str, ...], ...], lookup: Lookup, dense: Dense) -> Vectors:
        (divisor, modulus), *others = self.partitions
        found = lookup(ids_L // divisor % modulus)
        for start in range(0, len(ids_L), _CHUNK):
            part_L, z_LD = ids_L[start : start + _CHUNK], found[start : start + _CHUNK]
            for names, (divisor, modulus) in zip(maps, others, strict=True):
                bucket_L = part_L // divisor % modulus
                arrays = [dense[name][bucket_L] for name in names]
                if len(arrays) == 1:
                    z_LD = _times(arrays[0], z_LD)
                else:
                    z_LD = z_LD + _times(arrays[2], np.maximum(_times(arrays[0], z_LD) + arrays[1], np.float32(0)))
            found[start : start + _CHUNK] = z_LD
        return found

    def check_maps(self, dim: int, dense: Dense, at: str) -> None:
        """Check that the dense part has the maps, and that they fit.

        Raises:
            ValueError: names the array and what it must be.
        """
        if self.maps is None:
            return
        for names, (_, modulus) in zip(self.maps, self.partitions[1:], strict=True):
            hidden = dense[names[0]].shape[1] if len(names) == 3 and dense.get(names[0], _NONE).ndim == 3 else dim
            shapes = [(modulus, hidden, dim), (modulus, hidden), (modulus, dim, hidden)]
            for name, shape in zip(names, shapes, strict=False):
                array = dense.get(name)
                if array is None or array.shape != shape or array.dtype != np.float32:
                    found = "not there" if array is None else f"{array.dtype} {array.shape}"
                    raise ValueError(f"{at}.maps: {name[:80]!r} is {found}, must be a float32 array {shape}")


_NONE = np.empty(0, np.float32)


def _times(matrices: npt.NDArray[Any], vectors: Vectors) -> Vectors:
    product: Vectors = np.matmul(matrices, vectors[:, :, None])[:, :, 0]
    return product


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
    member = check.members(value, at, ["ids", "combine", "partitions", "own", "maps"])
    partitions = check.items(member["partitions"], f"{at}.partitions")
    if len(partitions) > MAX_PARTITIONS:
        raise check.fail(f"{at}.partitions", f"at most {MAX_PARTITIONS} partitions", len(partitions))
    ids = check.whole(member["ids"], f"{at}.ids", 1, _MOST)
    found = Composition(
        ids=ids,
        combine=cast(Combine, check.one_of(member["combine"], f"{at}.combine", COMBINES)),
        partitions=tuple(_partition(check, item, f"{at}.partitions[{i}]") for i, item in enumerate(partitions)),
        own=None if member["own"] is None else check.whole(member["own"], f"{at}.own", 0, ids),
        maps=None if member["maps"] is None else _maps(check, member["maps"], f"{at}.maps"),
    )
    if found.own is not None and (found.combine != "add" or len(partitions) > 1):
        raise ValueError(f"{check.where}: {at}.own: goes with combine add and a single partition")
    if (found.maps is not None) != (found.combine == "path"):
        raise ValueError(f"{check.where}: {at}.maps: goes with combine path, and with no other")
    if found.maps is not None and len(found.maps) != len(partitions) - 1:
        raise ValueError(f"{check.where}: {at}.maps: are for {len(partitions) - 1} partitions, not {len(found.maps)}")
    if found.rows != rows:
        raise ValueError(f"{check.where}: {at}: has {found.rows} rows, its table has {rows}")
    return found


def _partition(check: Checker, value: Any, at: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise check.fail(at, "a divisor and a modulus", value)
    return check.whole(value[0], f"{at}[0]", 1, _MOST), check.whole(value[1], f"{at}[1]", 1, _MOST)


def _maps(check: Checker, value: Any, at: str) -> tuple[tuple[str, ...], ...]:
    if not isinstance(value, list) or not all(isinstance(names, list) and len(names) in (1, 3) for names in value):
        raise check.fail(at, "lists of one or three names of arrays", value)
    return tuple(
        tuple(check.text(name, f"{at}[{i}][{j}]") for j, name in enumerate(names)) for i, names in enumerate(value)
    )
