import collections
import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.data_files import (
    ML1M,
    ML100K,
    avazu,
    criteo,
    criteo_line,
    movielens_atomic,
    needs_ml1m,
    needs_ml100k,
    prepared,
    rows_of,
    spec_of,
    stored,
    vocabulary,
)
from thresher.data import parse
from thresher.data.hashing import hash_keys
from thresher.data.splits import SPLITS, random_split
from thresher.data.synthetic import Synthetic
from thresher.data.vocabulary import VocabularyEncoder
from thresher.rundir import is_complete
from thresher.spec import Spec, SyntheticSpec
from thresher.stages import prepare as stage

LABEL = {"positive_from": 4}
cell = st.one_of(st.none(), st.sampled_from(["", "a", "b", "ab", "7", "-1", "07"]))
row = st.fixed_dictionaries(
    {
        "cat": cell,
        "number": st.one_of(st.none(), st.integers(-5, 100)),
        "tags": st.lists(st.sampled_from("abc"), max_size=3).map("|".join),
        "y": st.sampled_from([0, 1]),
    }
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(row, min_size=1, max_size=30), min_count=st.integers(1, 3), group=st.integers(1, 9))
def test_prepared_data_say_what_the_raw_rows_said(tmp_path_factory, rows, min_count, group):
    folder = tmp_path_factory.mktemp("prepare")
    split_of = ["train"] * len(rows)
    for split in SPLITS:  # both labels in each split, so that the data are of use
        rows = rows + [{"cat": "x", "number": 3, "tags": "", "y": y} for y in (0, 1)]
        split_of += [split] * 2
    schema = pa.schema([("cat", pa.string()), ("number", pa.int64()), ("tags", pa.string()), ("y", pa.int8())])
    table = pa.Table.from_pylist(rows, schema).append_column("split", pa.array(split_of))
    pq.write_table(table, folder / "raw.parquet", row_group_size=7)
    fields = {
        "cat": {"min_count": min_count},
        "hashed": {"column": "cat", "encoding": "hash", "rows": 5},
        "number": {"kind": "numeric"},
        "size": {"column": "number", "kind": "numeric", "numeric": "dense"},
        "tags": {"kind": "multi", "pooling": "sum"},
        "hashed_tags": {"kind": "multi", "column": "tags", "encoding": "hash", "rows": 2},
    }
    spec = spec_of(
        format="parquet",
        path=str(folder / "raw.parquet"),
        label={"column": "y"},
        fields=fields,
        split={"by": "column", "column": "split"},
        row_group_rows=group,
    )
    meta = prepared(spec, folder / "data")
    assert [field["name"] for field in meta["fields"]] == ["cat", "hashed", "number", "tags", "hashed_tags"]
    assert meta["dense"] == ["size"]

    def bucket(number):
        keys, codes = parse.log_buckets(np.array([math.nan if number is None else number], float))
        return keys[codes[0]]

    keys_of = {
        "cat": lambda raw: [raw["cat"] or ""],
        "number": lambda raw: [bucket(raw["number"])],
        "tags": lambda raw: [tag for tag in raw["tags"].split("|") if tag],
    }
    for name, keys in keys_of.items():
        words = vocabulary(folder / "data", name)
        counts = collections.Counter(
            k for raw, s in zip(rows, split_of, strict=True) if s == "train" for k in keys(raw)
        )
        needed = min_count if name == "cat" else 1
        assert {str(word) for word in words[1:]} == {key for key, count in counts.items() if count >= needed}
        order = [(-counts[str(word)], word) for word in words[1:]]
        assert order == sorted(order)
        table_counts = np.load(folder / "data" / "counts" / f"{name}.npy")
        assert table_counts[1:].tolist() == [counts[str(word)] for word in words[1:]]
        assert table_counts.sum() == sum(counts.values())
        field = next(field for field in meta["fields"] if field["name"] == name)
        assert (field["rows"], field["oov_row"], field["train_count"]) == (len(words), 0, sum(counts.values()))
        for split in SPLITS:
            mine = [raw for raw, s in zip(rows, split_of, strict=True) if s == split]
            ids = stored(folder / "data", meta, split)[f"sparse.{name}"].to_pylist()
            row_of = {str(word): i for i, word in enumerate(words) if i}
            expected = [[row_of.get(key, 0) for key in keys(raw)] for raw in mine]
            assert ids == (expected if name == "tags" else [one for (one,) in expected])
            flat = [i for ids in expected for i in ids]
            assert field["oov_rate"][split] == pytest.approx(flat.count(0) / max(len(flat), 1))
    for split in SPLITS:
        mine = [raw for raw, s in zip(rows, split_of, strict=True) if s == split]
        table = stored(folder / "data", meta, split)
        assert table["label"].to_pylist() == [raw["y"] for raw in mine]
        assert table["sparse.hashed"].to_pylist() == (hash_keys([raw["cat"] or "" for raw in mine]) % 5).tolist()
        tags = [hash_keys([tag for tag in raw["tags"].split("|") if tag]) % 2 for raw in mine]
        assert table["sparse.hashed_tags"].to_pylist() == [ids.tolist() for ids in tags]
        sizes = np.array([math.nan if raw["number"] is None else raw["number"] for raw in mine], float)
        np.testing.assert_array_equal(table["dense.size"].to_numpy(), parse.dense(sizes))
        info = meta["splits"][split]
        assert (info["samples"], info["label_rate"]) == (len(mine), pytest.approx(np.mean([raw["y"] for raw in mine])))
    assert np.load(folder / "data" / "counts" / "hashed.npy").shape == (5,)


