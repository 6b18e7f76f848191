import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.data import parse
from thresher.data.hashing import counter_bits, hash_keys, mix64, uniform
from thresher.data.labels import read_labels
from thresher.spec import LabelSpec

MASK = (1 << 64) - 1
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def slow_hash(key):
    value = 0xCBF29CE484222325
    for byte in key.encode():
        value = (value ^ byte) * 0x100000001B3 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


@given(st.lists(texts))
def test_the_hash_is_fnv_1a_and_a_mix_whatever_stands_beside(keys):
    assert hash_keys(keys).tolist() == [slow_hash(key) for key in keys]


def test_the_hash_never_changes():
    # 64-bit FNV-1a of "a" is af63dc4c8601ec8c; prepared data and served ids depend on these numbers.
    assert hash_keys(["", "a", "68fd1e64"]).tolist() == [slow_hash(""), slow_hash("a"), slow_hash("68fd1e64")]
    assert hash_keys(["a"]).tolist() == mix64(np.array([0xAF63DC4C8601EC8C], np.uint64)).tolist()
    assert hash_keys(["68fd1e64"]).tolist() == [10693166406241229657]
    assert counter_bits(1, 2, np.arange(2)).tolist() == [13456155783880818223, 10116348427443287449]


def test_hashed_keys_spread_evenly():
    counts = np.bincount((hash_keys([str(i) for i in range(100_000)]) % np.uint64(100)).astype(int))
    assert abs(counts - 1000).max() < 150  # 4.7 standard deviations


def test_random_numbers_of_streams_are_uniform_and_apart():
    u = uniform(counter_bits(3, 0, np.arange(100_000)))
    v = uniform(counter_bits(3, 1, np.arange(100_000)))
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(u, v)[0, 1]) < 0.015


@given(
    st.lists(st.one_of(st.floats(), st.none(), st.integers(-(2**60), 2**60)).map(lambda x: "" if x is None else str(x)))
)
def test_numbers_in_text(values):
    numbers, bad = parse.numbers(pa.array(values, pa.string()))
    expected = [math.nan if value == "" else float(value) for value in values]
    assert bad.tolist() == [math.isinf(value) for value in expected]
    np.testing.assert_array_equal(numbers, [math.nan if math.isinf(value) else value for value in expected])


@given(st.lists(st.sampled_from(["1", "2.5", "", "x", "1_0", " 1", "0x1", "1e400", "--", "1,5", "-3e2"]), max_size=30))
def test_what_is_no_number_is_bad_whatever_stands_beside(values):
    good = {"1": 1.0, "2.5": 2.5, "-3e2": -300.0, "": math.nan}
    numbers, bad = parse.numbers(pa.array(values, pa.string()))
    assert bad.tolist() == [value not in good for value in values]
    np.testing.assert_array_equal(numbers, [good.get(value, math.nan) for value in values])


@given(
    st.one_of(
        st.lists(st.integers(-(2**63), 2**63 - 1)).map(lambda x: pa.array(x, pa.int64())),
        st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(lambda x: pa.array(x, pa.float64())),
        st.lists(st.datetimes()).map(lambda x: pa.array(x, pa.timestamp("us"))),
        st.lists(st.integers(-(2**50), 2**50)).map(lambda x: pa.array([str(i) for i in x], pa.string())),
    )
)
def test_times_sort_as_they_did(array):
    codes, bad = parse.times(array)
    assert not bad.any()
    values = array.to_pylist() if array.type != pa.string() else [int(text) for text in array.to_pylist()]
    assert [values[i] for i in np.argsort(codes, kind="stable")] == sorted(values)


def test_a_missing_time_is_bad():
    for array in (pa.array([1, None]), pa.array([1.0, math.nan]), pa.array(["1", ""]), pa.array(["1", "now"])):
        assert parse.times(array)[1].tolist() == [False, True]


@given(st.lists(st.one_of(st.none(), texts)))
def test_text_keys(values):
    keys, codes = parse.keys(pa.array(values, pa.string()))
    assert [keys[code] for code in codes] == [value or "" for value in values]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([1, None, -5, 1]), ["1", "", "-5", "1"]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array([1.0, 2.5, None, math.nan]), ["1", "2.5", "", ""]),
        (pa.array([True, False]), ["True", "False"]),
        (pa.array(["a", None, "a"]).dictionary_encode(), ["a", "", "a"]),
        (pa.array(["a", None, ""], pa.string_view()), ["a", "", ""]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
    ],
)
def test_keys_of_other_types(array, expected):
    keys, codes = parse.keys(array)
    assert [keys[code] for code in codes] == expected


entries = st.lists(st.text("ab", max_size=2), max_size=4)


@given(st.lists(st.one_of(st.none(), entries)), st.booleans())
def test_lists_leave_empty_entries_out(values, as_text):
    if as_text:
        array = pa.array([None if value is None else "|".join(value) for value in values], pa.string())
    else:
        array = pa.array(values, pa.list_(pa.string()))
    flat, lengths = parse.lists(array, "|")
    expected = [[entry for entry in value or [] if entry] for value in values]
    assert lengths.tolist() == [len(value) for value in expected]
    assert flat.to_pylist() == [entry for value in expected for entry in value]


def test_lists_of_integers_and_slices():
    flat, lengths = parse.lists(pa.array([[9], [1, None, 2], None, [3]]).slice(1), "|")
    assert (flat.to_pylist(), lengths.tolist()) == ([1, 2, 3], [2, 0, 1])
    flat, lengths = parse.lists(pa.array([12, None]), "|")
    assert (flat.to_pylist(), lengths.tolist()) == (["12"], [1, 0])


def test_log_buckets():
    values = np.array([-3.5, -1, 0, 1, 1.5, 2, 3, 10, 1e9, math.nan])
    keys, codes = parse.log_buckets(values)
    assert [keys[code] for code in codes] == ["-4", "-1", "0", "1", "1", "2", "4", "8", "432", ""]


@given(st.lists(st.integers(-100, 10**9), min_size=1))
def test_log_buckets_keep_the_order(values):
    keys, codes = parse.log_buckets(np.array(sorted(values), float))
    buckets = [int(keys[code]) for code in codes]
    assert buckets == sorted(buckets)


def test_dense_inputs():
    np.testing.assert_allclose(parse.dense(np.array([0, math.e - 1, -2.5, math.nan])), [0, 1, -2.5, 0], rtol=1e-6)


def test_labels():
    array = pa.array(["1", "3", "4", "5", "", "x"])
    labels, kept, bad = read_labels(array, LabelSpec(positive_from=4.0, drop=[3.0]))
    assert labels[:4].tolist() == [0, 0, 1, 1]
    assert kept[:4].tolist() == [True, False, True, True]
    assert bad.tolist() == [False, False, False, False, True, True]
    labels, _, bad = read_labels(pa.array([0, 1, 2, None]), LabelSpec())
    assert labels[:2].tolist() == [0, 1]
    assert bad.tolist() == [False, False, True, True]
    assert read_labels(pa.array([True, False]), LabelSpec())[0].tolist() == [1, 0]
