import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.data.splits import NO_SPLIT, TimeSplit, column_split, random_split

THIRDS = [0.5, 0.3, 0.2]


def test_the_random_split_has_its_shares_and_depends_on_the_seed():
    rows = np.arange(100_000)
    split = random_split(rows, 1, THIRDS)
    np.testing.assert_allclose(np.bincount(split) / len(rows), THIRDS, atol=0.01)
    other = random_split(rows, 2, THIRDS)
    assert abs((split == other).mean() - 0.38) < 0.01  # 0.25 + 0.09 + 0.04: as if by chance


@given(st.integers(0, 1000), st.integers(0, 2**31 - 1))
def test_a_rows_split_does_not_depend_on_the_other_rows(cut, seed):
    rows = np.arange(1000)
    whole = random_split(rows, seed, THIRDS)
    parts = [random_split(rows[:cut], seed, THIRDS), random_split(rows[cut:], seed, THIRDS)]
    assert (np.concatenate(parts) == whole).all()


def test_the_split_by_a_column():
    split = column_split(["2", "0", "x", "1", ""], [0, 1, 2])
    assert split.tolist() == [2, 0, NO_SPLIT, 1, NO_SPLIT]


@settings(max_examples=80, deadline=None)
@given(
    times=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1)), min_size=1, max_size=60),
    fractions=st.sampled_from([[0.8, 0.1, 0.1], THIRDS, [0.01, 0.01, 0.98], [0.98, 0.01, 0.01]]),
    step=st.integers(1, 20),
)
def test_the_split_by_time_is_that_of_a_stable_sort(tmp_path_factory, times, fractions, step):
    path = tmp_path_factory.mktemp("times") / "times"
    values = np.array(times, np.uint64)
    values.tofile(path)
    count = len(times)
    ends = [round(fractions[0] * count), round((fractions[0] + fractions[1]) * count)]
    expected = np.empty(count, int)
    expected[np.argsort(values, kind="stable")] = np.searchsorted(ends, np.arange(count), side="right")
    by_time = TimeSplit(path, fractions)
    got = np.concatenate([by_time.next(min(step, count - start)) for start in range(0, count, step)])
    assert got.tolist() == expected.tolist()


def test_the_split_by_time_of_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("thresher.data.splits.BLOCK", 100)
    times = np.random.default_rng(0).integers(0, 50, 1000).astype(np.uint64)
    times.tofile(tmp_path / "times")
    got = TimeSplit(tmp_path / "times", [0.5, 0.25, 0.25]).next(1000)
    assert np.bincount(got).tolist() == [500, 250, 250]
    assert times[got == 0].max() <= times[got == 1].min()


def test_no_times_at_all(tmp_path):
    (tmp_path / "times").touch()
    assert TimeSplit(tmp_path / "times", THIRDS).next(0).tolist() == []


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_samples_by_time(tmp_path, n):
    np.zeros(n, np.uint64).tofile(tmp_path / "times")
    assert TimeSplit(tmp_path / "times", [0.8, 0.1, 0.1]).next(n).tolist() == {1: [0], 2: [0, 0], 3: [0, 0, 1]}[n]
