import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_files import (
    ML1M,
    ML100K,
    avazu,
    criteo,
    criteo_line,
    movielens_atomic,
    movielens_dat,
    needs_ml1m,
    needs_ml100k,
    rows_of,
    spec_of,
)
from thresher.data.formats import open_source
from thresher.data.source import BadRows, resolve_path
from thresher.data.text import text_chunks

LABEL = {"positive_from": 4}


def text_rows(path, columns, bad=None, **options):
    options = {"delimiter": "\t", "header": False} | options
    chunks = list(text_chunks([path], columns, columns, bad or BadRows("fail", 0), **options))
    return [
        (int(row), *(chunk.columns[name][i].as_py() for name in columns))
        for chunk in chunks
        for i, row in enumerate(chunk.rows)
    ]


cells = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    table=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=20),
    block_bytes=st.integers(1, 64),
    header=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    last_end=st.booleans(),
)
def test_text_comes_back_whatever_the_blocks(tmp_path_factory, table, block_bytes, header, end, last_end):
    path = tmp_path_factory.mktemp("text") / "x.tsv"
    lines = ["a\tb\tc"] * header + ["\t".join(row) for row in table]
    path.write_bytes((end.join(lines) + end * last_end).encode())
    rows = text_rows(path, ["a", "b", "c"], header=header, block_bytes=block_bytes)
    assert rows == [(i + 1 + header, *row) for i, row in enumerate(table)]


BAD_LINES = {
    b"1\t2": "2 columns instead of 3",
    b"1\t2\t3\t4": "4 columns instead of 3",
    b"": "the row is empty",
    b"1\t2\r\t3": "a carriage return",
    b"1\t\xff\t3": "not utf-8 text",
}


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.sampled_from([b"1\t2\t3", b"x\t\ty", *BAD_LINES]), min_size=1, max_size=15),
    block_bytes=st.integers(1, 40),
)
def test_each_bad_line_is_named_by_its_row(tmp_path_factory, lines, block_bytes):
    path = tmp_path_factory.mktemp("text") / "x.tsv"
    path.write_bytes(b"\n".join(lines) + b"\n")
    bad = BadRows("skip", 100)
    rows = text_rows(path, ["a", "b", "c"], bad, block_bytes=block_bytes)
    assert [row[0] for row in rows] == [i + 1 for i, line in enumerate(lines) if line not in BAD_LINES]
    assert bad.first == [
        next(message for message in bad.first if message.startswith(f"{path}, row {i + 1}: {BAD_LINES[line]}"))
        for i, line in enumerate(lines)
        if line in BAD_LINES
    ]


def test_quotes_are_text(tmp_path):
    (tmp_path / "x").write_text('"a\tb"\t"c""\n')
    assert text_rows(tmp_path / "x", ["a", "b", "c"]) == [(1, '"a', 'b"', '"c""')]


def test_a_compressed_file_reads_like_the_plain_one_and_a_cut_one_is_an_error(tmp_path):
    plain = criteo(tmp_path / "train.txt", 500)
    packed = tmp_path / "day_0.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    strip = [
        {k: v for k, v in row.items() if k != "file"} for row in rows_of(spec_of(format="criteo", path=str(plain)))
    ]
    again = [
        {k: v for k, v in row.items() if k != "file"} for row in rows_of(spec_of(format="criteo", path=str(packed)))
    ]
    assert strip == again
    assert len(strip) == 500
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"day_0\.gz: cannot be read .*is the file whole"):
        rows_of(spec_of(format="criteo", path=str(packed)))


def test_a_line_without_end_is_no_row_but_another_kind_of_file(tmp_path, monkeypatch):
    monkeypatch.setattr("thresher.data.text.MAX_LINE_BYTES", 100)
    (tmp_path / "x").write_bytes(b"\0" * 1000)
    with pytest.raises(ValueError, match="a line of more than"):
        text_rows(tmp_path / "x", ["a"], block_bytes=50)


def test_movielens_atomic_joins_users_and_items(tmp_path):
    spec = spec_of(format="movielens", path=str(movielens_atomic(tmp_path / "ml")), label=LABEL)
    rows = rows_of(spec)
    assert len(rows) == 300
    assert rows[13] == {
        "user_id": "3", "item_id": "6", "rating": "4", "timestamp": "1013", "age": "23", "gender": "F",
        "occupation": "job0", "zip_code": "03123", "movie_title": "Film 6", "release_year": "1996",
        "class": "Drama Comedy", "row": 15, "file": str(tmp_path / "ml" / "x.inter"),
    }  # fmt: skip
    source = open_source(spec.data, 0)
    assert list(source.fields) == [
        "user_id", "item_id", "gender", "age", "occupation", "zip_code", "release_year", "class"
    ]  # fmt: skip
    assert (source.fields["class"].kind, source.fields["class"].separator) == ("multi", " ")
    assert (source.label, source.time) == ("rating", "timestamp")