def test_keys_are_integers_where_all_are():
    def words(*keys):
        encoder = VocabularyEncoder("x", 100)
        encoder.encode(keys)
        return encoder.finish(np.ones(len(keys), np.int64), 1).keys

    assert words("10", "9", "-3").to_pylist() == [-3, 9, 10]
    assert words("10", "9", "07").to_pylist() == ["07", "10", "9"]
    assert words("1", "+1").to_pylist() == ["+1", "1"]
    assert words(str(2**63)).to_pylist() == [str(2**63)]
    assert words("1", "").to_pylist() == ["", "1"]
    encoder = VocabularyEncoder("x", 100)
    encoder.encode(["5", "rare", "6"])
    rows = encoder.finish(np.array([3, 1, 4]), 2)
    assert rows.keys.to_pylist() == [6, 5]
    assert rows.counts.tolist() == [1, 4, 3]
    assert rows.of_number.tolist() == [2, 0, 1]


def test_meta_names_inputs_by_their_hash(tmp_path):
    path = criteo(tmp_path / "train.txt")
    meta = prepared(spec_of(format="criteo", path=str(path)), tmp_path / "data")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert meta["inputs"] == [{"path": str(path), "bytes": len(content), "sha256": digest}]
    assert [field["encoding"] for field in meta["fields"][12:14]] == ["log_bucket", "vocabulary"]
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        "counts", "meta.json", "raw.json", "test", "train", "validation", "vocabulary"
    ]  # fmt: skip


def test_the_random_split_counts_raw_rows_so_that_a_bad_one_moves_no_other(tmp_path):
    path = criteo(tmp_path / "train.txt", 300)
    spec = spec_of(format="criteo", path=str(path), on_bad_row="skip")
    before = stored(tmp_path / "a", prepared(spec, tmp_path / "a"), "test")["label"].to_pylist()
    lines = path.read_text().splitlines()
    train = int(np.flatnonzero(random_split(np.arange(1, 301), 0, [0.8, 0.1, 0.1]) == 0)[0])
    path.write_text("\n".join([*lines[:train], "broken", *lines[train + 1 :]]) + "\n")
    meta = prepared(spec, tmp_path / "b")
    assert stored(tmp_path / "b", meta, "test")["label"].to_pylist() == before
    assert meta["bad_rows"] == {"count": 1, "first": [f"{path}, row {train + 1}: 1 columns instead of 40"]}


def test_rows_in_several_days_split_as_in_one_file(tmp_path):
    (tmp_path / "days").mkdir()
    for day in range(3):
        criteo(tmp_path / "days" / f"day_{day}", 100, first=100 * day)
    one = spec_of(format="criteo", path=str(criteo(tmp_path / "train.txt", 300)))
    many = spec_of(format="criteo", path=str(tmp_path / "days"))
    for split in SPLITS:
        tables = [
            stored(tmp_path / name, json.loads((tmp_path / name / "meta.json").read_text()), split)
            for name, spec in (("one", one), ("many", many))
            if (tmp_path / name).exists() or prepared(spec, tmp_path / name)
        ]
        assert tables[0].equals(tables[1])


