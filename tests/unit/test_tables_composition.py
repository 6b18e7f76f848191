"""Exported fields whose ids share rows, and projections: vectors by their definition, and crafted manifests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thresher.tables import Writer, load, safetensors_file
from thresher.tables.composition import Composition
from thresher.tables.manifest import from_bytes

SPEC = "0123456789abcdef" * 4
PARTITIONS = ((1, 5), (5, 4), (20, 3))  # of 60 ids
DIM = 3


def write(folder: Path) -> dict[str, np.ndarray]:
    """A folder with a field of each combine over one stacked table."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "rows": rng.standard_normal((12, DIM)).astype(np.float32),
        "path": rng.standard_normal((5, DIM)).astype(np.float32),
        "linear.1": rng.standard_normal((4, DIM, DIM)).astype(np.float32),
        "linear.2": rng.standard_normal((3, DIM, DIM)).astype(np.float32),
        "projection": rng.standard_normal((7, DIM)).astype(np.float32),
    }
    for number, buckets in ((1, 4), (2, 3)):
        arrays[f"inner.{number}"] = rng.standard_normal((buckets, 2, DIM)).astype(np.float32)
        arrays[f"bias.{number}"] = rng.standard_normal((buckets, 2)).astype(np.float32)
        arrays[f"outer.{number}"] = rng.standard_normal((buckets, DIM, 2)).astype(np.float32)
    writer = Writer(folder, model="fm", seed=3, budget=0.1, spec_fingerprint=SPEC)
    for name in ("rows", "path"):
        with writer.table(name, dim=DIM, rows_by_kept=[0] * DIM + [len(arrays[name])], dtype="fp32") as table:
            table.write(arrays[name])

    def field(name: str, table: str, composition: Composition | None, projection: str | None = None) -> None:
        writer.field(
            name, table=table, kind="categorical", encoding="hash", composition=composition, projection=projection
        )

    for combine in ("add", "mult", "concat", "feature"):
        field(combine, "rows", Composition(60, combine, PARTITIONS))  # type: ignore[arg-type]
    linear = (("linear.1",), ("linear.2",))
    field("linear", "path", Composition(60, "path", PARTITIONS, maps=linear))
    hidden = tuple(tuple(f"{part}.{number}" for part in ("inner", "bias", "outer")) for number in (1, 2))
    field("hidden", "path", Composition(60, "path", PARTITIONS, maps=hidden))
    field("hashed", "rows", Composition(60, "add", ((1, 4),), own=8))
    field("projected", "rows", None, "projection")
    writer.field(
        "bags", table="rows", kind="multi", encoding="vocabulary", pooling="mean", keys=["a", "b"],
        composition=Composition(60, "mult", PARTITIONS), projection="projection",
    )  # fmt: skip
    writer.dense({name: array for name, array in arrays.items() if name not in ("rows", "path")})
    writer.finish()
    return arrays


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("composed") / "tables"
    return folder, write(folder)


