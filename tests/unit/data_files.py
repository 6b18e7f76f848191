"""Small raw files of every format, and a reader of prepared data that shares no code with the loader."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from thresher.data.formats import open_source
from thresher.data.prepare import prepare
from thresher.data.source import BadRows
from thresher.spec import Spec

ML1M = Path(__file__).parents[3] / "shared" / "data" / "ml1m"
ML100K = "package:recbole/dataset_example/ml-100k"
needs_ml1m = pytest.mark.skipif(not ML1M.is_dir(), reason="MovieLens-1M is not beside the repository")
needs_ml100k = pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="recbole is not installed")


def spec_of(**data: Any) -> Spec:
    """A spec of these data."""
    return Spec(data=data)


def prepared(spec: Spec, out: Path) -> dict[str, Any]:
    """meta.json of a spec's data, prepared into a new folder."""
    out.mkdir(parents=True)
    meta = prepare(spec, out, lambda _: None)
    assert json.loads((out / "meta.json").read_text()) == meta
    return meta


def stored(folder: Path, meta: dict[str, Any], split: str) -> pa.Table:
    """The shards of a split."""
    return pa.concat_tables(pyarrow.ipc.open_file(folder / name).read_all() for name in meta["splits"][split]["files"])


def vocabulary(folder: Path, field: str) -> list[Any]:
    """The key of each table row; None for the OOV row."""
    return [None, *pq.read_table(folder / "vocabulary" / f"{field}.parquet")["key"].to_pylist()]


def rows_of(spec: Spec, wanted: list[str] | None = None, bad: BadRows | None = None) -> list[dict[str, Any]]:
    """The raw rows as a reader gives them, with `row` and `file`."""
    source = open_source(spec.data, spec.seed)
    rows = []
    for chunk in source.chunks(wanted or source.columns, bad or BadRows("fail", 0)):
        columns = {name: array.to_pylist() for name, array in chunk.columns.items()}
        assert all(len(column) == len(chunk.rows) for column in columns.values())
        for i, row in enumerate(chunk.rows.tolist()):
            rows.append({name: column[i] for name, column in columns.items()} | {"row": row, "file": chunk.file})
    return rows


def movielens_atomic(folder: Path, ratings: int = 300) -> Path:
    """Atomic files with 10 users and 7 movies."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{i % 10}\t{i % 7}\t{i % 5 + 1}\t{1000 + i}" for i in range(ratings)]
    (folder / "x.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + _text(lines))
    users = [f"{u}\t{20 + u}\t{'MF'[u % 2]}\tjob{u % 3}\t0{u}123" for u in range(10)]
    header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    (folder / "x.user").write_text(header + _text(users))
    items = [f"{m}\tFilm {m}\t{1990 + m}\t{' '.join(['Drama', 'Comedy', 'War'][: m % 4])}" for m in range(7)]
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    (folder / "x.item").write_text(header + _text(items))
    return folder


def movielens_dat(folder: Path) -> Path:
    """The .dat files, with a title that is not ASCII."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{i % 4 + 1}::{i % 3 + 1}::{i % 5 + 1}::{1000 + i}" for i in range(40)]
    (folder / "ratings.dat").write_text(_text(lines), encoding="latin-1")
    (folder / "users.dat").write_text(_text([f"{u}::F::25::{u}::0{u}000" for u in range(1, 5)]), encoding="latin-1")
    movies = ["1::Misérables, Les (1995)::Drama|Musical", "2::Toy Story (1995)::Animation", "3::No Year::War"]
    (folder / "movies.dat").write_text(_text(movies), encoding="latin-1")
    return folder


def criteo_line(i: int) -> str:
    """Row i of a Criteo file; every fifth value is missing."""
    integers = ["" if (i + j) % 5 == 0 else str((i * j) % 50 - 1) for j in range(13)]
    categoricals = ["" if (i + j) % 5 == 1 else f"{(i * (j + 1)) % 9:08x}" for j in range(26)]
    return "\t".join([str(int(i % 3 == 0)), *integers, *categoricals])


def criteo(path: Path, rows: int = 200, first: int = 0) -> Path:
    """A Criteo file."""
    path.write_text(_text([criteo_line(i) for i in range(first, first + rows)]))
    return path


def avazu(path: Path, rows: int = 200) -> Path:
    """An Avazu file of three days."""
    lines = [f"{i}e5,{int(i % 3 == 0)},1410{21 + i // 80:02d}{i % 24:02d},10{i % 2},site{i % 7}" for i in range(rows)]
    path.write_text("id,click,hour,C1,site_id\n" + _text(lines))
    return path


def _text(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)
