import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.data_files import ML100K, criteo, movielens_atomic, needs_ml100k, prepared, spec_of
from thresher.data.check import check

LABEL = {"positive_from": 4}


def test_data_that_fit_have_no_differences(tmp_path):
    assert check(spec_of(format="synthetic")) == []
    assert check(spec_of(format="criteo", path=str(criteo(tmp_path / "x")))) == []
    assert check(spec_of(format="movielens", path=str(movielens_atomic(tmp_path / "ml")), label=LABEL)) == []


@needs_ml100k
def test_the_demos_data_fit():
    assert check(spec_of(format="movielens", path=ML100K, label=LABEL)) == []


def test_all_differences_are_listed_at_once(tmp_path):
    table = pa.table(
        {
            "clicked": [1, 0],
            "country": ["a", "b"],
            "tags": [["a"], ["b"]],
            "pairs": [[[1]], [[2]]],
            "raw": pa.array([b"x", b"y"]),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    spec = spec_of(
        format="parquet",
        path=str(tmp_path),
        label={"column": "clicks"},
        fields={
            "cuontry": {},
            "tags": {},
            "pairs": {"kind": "multi"},
            "raw": {},
            "leak": {"column": "clicks"},
        },
        split={"by": "column", "column": "fold"},
    )
    assert check(spec) == [
        "data.fields.cuontry: no column `cuontry` in the data; did you mean `country`? there are "
        "clicked, country, tags, pairs, raw",
        "data.fields.leak: no column `clicks` in the data; did you mean `clicked`? there are "
        "clicked, country, tags, pairs, raw",
        "data.label.column: no column `clicks` in the data; did you mean `clicked`? there are "
        "clicked, country, tags, pairs, raw",
        "data.split.column: no column `fold` in the data; there are clicked, country, tags, pairs, raw",
        "data.fields.leak: its column is the label; a model that reads it learns nothing else",
        "data.fields.tags: column `tags` holds list<element: string>; set kind: multi",
        "data.fields.pairs: column `pairs` holds list<element: list<element: int64>>, whose entries cannot be ids",
        "data.fields.raw: column `raw` holds binary, which cannot be made into ids; choose another column",
    ]
    with pytest.raises(
        ValueError, match=r"the spec does not fit the data:\n- data.fields.cuontry: .*\n- data.fields.leak"
    ):
        prepared(spec, tmp_path / "data")


def test_ratings_need_a_threshold(tmp_path):
    folder = movielens_atomic(tmp_path)
    assert check(spec_of(format="movielens", path=str(folder))) == [
        "data.label.positive_from: column `rating` holds 1, 2, 3, 4, 5 and not just 0 and 1; set positive_from to the "
        "smallest that counts as 1"
    ]


def test_a_split_by_time_needs_a_time(tmp_path):
    pq.write_table(
        pa.table({"y": [1, 0], "a": [1, 2], "at": [datetime.datetime(2020, 1, 1)] * 2}), tmp_path / "x.parquet"
    )
    data = {"format": "parquet", "path": str(tmp_path), "label": {"column": "y"}, "fields": {"a": {}}}
    assert check(spec_of(**data, split={"by": "time"})) == [
        "data.split.column: these data have no column of the time that is known; name one (y, a, at), "
        "or set data.split.by: random"
    ]
    assert check(spec_of(**data, split={"by": "time", "column": "at"})) == []


def test_dense_inputs_alone_are_refused(tmp_path):
    pq.write_table(pa.table({"y": [1, 0], "a": [1, 2]}), tmp_path / "x.parquet")
    fields = {"a": {"kind": "numeric", "numeric": "dense"}}
    spec = spec_of(format="parquet", path=str(tmp_path), label={"column": "y"}, fields=fields)
    assert check(spec) == ["data.fields: all are dense inputs; an embedding table needs one categorical field at least"]


def test_bad_first_rows_are_named(tmp_path):
    path = criteo(tmp_path / "x")
    path.write_text("a\n" * 7 + path.read_text())
    found = check(spec_of(format="criteo", path=str(path)))
    assert len(found) == 5
    assert found[0] == f"{path}, row 1: 1 columns instead of 40"
    assert found[4].endswith(
        "row 5: 1 columns instead of 40 (and 2 more in the first rows); mend them, or set data.on_bad_row: skip"
    )
    assert check(spec_of(format="criteo", path=str(path), on_bad_row="skip")) == []


def test_a_file_of_another_format_is_refused_even_where_bad_rows_are_skipped(tmp_path):
    (tmp_path / "x").write_text("a,b\n1,2\n")
    found = check(spec_of(format="criteo", path=str(tmp_path / "x"), on_bad_row="skip"))
    assert found == [f"{tmp_path / 'x'}: no row can be read; {tmp_path / 'x'}, row 1: 1 columns instead of 40"]
    criteo_with_words = "".join("\t".join(["1", *["word"] * 39]) + "\n" for _ in range(3))
    (tmp_path / "x").write_text(criteo_with_words)
    found = check(spec_of(format="criteo", path=str(tmp_path / "x"), on_bad_row="skip"))
    assert found[-1].endswith("row 3: column I1: 'word' is no finite number; no row is left")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"format": "criteo", "path": "no/such/file"}, "data.path: no/such/file does not exist"),
        ({"format": "movielens", "path": "package:no_such_package/x"}, "`no_such_package` is not installed"),
    ],
)
def test_a_path_that_is_not_there_is_a_difference(data, message):
    (found,) = check(spec_of(**data))
    assert message in found


def test_an_empty_file_is_a_difference(tmp_path):
    (tmp_path / "x").touch()
    assert check(spec_of(format="criteo", path=str(tmp_path / "x"))) == [f"{tmp_path / 'x'}: there are no rows"]
    assert check(spec_of(format="avazu", path=str(tmp_path / "x"))) == [f"{tmp_path / 'x'}: the file is empty"]