def test_movielens_dat_is_latin_1_and_has_the_year_in_the_title(tmp_path):
    spec = spec_of(format="movielens", path=str(movielens_dat(tmp_path)), label=LABEL)
    rows = rows_of(spec)
    assert len(rows) == 40
    assert rows[0] == {
        "user_id": "1", "item_id": "1", "rating": "1", "timestamp": "1000", "gender": "F", "age": "25",
        "occupation": "1", "zip_code": "01000", "movie_title": "Misérables, Les (1995)", "class": "Drama|Musical",
        "release_year": "1995", "row": 1, "file": str(tmp_path / "ratings.dat"),
    }  # fmt: skip
    assert rows[2]["release_year"] == ""
    assert open_source(spec.data, 0).fields["class"].separator == "|"


def test_movielens_parquet_has_the_same_names(tmp_path):
    pq.write_table(
        pa.table({"user_id": pa.array([1, 2], pa.int32()), "movie_id": [7, 8], "rating": [3, 5], "time_split": [0, 2]}),
        tmp_path / "ratings.parquet",
    )
    pq.write_table(
        pa.table({"user_id": [2, 1], "gender": ["F", "M"], "age": [1, 2], "occupation": [3, 4], "zip": ["a", "b"]}),
        tmp_path / "users.parquet",
    )
    pq.write_table(
        pa.table({"movie_id": [7, 8], "title": ["x", "y"], "genres": ["A|B", ""], "year": [1990, 1991]}),
        tmp_path / "movies.parquet",
    )
    rows = rows_of(spec_of(format="movielens", path=str(tmp_path), label=LABEL))
    assert rows[0] == {
        "user_id": 1, "item_id": 7, "rating": 3, "time_split": 0, "gender": "M", "age": 2, "occupation": 4,
        "zip_code": "b", "movie_title": "x", "class": "A|B", "release_year": 1990, "row": 1,
        "file": str(tmp_path / "ratings.parquet"),
    }  # fmt: skip


def test_a_rating_of_an_unknown_movie_is_a_bad_row(tmp_path):
    folder = movielens_atomic(tmp_path)
    with (folder / "x.inter").open("a") as file:
        file.write("1\t99\t3\t5\n")
    spec = spec_of(format="movielens", path=str(folder), label=LABEL)
    with pytest.raises(ValueError, match=r"x\.inter, row 302: item_id 99 is not in x\.item; mend the row, or set"):
        rows_of(spec)
    bad = BadRows("skip", 1)
    assert len(rows_of(spec, bad=bad)) == 300
    assert bad.count == 1
    assert len(rows_of(spec, ["user_id", "rating"])) == 301  # nothing of the movie is asked for


def test_a_user_who_stands_there_twice_is_an_error(tmp_path):
    folder = movielens_atomic(tmp_path)
    with (folder / "x.user").open("a") as file:
        file.write("3\t1\tM\tjob\t1\n")
    with pytest.raises(ValueError, match=r"x\.user: user_id 3 stands there twice"):
        rows_of(spec_of(format="movielens", path=str(folder), label=LABEL))


def test_no_user_at_all_makes_every_rating_bad(tmp_path):
    folder = movielens_atomic(tmp_path)
    (folder / "x.user").write_text("user_id:token\tage:token\n")
    bad = BadRows("skip", 1000)
    assert rows_of(spec_of(format="movielens", path=str(folder), label=LABEL), ["age"], bad) == []
    assert bad.count == 300


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no MovieLens files; it needs"),
        (["ratings.dat", "users.dat"], r"lacks movies\.dat, which MovieLens needs beside ratings\.dat"),
        (["a.inter", "a.user"], r"lacks a\.item"),
    ],
)
def test_missing_movielens_files_are_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=message):
        open_source(spec_of(format="movielens", path=str(tmp_path)).data, 0)


def test_criteo_reads_the_days_in_order(tmp_path):
    for day in (0, 2, 10, 9):
        criteo(tmp_path / f"day_{day}", 5, first=100 * day)
    rows = rows_of(spec_of(format="criteo", path=str(tmp_path)))
    assert [row["file"].rpartition("_")[2] for row in rows] == ["0"] * 5 + ["2"] * 5 + ["9"] * 5 + ["10"] * 5
    assert ["label", *[f"I{i}" for i in range(1, 14)], *[f"C{i}" for i in range(1, 27)], "row", "file"] == list(rows[0])
    assert list(rows[7].values())[:-2] == criteo_line(202).split("\t")
    assert rows[7]["row"] == 3
    chunks = list(
        open_source(spec_of(format="criteo", path=str(tmp_path)).data, 0).chunks(["label"], BadRows("fail", 0))
    )
    assert [chunk.rows_before for chunk in chunks] == [0, 5, 10, 15]