def bad_criteo(tmp_path, **cells):
    """200 good rows, then one with other cells."""
    path = criteo(tmp_path / "train.txt")
    line = criteo_line(200).split("\t")
    for position, text in cells.items():
        line[int(position[1:])] = text
    path.write_text(path.read_text() + "\t".join(line) + "\n")
    return path


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"c0": "2"}, "column label: '2' is no label"),
        ({"c0": ""}, "column label: '' is no label"),
        ({"c1": "1x"}, "column I1: '1x' is no finite number"),
        ({"c13": "inf"}, "column I13: 'inf' is no finite number"),
        ({"c39": "a\tb"}, "41 columns instead of 40"),
        ({"c1": "9" * 60 + "x"}, "column I1: '99999999999999999999999999999999999999… is no finite number"),
    ],
)
def test_a_bad_row_fails_or_is_skipped(tmp_path, cells, message):
    path = bad_criteo(tmp_path, **cells)
    with pytest.raises(ValueError) as failure:
        prepared(spec_of(format="criteo", path=str(path)), tmp_path / "a")
    assert f"{path}, row 201: {message}" in str(failure.value)
    assert "data.on_bad_row: skip" in str(failure.value)
    meta = prepared(spec_of(format="criteo", path=str(path), on_bad_row="skip"), tmp_path / "b")
    assert meta["bad_rows"] == {"count": 1, "first": [f"{path}, row 201: {message}"]}
    assert sum(split["samples"] for split in meta["splits"].values()) == 200


def test_bad_rows_beyond_the_first_chunk_fail_too(tmp_path, monkeypatch):
    monkeypatch.setattr("thresher.data.text.text_chunks.__kwdefaults__", {"encoding": "utf-8", "block_bytes": 2000})
    path = bad_criteo(tmp_path, c5="?")
    with pytest.raises(ValueError, match=r"train\.txt, row 201: column I5: '\?' is no finite number; mend the row, or"):
        prepared(spec_of(format="criteo", path=str(path)), tmp_path / "a")


def test_too_many_bad_rows_stop_the_run(tmp_path):
    path = criteo(tmp_path / "train.txt")
    path.write_text(path.read_text() + "x\n" * 30)
    spec = spec_of(format="criteo", path=str(path), on_bad_row="skip", max_bad_rows=29)
    with pytest.raises(ValueError, match=r"more than 29 bad rows, the last is .*row 230: .*the first .*row 201: "):
        prepared(spec, tmp_path / "a")
    meta = prepared(spec_of(format="criteo", path=str(path), on_bad_row="skip", max_bad_rows=30), tmp_path / "b")
    assert meta["bad_rows"]["count"] == 30
    assert len(meta["bad_rows"]["first"]) == 20


def test_a_split_value_that_is_none_of_the_three_is_a_bad_row(tmp_path):
    table = pa.table({"y": [0, 1] * 4, "a": [1] * 8, "s": ["a", "a", "b", "b", "c", "c", "d", "d"]})
    pq.write_table(table, tmp_path / "x.parquet")
    split = {"by": "column", "column": "s", "values": ["a", "b", "c"]}
    data = {"format": "parquet", "path": str(tmp_path), "label": {"column": "y"}, "fields": {"a": {}}, "split": split}
    with pytest.raises(ValueError, match=r"row 7: column s: 'd' is none of data\.split\.values"):
        prepared(spec_of(**data), tmp_path / "a")
    assert prepared(spec_of(**data, on_bad_row="skip"), tmp_path / "b")["bad_rows"]["count"] == 2


def test_the_split_by_time_of_movielens(tmp_path):
    spec = spec_of(format="movielens", path=str(movielens_atomic(tmp_path / "ml")), label=LABEL, split={"by": "time"})
    meta = prepared(spec, tmp_path / "data")
    assert [meta["splits"][split]["samples"] for split in SPLITS] == [240, 30, 30]
    ratings = [row["rating"] for row in rows_of(spec)]  # they come oldest first
    assert stored(tmp_path / "data", meta, "test")["label"].to_pylist() == [int(int(r) >= 4) for r in ratings[270:]]


def test_criteo_by_time_is_the_order_of_its_rows(tmp_path):
    path = criteo(tmp_path / "train.txt", 100)
    meta = prepared(spec_of(format="criteo", path=str(path), split={"by": "time"}), tmp_path / "data")
    labels = [int(line[0]) for line in path.read_text().splitlines()]
    assert stored(tmp_path / "data", meta, "validation")["label"].to_pylist() == labels[80:90]


