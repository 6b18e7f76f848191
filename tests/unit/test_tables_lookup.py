"""What compact tables give back equals what was written."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from thresher.data.hashing import hash_keys
from thresher.data.parse import log_buckets
from thresher.tables import Tables, Writer, load
from thresher.tables.format import LAYOUTS, pack_masks, rows_by_kept, table_file_bytes, unpack_masks
from thresher.tables.layouts import BLOCK_ROWS, CHECK_ROWS, Bags, BitmapTable, Shape, pool
from thresher.tables.values import LIMITS, STORED, decode, encode

SPEC = "0123456789abcdef" * 4


def start(folder):
    return Writer(folder, model="fm", seed=3, budget=0.2, spec_fingerprint=SPEC)


def write_table(writer, name, values_ND, mask_ND, *, dtype="fp32", chunk=7, **options):
    if mask_ND is None:
        mask_ND = np.ones(values_ND.shape, bool)
    dim = values_ND.shape[1]
    by_kept = rows_by_kept(pack_masks(mask_ND), dim)
    with writer.table(name, dim=dim, rows_by_kept=by_kept, dtype=dtype, **options) as table:
        for first in range(0, len(values_ND), chunk):
            cut = slice(first, first + chunk)
            table.write(values_ND[cut], None if mask_ND[cut].all() else mask_ND[cut])


def write_one(folder, values_ND, mask_ND, *, kind="categorical", pooling="mean", **options) -> Tables:
    writer = start(folder)
    write_table(writer, "a", values_ND, mask_ND, **options)
    writer.field("a", table="a", kind=kind, pooling=pooling, encoding="hash")
    writer.finish()
    return load(folder)


def write_known(folder, values_ND, mask_ND, **options) -> Tables:
    """A table whose row i is that of key i, and row 0 that of the others."""
    writer = start(folder)
    write_table(writer, "a", values_ND, mask_ND, renumber=True, **options)
    keys = np.arange(1, len(values_ND))
    writer.field("a", table="a", kind="categorical", encoding="vocabulary", keys=keys)
    writer.finish()
    return load(folder)


def table_of(rows, dim, kept_share, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, dim)).astype(np.float32), rng.random((rows, dim)) < kept_share


@st.composite
def masked_tables(draw):
    rows, dim = draw(st.integers(1, 150)), draw(st.integers(1, 70))
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 0.97, 1.0]))
    values_ND, mask_ND = table_of(rows, dim, share, draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        mask_ND[draw(st.integers(0, rows - 1))] = draw(st.booleans())  # a row that is full, or empty
    return values_ND, mask_ND


def stored(values_ND, mask_ND, dtype):
    """What a type of values without scales makes of a table."""
    masked_ND = np.where(mask_ND, values_ND, np.float32(0))
    return decode(encode(masked_ND, dtype, None), dtype, values_ND.shape[1])


@settings(max_examples=120, deadline=None)
@given(masked_tables(), st.sampled_from(["fp32", "fp16", "bf16"]), st.sampled_from(LAYOUTS), st.integers(1, 200))
def test_lookup_equals_values_times_mask(table, dtype, layout, chunk):
    values_ND, mask_ND = table
    with tempfile.TemporaryDirectory() as folder:
        write = write_known if layout == "bucketed" else write_one
        tables = write(Path(folder), values_ND, mask_ND, dtype=dtype, chunk=chunk, layout=layout)
        ids = tables.rows("a", np.arange(len(values_ND))) if layout == "bucketed" else np.arange(len(values_ND))
        got_ND = tables.embed({"a": ids})["a"]
        assert got_ND.dtype == np.float32
        np.testing.assert_array_equal(got_ND, stored(values_ND, mask_ND, dtype))
        assert (tables.tables["a"].layout, tables.tables["a"].kept) == (layout, mask_ND.sum())


@settings(max_examples=60, deadline=None)
@given(masked_tables(), st.sampled_from(list(LIMITS)), st.sampled_from(LAYOUTS), st.integers(1, 200))
def test_whole_numbers_are_within_half_a_step(table, dtype, layout, chunk):
    values_ND, mask_ND = table
    with tempfile.TemporaryDirectory() as folder:
        write = write_known if layout == "bucketed" else write_one
        tables = write(Path(folder), values_ND, mask_ND, dtype=dtype, chunk=chunk, layout=layout)
        ids = tables.rows("a", np.arange(len(values_ND))) if layout == "bucketed" else np.arange(len(values_ND))
        got_ND, masked_ND = tables.embed({"a": ids})["a"], values_ND * mask_ND
        # A column has a scale; of a bucketed table, in each bucket.
        groups_N = mask_ND.sum(axis=1) if layout == "bucketed" else np.zeros(len(mask_ND))
        for group in np.unique(groups_N):
            rows = groups_N == group
            steps_D = np.abs(masked_ND[rows]).max(axis=0) / np.float32(LIMITS[dtype])
            assert (np.abs(got_ND[rows] - masked_ND[rows]) <= steps_D * 0.501).all()
        assert not got_ND[~mask_ND].any()


@settings(max_examples=60, deadline=None)
@given(masked_tables(), st.sampled_from(list(STORED)), st.booleans())
def test_auto_takes_the_smallest_layout_and_knows_its_bytes(table, dtype, renumber):
    values_ND, mask_ND = table
    by_kept, dim = rows_by_kept(pack_masks(mask_ND), values_ND.shape[1]), values_ND.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        write = write_known if renumber else write_one
        tables = write(Path(folder), values_ND, mask_ND, dtype=dtype, chunk=64)
        allowed = LAYOUTS if renumber else ("dense", "bitmap")
        sizes = {layout: table_file_bytes(layout, dtype, dim, by_kept) for layout in allowed}
        assert tables.table_bytes == sizes[tables.tables["a"].layout] == min(sizes.values())


def test_bf16_rounds_to_the_nearest_and_to_the_even_of_two():
    values = np.array([[1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.0, -3.3e38]], np.float32)
    got = decode(encode(values, "bf16", None), "bf16", 6)
    assert got[0, :4].tolist() == [1, 1, 1 + 2**-6, 1 + 2**-7]
    assert np.signbit(got[0, 4])
    assert got[0, 5] == -3.2963046e38 or abs(got[0, 5] / 3.3e38 + 1) < 2**-8


def test_keys_of_empty_rows_leave_the_vocabulary_only_where_the_oov_row_is_empty_too(tmp_path):
    values_ND, mask_ND = table_of(50, 6, 0.1)
    mask_ND[3:20] = False
    for layout in LAYOUTS:
        for empty_oov in (True, False):
            mask_ND[0] = not empty_oov
            tables = write_known(tmp_path / f"{layout}{empty_oov}", values_ND, mask_ND, layout=layout)
            field, keys = tables.fields["a"], np.arange(1, 50)
            assert field.vocabulary.keys == (mask_ND[1:].any(axis=1).sum() if empty_oov else 49)
            got_ND = tables.embed({"a": tables.rows("a", keys)})["a"]
            np.testing.assert_array_equal(got_ND, values_ND[1:] * mask_ND[1:])
            assert tables.rows("a", ["unknown", 4711]).tolist() == [field.oov_row] * 2
            np.testing.assert_array_equal(tables.embed({"a": [field.oov_row]})["a"], values_ND[:1] * mask_ND[:1])


def test_only_vocabularies_follow_rows_that_get_other_numbers(tmp_path):
    values_ND, mask_ND = table_of(50, 6, 0.1)
    writer = start(tmp_path / "a")
    with pytest.raises(ValueError, match="table 't': layout bucketed renumbers rows, which only rows of vocabular"):
        writer.table("t", dim=6, rows_by_kept=[0] * 6 + [3], dtype="fp16", layout="bucketed")
    write_table(writer, "u", values_ND, mask_ND, renumber=True, layout="bucketed")
    with pytest.raises(ValueError, match="field 'f': the rows of table 'u' get other numbers, which only vocab"):
        writer.field("f", table="u", kind="categorical", encoding="hash")
    writer.table("v", dim=6, rows_by_kept=[40] + [0] * 5 + [3], dtype="fp16", renumber=True)
    with pytest.raises(ValueError, match="table 'v': its rows must be written before the vocabularies"):
        writer.field("f", table="v", kind="categorical", encoding="vocabulary", keys=[])


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(0, 9), st.integers(1, 70))))
def test_packed_masks_unpack_and_hold_column_j_in_bit_j(mask_ND):
    mask_NB = pack_masks(mask_ND)
    np.testing.assert_array_equal(unpack_masks(mask_NB, mask_ND.shape[1]), mask_ND)
    for row, column in np.argwhere(mask_ND):
        assert mask_NB[row, column // 8] >> column % 8 & 1


def test_kept_bits_are_kept_exactly(tmp_path):
    values_ND = np.zeros((40, 3), np.float32)
    values_ND[0] = [-0.0, 1e-45, np.finfo(np.float32).max]
    mask_ND = np.zeros((40, 3), bool)
    mask_ND[0] = True
    tables = write_one(tmp_path, values_ND, mask_ND)
    assert tables.tables["a"].layout == "bitmap"
    assert tables.embed({"a": [0]})["a"].tobytes() == values_ND[:1].tobytes()


@pytest.mark.parametrize("dim", [3, 1024])
def test_bitmap_row_starts_across_blocks_and_pieces(dim):
    rows = CHECK_ROWS + 3 * BLOCK_ROWS + 5 if dim == 3 else 2 * BLOCK_ROWS + 1
    _, mask_ND = table_of(rows, dim, 0.3)
    mask_ND[2 * BLOCK_ROWS :: 3] = False
    mask_ND[:BLOCK_ROWS] = True  # at 1,024 columns the largest distance that 16 bits must hold
    values_K = np.arange(mask_ND.sum(), dtype=np.float32)
    full_ND = np.zeros(mask_ND.shape, np.float32)
    full_ND[mask_ND] = values_K
    present_N = mask_ND.any(axis=1)
    arrays = {
        "present": np.packbits(np.pad(present_N, (0, -rows % 64)), bitorder="little"),
        "records": np.concatenate(
            [pack_masks(mask_ND[present_N]).reshape(-1), values_K.view(np.uint8), np.zeros(64, np.uint8)]
        ),
    }
    ids_L = np.random.default_rng(1).permutation(rows)
    table = BitmapTable(arrays, Shape("bitmap", "fp32", rows, dim, len(values_K)), "x")
    np.testing.assert_array_equal(table.lookup(ids_L), full_ND[ids_L])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 29), max_size=5), max_size=8), st.sampled_from(["sum", "mean"]))
def test_bags_are_pooled_as_the_field_says(bags, pooling):
    values_ND, mask_ND = table_of(30, 5, 0.3)
    expected_BD = np.zeros((len(bags), 5), np.float32)
    for sample, bag in enumerate(bags):
        for row in bag:
            expected_BD[sample] += values_ND[row] * mask_ND[row]
        if bag and pooling == "mean":
            expected_BD[sample] /= len(bag)
    with tempfile.TemporaryDirectory() as folder:
        tables = write_one(Path(folder), values_ND, mask_ND, kind="multi", pooling=pooling)
        offsets = np.cumsum([0, *map(len, bags)])
        values = [row for bag in bags for row in bag]
        for ids in (bags, (values, offsets), (np.array(values, np.int32), offsets.astype(np.uint32))):
            got_BD = tables.embed({"a": ids})["a"]
            assert got_BD.shape == expected_BD.shape
            np.testing.assert_array_equal(got_BD, expected_BD)


def test_pool_adds_a_bag_in_order():
    vectors_LD = np.random.default_rng(0).standard_normal((5000, 3)).astype(np.float32)
    total_D = np.zeros(3, np.float32)
    for vector_D in vectors_LD:
        total_D += vector_D
    table = BitmapTable.__new__(BitmapTable)  # nothing is looked up in it
    got_BD = pool(vectors_LD, Bags(table, np.arange(5000), np.array([0, 5000])))
    np.testing.assert_array_equal(got_BD[0], total_D)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"a": [0, 30]}, "field a: id 30 at position 1 is outside the field.s 30 ids"),
        ({"a": [0, -2]}, "field a: id -2"),
        ({"a": np.array([2**63], np.uint64)}, "field a: id 9223372036854775808"),
        ({"a": [0.0]}, "field a: ids must be one row of whole numbers, got float64"),
        ({"a": [True]}, "whole numbers, got bool"),
        ({"a": [[1], [2]]}, "of shape"),
        ({"a": 1}, "of shape"),
        ({"b": [0]}, "field 'b' is unknown; did you mean 'a'"),
        ({"m": ([0, 99], [0, 2])}, "field m: id 99 at position 1"),
        ({"m": [[0], [99]]}, "field m: id 99 at position 1"),
        ({"m": ([0, 1], [0, 1])}, "field m: offsets must rise from 0 to the number of ids, 2"),
        ({"m": ([0, 1], [0, 3, 2])}, "field m: offsets"),
        ({"m": ([0, 1], [1, 2])}, "field m: offsets"),
        ({"m": ([0, 1], [])}, "field m: offsets"),
        ({"m": ([0, 1],)}, "field m: a tuple must be"),
        ({"m": [0, 1]}, "field m: the ids of a bag must be one row"),
    ],
)
def test_bad_ids_are_named(tmp_path, ids, message, sparse):
    values_ND, mask_ND = table_of(30, 5, 0.1 if sparse else 1.0)
    writer = start(tmp_path)
    write_table(writer, "t", values_ND, mask_ND)
    for name, kind in (("a", "categorical"), ("m", "multi")):
        writer.field(name, table="t", kind=kind, encoding="hash")
    writer.finish()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        load(tmp_path).embed(ids)


def test_an_empty_request_gives_empty_vectors(tmp_path):
    tables = write_one(tmp_path, *table_of(30, 5, 0.1))
    assert tables.embed({}) == {}
    assert tables.embed({"a": []})["a"].shape == (0, 5)


def write_keys(folder, keys, encoding="vocabulary", rows=None) -> Tables:
    writer = start(folder)
    values_ND, mask_ND = table_of(rows or len(keys) + 1, 4, 0.2)
    mask_ND[0] = True  # else keys of empty rows would leave
    write_table(writer, "t", values_ND, mask_ND)
    kind = "numeric" if encoding == "log_bucket" else "categorical"
    writer.field("f", table="t", kind=kind, encoding=encoding, keys=keys)
    writer.finish()
    return load(folder)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), unique=True, max_size=40),
    st.lists(st.text(max_size=2), max_size=5),
)
def test_string_keys_find_their_rows_and_others_the_oov_row(keys, others):
    with tempfile.TemporaryDirectory() as folder:
        tables = write_keys(Path(folder), keys)
        expected = {key: row for row, key in enumerate(keys, 1)}
        asked = keys[::-1] + [key for key in others if key.isascii()] + keys[:1]
        assert tables.rows("f", asked).tolist() == [expected.get(key, 0) for key in asked]
        assert tables.rows("f", np.array(keys, object)).tolist() == list(range(1, len(keys) + 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=40), st.lists(st.integers(-3, 2**64), max_size=9)
)
def test_integer_keys_find_their_rows_as_numbers_and_as_text(keys, others):
    with tempfile.TemporaryDirectory() as folder:
        tables = write_keys(Path(folder), np.array(keys, np.int64))
        expected = {key: row for row, key in enumerate(keys, 1)}
        asked = [*keys, *others]
        rows = [expected.get(key, 0) for key in asked]
        assert tables.rows("f", asked).tolist() == rows
        assert tables.rows("f", [str(key) for key in asked]).tolist() == rows
        assert tables.rows("f", np.array(keys, np.int64)).tolist() == rows[: len(keys)]
        unsigned = [key for key in asked if 0 <= key < 2**64]
        assert tables.rows("f", np.array(unsigned, np.uint64)).tolist() == [expected.get(key, 0) for key in unsigned]


def test_raw_values_become_keys_as_in_the_data(tmp_path):
    tables = write_keys(tmp_path, ["", "7", "2.5", "x"])
    assert tables.rows("f", [None, float("nan"), 7, 7.0, 2.5, "x", "07", np.int32(7)]).tolist() == [
        1, 1, 2, 2, 3, 4, 0, 2,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="field f: a raw key is text or a number"):
        tables.rows("f", [b"x"])
    with pytest.raises(ValueError, match="surrogate"):
        tables.rows("f", ["\ud800"])
    with pytest.raises(ValueError, match="field 'g' is unknown"):
        tables.rows("g", ["x"])


def test_integer_keys_are_decimals_and_nothing_else(tmp_path):
    tables = write_keys(tmp_path, np.array([7, 12, 0]))
    assert tables.rows("f", ["7", "07", " 7", "1_2", "+7", "", "٧", 12.0, None, "0", "-0"]).tolist() == [
        1, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0,
    ]  # fmt: skip


def test_log_buckets_are_those_of_the_data(tmp_path):
    numbers = np.concatenate([np.linspace(-5, 3, 200), np.exp(np.linspace(0, 20, 2000)), [2.0, np.nan]])
    distinct, codes = log_buckets(numbers)
    tables = write_keys(tmp_path, distinct, encoding="log_bucket")
    np.testing.assert_array_equal(tables.rows("f", numbers), codes + 1)
    assert tables.rows("f", [None, 1e300]).tolist() == [distinct.index("") + 1, 0]
    for bad in ([float("inf")], ["x"], [[1.0]]):
        with pytest.raises(ValueError, match="field f: is numeric"):
            tables.rows("f", bad)


def test_ids_are_their_own_rows(tmp_path):
    tables = write_keys(tmp_path, None, encoding="id", rows=17)
    assert tables.fields["f"].oov_row is None
    assert tables.rows("f", [0, 16, 3]).tolist() == [0, 16, 3]
    for bad in ([17], [-1]):
        with pytest.raises(ValueError, match=r"field f: id .* is outside the field's 17 ids"):
            tables.rows("f", bad)
    with pytest.raises(ValueError, match="field f: ids must be one row of whole numbers"):
        tables.rows("f", ["3"])


def test_hashed_keys_are_those_of_the_data(tmp_path):
    tables = write_keys(tmp_path, None, encoding="hash", rows=17)
    keys = [f"k{i}" for i in range(100)] + ["", "é"]
    np.testing.assert_array_equal(tables.rows("f", keys), (hash_keys(keys) % np.uint64(17)).astype(np.int64))
    assert tables.rows("f", []).shape == (0,)


def test_two_fields_share_a_table_and_dense_part_comes_back(tmp_path):
    dense = {
        "mlp.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "steps": np.array(3, np.int64),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 2), np.float16),
    }
    values_ND, _ = table_of(9, 4, 1.0)
    writer = start(tmp_path)
    write_table(writer, "t", values_ND, None)
    for name in ("b", "a"):
        writer.field(name, table="t", kind="categorical", encoding="hash")
    writer.dense(dense)
    writer.finish()
    tables = load(tmp_path)
    assert list(tables.fields) == ["b", "a"]
    assert tables.tables["t"].layout == "dense"
    assert (tables.manifest.model, tables.manifest.seed, tables.manifest.budget) == ("fm", 3, 0.2)
    assert tables.dense.keys() == dense.keys()
    for name, array in dense.items():
        assert tables.dense[name].dtype == array.dtype
        np.testing.assert_array_equal(tables.dense[name], array)
        with pytest.raises(ValueError, match="read-only"):
            tables.dense[name][...] = 0
    np.testing.assert_array_equal(tables.embed({"a": [8]})["a"], values_ND[8:])