def test_criteo_in_kaggles_layout_leaves_the_test_file_alone(tmp_path):
    criteo(tmp_path / "train.txt", 5)
    (tmp_path / "test.txt").write_text("no labels here\n")
    assert len(rows_of(spec_of(format="criteo", path=str(tmp_path)))) == 5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "must hold either train.txt or day_0.* it holds nothing"),
        (["test.txt"], "it holds test.txt"),
        (["train.txt", "day_0"], "must hold either"),
        (["day_0", "day_0.gz"], "has day 0 twice"),
        (["day_0", "day_00"], "has day 00 twice"),
    ],
)
def test_a_criteo_folder_of_neither_layout_is_an_error(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=message):
        open_source(spec_of(format="criteo", path=str(tmp_path)).data, 0)


def test_avazu_splits_the_hour(tmp_path):
    avazu(tmp_path / "train")
    spec = spec_of(format="avazu", path=str(tmp_path))
    rows = rows_of(spec)
    assert len(rows) == 200
    assert rows[100] == {
        "id": "100e5", "click": "0", "hour": "14102204", "C1": "100", "site_id": "site2", "hour_of_day": 4,
        "weekday": 2, "row": 102, "file": str(tmp_path / "train"),
    }  # fmt: skip  # 22 October 2014 was a Wednesday
    assert list(open_source(spec.data, 0).fields) == ["hour_of_day", "weekday", "C1", "site_id"]


def test_an_hour_that_is_none_is_a_bad_row(tmp_path):
    path = avazu(tmp_path / "train.csv", 3)
    path.write_text(path.read_text() + "9,1,14109901,1,s\n9,1,abc,1,s\n")
    bad = BadRows("skip", 10)
    assert len(rows_of(spec_of(format="avazu", path=str(path)), bad=bad)) == 3
    assert bad.first == [f"{path}, row 5: hour 14109901 is not YYMMDDHH", f"{path}, row 6: hour abc is not YYMMDDHH"]


def test_a_file_with_another_header_is_not_avazu(tmp_path):
    criteo(tmp_path / "x")
    with pytest.raises(ValueError, match="must name the columns, among them click and hour"):
        open_source(spec_of(format="avazu", path=str(tmp_path / "x")).data, 0)
    with pytest.raises(ValueError, match="must hold one of train"):
        open_source(spec_of(format="avazu", path=str(tmp_path)).data, 0)


def test_parquet_files_of_a_folder_follow_each_other(tmp_path):
    for part in range(3):
        pq.write_table(pa.table({"y": [part, 1], "a": ["x", None]}), tmp_path / f"{part}.parquet")
    data = {"format": "parquet", "path": str(tmp_path), "label": {"column": "y"}, "fields": {"a": {}}}
    rows = rows_of(spec_of(**data))
    assert [(row["y"], row["row"]) for row in rows] == [(0, 1), (1, 2), (1, 1), (1, 2), (2, 1), (1, 2)]
    pq.write_table(pa.table({"y": [1]}), tmp_path / "3.parquet")
    with pytest.raises(ValueError, match=r"3\.parquet: its columns are \['y'\], those of"):
        rows_of(spec_of(**data))
    (tmp_path / "3.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"3\.parquet: cannot be read as Parquet"):
        rows_of(spec_of(**data))


def test_a_flipped_byte_in_parquet_names_the_file(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"y": list(range(1000)), "a": [str(i) for i in range(1000)]}), path, write_page_checksum=True
    )
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet: cannot be read"):
        rows_of(spec_of(format="parquet", path=str(path), label={"column": "y"}, fields={"a": {}}))


def test_paths_in_packages_are_found_without_an_import(tmp_path, monkeypatch):
    package = tmp_path / "thresher_test_package"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_path("package:thresher_test_package/files") == package / "files"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/folder", "does not exist"),
        ("package:no_such_package/x", "`no_such_package` is not installed"),
        ("package:pytest/no_such_folder", "has no `no_such_folder`"),
        ("package:pytest/../numpy", "leaves the package"),
        ("package:os.path/x", "is no top-level package"),
        ("package:abc/x", "is not installed"),  # a module of one file has no folder
    ],
)
def test_paths_that_are_not_there_are_named(path, message):
    with pytest.raises(ValueError, match=message):
        resolve_path(path)


@needs_ml100k
def test_the_real_movielens_100k():
    rows = rows_of(spec_of(format="movielens", path=ML100K, label=LABEL))
    assert len(rows) == 100_000
    assert rows[0]["user_id"] == "196"
    assert {row["gender"] for row in rows} == {"M", "F"}
    assert len({genre for row in rows for genre in row["class"].split(" ")}) == 19


@needs_ml1m
def test_the_real_movielens_1m():
    source = open_source(spec_of(format="movielens", path=str(ML1M), label=LABEL).data, 0)
    assert source.columns == [
        "user_id", "item_id", "rating", "time_split", "gender", "age", "occupation", "zip_code", "movie_title",
        "class", "release_year",
    ]  # fmt: skip
    chunks = list(source.chunks(["user_id", "class"], BadRows("fail", 0)))
    assert sum(len(chunk.rows) for chunk in chunks) == 1_000_209
    assert max(len(chunk.rows) for chunk in chunks) <= 65_536