def test_avazu_end_to_end(tmp_path):
    path = avazu(tmp_path / "train.csv")
    meta = prepared(spec_of(format="avazu", path=str(path), split={"by": "time"}), tmp_path / "data")
    assert [field["name"] for field in meta["fields"]] == ["hour_of_day", "weekday", "C1", "site_id"]
    assert meta["fields"][3]["rows"] == 8
    assert vocabulary(tmp_path / "data", "weekday") == [None, 1, 2]  # the third day is all in validation and test


def test_dropped_labels_are_no_samples(tmp_path):
    folder = movielens_atomic(tmp_path / "ml")
    spec = spec_of(format="movielens", path=str(folder), label={"positive_from": 4, "drop": [3]})
    meta = prepared(spec, tmp_path / "data")
    assert meta["dropped"] == 60
    assert sum(split["samples"] for split in meta["splits"].values()) == 240
    assert meta["bad_rows"]["count"] == 0


@pytest.mark.parametrize(
    ("ratings", "data", "message"),
    [
        (3, {"split": {"by": "time"}}, "the test split is empty: there are too few samples"),
        (300, {"label": {"positive_from": 9}}, "all .* labels of the train split are 0"),
        (300, {"label": {"positive_from": 0}}, "all .* labels of the train split are 1"),
        (300, {"split": {"by": "column", "column": "rating", "values": ["1", 2, 7]}}, "no row has 7 in `rating`"),
        (300, {"max_vocabulary": 5}, "data.fields.user_id: more than 5 different ids; set its encoding: hash"),
    ],
)
def test_data_of_no_use_are_refused(tmp_path, ratings, data, message):
    folder = movielens_atomic(tmp_path / "ml", ratings)
    data = {"label": LABEL, "on_bad_row": "skip"} | data
    with pytest.raises(ValueError, match=message):
        prepared(spec_of(format="movielens", path=str(folder), **data), tmp_path / "data")


def test_the_synthetic_rows_are_a_function_of_seed_and_row():
    spec = SyntheticSpec(samples=70_000, cardinalities=[50, 1000, 7], dimensions=[2, 0, 3])
    rows = rows_of(Spec(data={"format": "synthetic", "synthetic": spec.model_dump()}, seed=5))
    assert len(rows) == 70_000
    generator = Synthetic.open(spec, 5)
    assert [rows[65_999][f"f{f}"] for f in range(3)] == generator.ids(np.array([66_000])).ravel().tolist()
    assert Synthetic.open(spec, 6).ids(np.arange(100)).tolist() != generator.ids(np.arange(100)).tolist()
    assert {row["f2"] for row in rows} == set(range(7))
    assert max(row["f1"] for row in rows) < 1000


def test_the_synthetic_teacher_has_the_planted_dimensions():
    spec = SyntheticSpec(samples=1, cardinalities=[500] * 4, dimensions=[4, 2, 1, 0])
    generator = Synthetic.open(spec, 1)
    embedded = [generator.embeddings(f, np.arange(500)) for f in range(4)]
    assert [e.shape for e in embedded] == [(500, 4), (500, 2), (500, 1), (500, 0)]
    assert [np.linalg.matrix_rank(e) if e.size else 0 for e in embedded] == [4, 2, 1, 0]
    np.testing.assert_allclose(embedded[0].var(0), 1, atol=0.15)
    ids = generator.ids(np.arange(20_000))
    padded = [np.pad(e, ((0, 0), (0, 4 - e.shape[1]))) for e in embedded]
    slow = sum(
        (padded[f][ids[f]] * padded[g][ids[g]]).sum(1) for f in range(4) for g in range(f)
    ) * (2 / math.sqrt(2 + 1 + 1))  # fmt: skip
    np.testing.assert_allclose(generator.logits(ids), slow, atol=1e-12)
    assert np.array_equal(generator.embeddings(0, np.array([77]))[0], embedded[0][77])


@pytest.mark.parametrize("zipf", [0.5, 1.0, 1.5])
def test_synthetic_ids_follow_the_law(zipf):
    n = 20
    generator = Synthetic.open(SyntheticSpec(cardinalities=[n], zipf=zipf), 0)
    counts = np.bincount(generator.ids(np.arange(200_000))[0], minlength=n)
    edges = np.arange(1.0, n + 2)
    cdf = np.log(edges) if zipf == 1 else (edges ** (1 - zipf) - 1) / (1 - zipf)
    np.testing.assert_allclose(counts / 200_000, np.diff(cdf) / cdf[-1], atol=0.005)