def rows_of(x: int) -> list[int]:
    return [x % 5, 5 + x // 5 % 4, 9 + x // 20 % 3]


def test_vectors_are_what_their_definition_says(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, arrays = written
    tables, ids = load(folder), np.arange(60)
    rows_LKD = np.array([arrays["rows"][rows_of(x)] for x in ids])
    vectors = tables.embed({name: ids for name in tables.fields if name not in ("projected", "bags")})
    np.testing.assert_array_equal(vectors["add"], rows_LKD[:, 0] + rows_LKD[:, 1] + rows_LKD[:, 2])
    np.testing.assert_array_equal(vectors["mult"], rows_LKD[:, 0] * rows_LKD[:, 1] * rows_LKD[:, 2])
    np.testing.assert_array_equal(vectors["concat"], rows_LKD.reshape(60, -1))
    np.testing.assert_array_equal(vectors["feature"], vectors["concat"])
    for x in ids:
        z = y = arrays["path"][x % 5]
        for number, bucket in ((1, x // 5 % 4), (2, x // 20 % 3)):
            z = arrays[f"linear.{number}"][bucket] @ z
            unit = np.maximum(arrays[f"inner.{number}"][bucket] @ y + arrays[f"bias.{number}"][bucket], 0)
            y = y + arrays[f"outer.{number}"][bucket] @ unit
        np.testing.assert_allclose(vectors["linear"][x], z, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(vectors["hidden"][x], y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(vectors["hashed"][:8], arrays["rows"][:8])
    sums = {tuple(arrays["rows"][8 + i] + arrays["rows"][8 + j]) for i in range(4) for j in range(4)}
    assert {tuple(vector) for vector in vectors["hashed"][8:]} <= sums


def test_bags_are_composed_first_pooled_second_and_projected_last(
    written: tuple[Path, dict[str, np.ndarray]],
) -> None:
    folder, arrays = written
    tables = load(folder)
    one = arrays["rows"][rows_of(41)].prod(0)
    two = arrays["rows"][rows_of(7)].prod(0)
    expected = np.stack([(one + two) / 2, np.zeros(DIM), two]) @ arrays["projection"].T
    found = tables.embed({"bags": [[41, 7], [], [7]]})["bags"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    plain = tables.embed({"projected": [3]})["projected"]
    np.testing.assert_allclose(plain, arrays["rows"][[3]] @ arrays["projection"].T, rtol=1e-5, atol=1e-6)


def test_ids_are_those_of_the_composition(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    tables = load(written[0])
    assert tables.rows("add", [f"k{i}" for i in range(500)]).max() == 59
    assert tables.rows("bags", ["b", "zz"]).tolist() == [2, 0]
    assert tables.embed({"add": [59]})["add"].shape == (1, DIM)
    with pytest.raises(ValueError, match="field add: id 60 at position 1 is outside the field's 60 ids"):
        tables.embed({"add": [0, 60]})


@pytest.mark.parametrize("combine", ["add", "mult", "concat", "feature"])
def test_ids_near_the_largest_are_looked_up_exactly(combine: Any) -> None:
    ids = np.array([0, 2**62 - 1, 2**31 * 3 + 7])
    partitions = ((1, 2**31), (2**31, 2**31))
    asked = []

    def lookup(rows_L: np.ndarray) -> np.ndarray:
        asked.append(rows_L.tolist())
        return np.zeros((len(rows_L), 1), np.float32)

    Composition(2**62, combine, partitions).vectors(ids, lookup, {})
    assert asked == [[x % 2**31 for x in ids.tolist()], [2**31 + x // 2**31 for x in ids.tolist()]]


FIELDS = ["add", "mult", "concat", "feature", "linear", "hidden", "hashed", "projected", "bags"]
ADD, LINEAR, HIDDEN, HASHED, PROJECTED, BAGS = (FIELDS.index(n) for n in
    ("add", "linear", "hidden", "hashed", "projected", "bags"))  # fmt: skip


@pytest.mark.parametrize(
    ("field", "path", "value", "message"),
    [
        (ADD, ["composition"], [], "composition: must be an object"),
        (ADD, ["composition", "ids"], 0, "composition.ids: must be a whole number from 1 to"),
        (ADD, ["composition", "ids"], 2**62 + 1, "composition.ids: must be"),
        (ADD, ["composition", "combine"], "sum", "composition.combine: must be one of add, mult"),
        (ADD, ["composition", "partitions"], [], "composition.partitions: must be a list with at least one"),
        (ADD, ["composition", "partitions"], [[1, 1]] * 17, "partitions: must be at most 16 partitions"),
        (ADD, ["composition", "partitions"], [[1, 5], [5, 4]], "composition: has 9 rows, its table has 12"),
        (ADD, ["composition", "partitions", 1], 4, r"partitions\[1\]: must be a divisor and a modulus"),
        (ADD, ["composition", "partitions", 1], [1, 2, 3], r"partitions\[1\]: must be a divisor and a modulus"),
        (ADD, ["composition", "partitions", 1, 0], 0, r"partitions\[1\]\[0\]: must be a whole number from 1"),
        (ADD, ["composition", "partitions", 1, 1], 2**63, r"partitions\[1\]\[1\]: must be"),
        (ADD, ["composition", "partitions", 1, 1], -1, r"partitions\[1\]\[1\]: must be"),
        (ADD, ["composition", "own"], 0, "own: goes with combine add and a single partition"),
        (ADD, ["composition", "maps"], [], "maps: goes with combine path, and with no other"),
        (ADD, ["composition", "more"], 0, "composition: unknown member 'more'"),
        (HASHED, ["composition", "own"], 7, "composition: has 11 rows, its table has 12"),
        (HASHED, ["composition", "own"], -1, "own: must be a whole number"),
        (HASHED, ["composition", "ids"], 7, "own: must be a whole number from 0 to 7"),
        (HASHED, ["composition", "combine"], "mult", "own: goes with combine add"),
        (LINEAR, ["composition", "maps"], None, "maps: goes with combine path, and with no other"),
        (LINEAR, ["composition", "maps"], [["linear.1"]], "maps: are for 2 partitions, not 1"),
        (LINEAR, ["composition", "maps", 0], ["a", "b"], "maps: must be lists of one or three names"),
        (LINEAR, ["composition", "maps", 0], "linear.1", "maps: must be lists of one or three names"),
        (LINEAR, ["composition", "maps", 0, 0], 7, r"maps\[0\]\[0\]: must be a printable string"),
        (LINEAR, ["composition", "maps", 0, 0], "none", "maps: 'none' is not there, must be a float32 array"),
        (LINEAR, ["composition", "maps", 0, 0], "linear.2", r"'linear.2' is float32 \(3, 3, 3\), must be a float32"),
        (LINEAR, ["composition", "partitions", 0, 1], 6, "composition: has 6 rows, its table has 5"),
        (HIDDEN, ["composition", "maps", 0, 0], "projection", "maps: 'projection' is float32"),
        (HIDDEN, ["composition", "maps", 1, 2], "outer.1", r"maps: 'outer.1' is float32 \(4, 3, 2\)"),
        (PROJECTED, ["projection"], "", "projection: must be a printable string"),
        (PROJECTED, ["projection"], "none", "projection: 'none' is not there, must be a float32 array"),
        (PROJECTED, ["projection"], "bias.1", r"projection: 'bias.1' is float32 \(4, 2\)"),
        (ADD + 2, ["projection"], "projection", r"must be a float32 array \(D, 9\)"),
        (BAGS, ["vocabulary", "keys"], 60, "vocabulary.keys: must be a whole number from 0 to 59"),
    ],
)
def test_crafted_manifests_are_refused(
    field: int,
    path: list[Any],
    value: Any,
    message: str,
    written: tuple[Path, dict[str, np.ndarray]],
    tmp_path: Path,
) -> None:
    for file in written[0].rglob("*"):
        target = tmp_path / file.relative_to(written[0])
        target.mkdir() if file.is_dir() else target.write_bytes(file.read_bytes())
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_bytes())
    member: Any = manifest["fields"][field]
    for step in path[:-1]:
        member = member[step]
    member[path[-1]] = value
    text = manifest_text(manifest)
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"manifest\.json: fields\[{field}\]\.?.*{message}"):
        load(tmp_path, verify=False)


def manifest_text(manifest: dict[str, Any]) -> str:
    """The manifest with its own size, so that only what was changed is wrong."""
    size = 0
    while True:
        rest = sum(manifest[name] for name in ("table_bytes", "vocabulary_bytes", "dense_bytes"))
        text = json.dumps(manifest | {"manifest_bytes": size, "total_bytes": rest + size}, indent=1) + "\n"
        if len(text) == size:
            return text
        size = len(text)


def test_the_untouched_manifest_is_accepted(written: tuple[Path, dict[str, np.ndarray]]) -> None:
    text = manifest_text(json.loads((written[0] / "manifest.json").read_bytes()))
    assert [field.name for field in from_bytes(text.encode(), "x", verify=False).fields] == FIELDS


def test_a_map_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tables")
    path = tmp_path / "tables" / "dense.safetensors"
    arrays = {name: array.copy() for name, array in load(tmp_path / "tables").dense.items()}
    arrays["linear.1"][0, 0, 0] = np.nan
    safetensors_file.write(path, arrays)
    with pytest.raises(ValueError, match=re.escape("linear.1: a value near position 0 is not finite")):
        load(tmp_path / "tables", verify=False)