def test_synthetic_data_can_be_learned(tmp_path):
    spec = Spec(data={"format": "synthetic", "synthetic": {"samples": 20_000, "cardinalities": [20] * 4}})
    meta = prepared(spec, tmp_path / "data")
    assert 0.3 < meta["splits"]["train"]["label_rate"] < 0.7
    assert meta["inputs"] == []


def test_the_stage_skips_what_is_there_and_keeps_it_when_it_fails(tmp_path, capsys):
    folder = movielens_atomic(tmp_path / "ml")
    run_dir = tmp_path / "run"

    def spec(**data):
        data = {"format": "movielens", "path": str(folder), "label": LABEL} | data
        return Spec(data=data, runtime={"run_dir": str(run_dir)})

    stage.run(spec())
    made = (run_dir / "data" / "meta.json").stat().st_mtime_ns
    assert is_complete(run_dir / "data", stage.inputs(spec()))
    capsys.readouterr()
    stage.run(spec())
    assert "data is up to date" in capsys.readouterr().out
    assert (run_dir / "data" / "meta.json").stat().st_mtime_ns == made
    with (folder / "x.inter").open("a") as file:
        file.write("broken\n")
    with pytest.raises(ValueError, match=r"x\.inter, row 302: 1 columns instead of 4"):
        stage.run(spec())
    assert (run_dir / "data" / "meta.json").stat().st_mtime_ns == made
    stage.run(spec(on_bad_row="skip"))
    assert json.loads((run_dir / "data" / "meta.json").read_text())["bad_rows"]["count"] == 1
    assert [p.name for p in run_dir.iterdir() if p.is_dir()] == ["data"]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    folder = movielens_atomic(tmp_path / "ml")
    spec = Spec(
        data={"format": "movielens", "path": str(folder), "label": LABEL}, runtime={"run_dir": str(tmp_path / "run")}
    )
    real = stage.prepare

    def prepare_and_append(*args):
        real(*args)
        with (folder / "x.user").open("a") as file:
            file.write("99\t1\tM\tjob\t1\n")

    monkeypatch.setattr(stage, "prepare", prepare_and_append)
    with pytest.raises(ValueError, match="a file changed while it was read"):
        stage.run(spec)
    assert not (tmp_path / "run" / "data").exists()


MEASURE = """
import sys
from pathlib import Path
from thresher.data.prepare import prepare
from thresher.spec import Spec
out = Path(sys.argv[2])
out.mkdir()
prepare(Spec(data={"format": "criteo", "path": sys.argv[1], "row_group_rows": 4096}), out, lambda _: None)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0])  # KiB; ru_maxrss would count the parent before exec
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    part = criteo(tmp_path / "part", 60_000).read_bytes()
    peak_mib = {}
    for copies in (3, 9):  # from some blocks of text on, every buffer has its size
        raw = tmp_path / f"{copies}"
        with raw.open("wb") as file:
            for _ in range(copies):
                file.write(part)
        command = [sys.executable, "-c", MEASURE, str(raw), str(tmp_path / f"{copies}.out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 0, done.stderr
        peak_mib[copies] = int(done.stdout) / 1024
    grown_mib = 6 * len(part) / 2**20
    assert grown_mib > 60
    assert peak_mib[9] - peak_mib[3] < grown_mib / 2, peak_mib


@needs_ml100k
def test_the_real_movielens_100k(tmp_path):
    meta = prepared(spec_of(format="movielens", path=ML100K, label=LABEL), tmp_path / "data")
    assert sum(split["samples"] for split in meta["splits"].values()) == 100_000
    assert {field["name"]: field["rows"] for field in meta["fields"]}["class"] == 20
    assert meta["splits"]["test"]["label_rate"] == pytest.approx(0.554, abs=0.02)


@needs_ml1m
def test_the_real_movielens_1m_by_its_own_split(tmp_path):
    split = {"by": "column", "column": "time_split", "values": [0, 1, 2]}
    meta = prepared(spec_of(format="movielens", path=str(ML1M), label=LABEL, split=split), tmp_path / "data")
    assert [meta["splits"][split]["samples"] for split in SPLITS] == [703_014, 99_678, 197_517]
    assert vocabulary(tmp_path / "data", "class")[1:4] == ["Comedy", "Drama", "Action"]
