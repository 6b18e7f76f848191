"""MovieLens: ratings joined with users and movies, from any of the three forms it comes in.

- atomic files: `*.inter`, `*.user`, `*.item`, tab-separated, a header of `name:type`; genres separated by a space
- 1M: `ratings.dat`, `users.dat`, `movies.dat`, separated by `::`, Latin-1; genres by `|`
- Parquet: `ratings.parquet`, `users.parquet`, `movies.parquet`; genres by `|`

What means the same has the same name in all three: user_id, item_id, rating, timestamp, gender, age, occupation,
zip_code, release_year, class (the genres).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from thresher.data.parquet import parquet_chunks, parquet_columns
from thresher.data.source import BadRows, Chunk, Source
from thresher.data.text import first_line, text_chunks
from thresher.spec import FieldSpec

FIELDS = ("user_id", "item_id", "gender", "age", "occupation", "zip_code", "release_year", "class")
GENRES = "class"
SAME = {"movie_id": "item_id", "genres": GENRES, "year": "release_year", "zip": "zip_code", "title": "movie_title"}
DAT = {
    "ratings.dat": ["user_id", "item_id", "rating", "timestamp"],
    "users.dat": ["user_id", "gender", "age", "occupation", "zip_code"],
    "movies.dat": ["item_id", "movie_title", GENRES],
}


@dataclass(frozen=True)
class _Table:
    """One of the three files."""

    path: Path
    columns: list[str]  # under the names of this module

    def chunks(self, wanted: Collection[str], bad: BadRows) -> Iterator[Chunk]:
        """Stream it."""
        if self.path.suffix == ".parquet":
            names = dict(zip(self.columns, parquet_columns(self.path), strict=True))
            for chunk in parquet_chunks([self.path], [names[name] for name in wanted]):
                columns = {name: chunk.columns[names[name]] for name in wanted}
                yield Chunk(columns, chunk.file, chunk.rows, chunk.rows_before)
        elif self.path.suffix == ".dat":
            yield from text_chunks(
                [self.path], self.columns, wanted, bad, delimiter="::", header=False, encoding="latin-1"
            )
        else:
            yield from text_chunks([self.path], self.columns, wanted, bad, delimiter="\t", header=True)

    def read(self, wanted: Collection[str], bad: BadRows) -> dict[str, pa.Array]:
        """All of it; users and movies are thousands."""
        chunks = [chunk.columns for chunk in self.chunks(wanted, bad)]
        return {
            name: pa.concat_arrays([chunk[name] for chunk in chunks]) if chunks else pa.array([]) for name in wanted
        }


@dataclass
class MovieLens(Source):
    """Ratings with what is known of the user and the movie."""

    ratings: _Table = field(kw_only=True)
    sides: dict[str, _Table] = field(kw_only=True)  # by the name of the column that joins it to the ratings

    @classmethod
    def open(cls, path: Path) -> MovieLens:
        """The data in a folder.

        Raises:
            ValueError: if none of the three forms is there in full.
        """
        ratings, users, movies = tables = [_table(file) for file in _files(path)]
        columns = list(dict.fromkeys(name for table in tables for name in table.columns))
        if movies.path.suffix == ".dat":
            columns.append("release_year")  # stands in the title
        separator = " " if movies.path.suffix == ".item" else "|"
        return cls(
            files=[table.path for table in tables],
            columns=columns,
            fields={
                name: FieldSpec(kind="multi", separator=separator) if name == GENRES else FieldSpec()
                for name in FIELDS
                if name in columns
            },
            label="rating",
            time="timestamp" if "timestamp" in ratings.columns else None,
            ratings=ratings,
            sides={"user_id": users, "item_id": movies},
        )

    def chunks(self, wanted: Collection[str], bad: BadRows) -> Iterator[Chunk]:
        """Ratings in the order of their file; one of an unknown user or movie is a bad row."""
        joins = [_Join(key, table, wanted, self.ratings, bad) for key, table in self.sides.items()]
        joins = [join for join in joins if join.values]
        own = [name for name in self.ratings.columns if name in wanted or any(name == join.key for join in joins)]
        for chunk in self.ratings.chunks(own, bad):
            columns = dict(chunk.columns)
            good = np.ones(len(chunk.rows), bool)
            reasons: dict[int, str] = {}
            for join in joins:
                ids = chunk.columns[join.key]
                found = pc.index_in(*_alike(ids, join.ids))
                known = np.asarray(found.is_valid())
                for index in np.flatnonzero(~known):
                    reasons[int(chunk.rows[index])] = f"{join.key} {ids[index]} is not in {join.file}"
                good &= known
                columns |= {name: values.take(found) for name, values in join.values.items()}
            bad.add(chunk.file, reasons)
            if reasons:
                columns = {name: array.filter(pa.array(good)) for name, array in columns.items()}
            yield Chunk({name: columns[name] for name in wanted}, chunk.file, chunk.rows[good], chunk.rows_before)


class _Join:
    """The wanted columns of the users or the movies, by id."""

    def __init__(self, key: str, table: _Table, wanted: Collection[str], ratings: _Table, bad: BadRows) -> None:
        names = [name for name in table.columns if name in wanted and name not in ratings.columns]
        year = "release_year" in wanted and "release_year" not in table.columns and "movie_title" in table.columns
        self.key = key
        self.file = table.path.name
        self.values: dict[str, pa.Array] = {}
        if not names and not year:
            return
        columns = table.read({key, *names, *(["movie_title"] if year else [])}, bad)
        self.ids = columns[key]
        counts = self.ids.value_counts()
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise ValueError(f"{table.path}: {key} {twice[0]['values']} stands there twice; remove one of the rows")
        if year:
            found = pc.extract_regex(columns["movie_title"], r"\((?P<year>[0-9]{4})\)\s*$")
            self.values["release_year"] = pc.fill_null(pc.struct_field(found, "year"), "")
        self.values |= {name: columns[name] for name in names}


def _alike(a: pa.Array, b: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Two columns of ids that compare: as they are if of one type, else both as text."""
    return (a, b) if a.type == b.type else (a.cast(pa.string()), b.cast(pa.string()))


def _files(path: Path) -> Sequence[Path]:
    """Ratings, users and movies in a folder, in the form that is there."""
    if not path.is_dir():
        raise ValueError(f"data.path: {path} is a file; name the folder with the ratings, users and movies")
    forms = [list(DAT), ["ratings.parquet", "users.parquet", "movies.parquet"]]
    forms += [[f"{inter.stem}{end}" for end in (".inter", ".user", ".item")] for inter in sorted(path.glob("*.inter"))]
    missing = [[name for name in form if not (path / name).is_file()] for form in forms]
    for form, lack in zip(forms, missing, strict=True):
        if not lack:
            return [path / name for name in form]
    nearest, lack = min(zip(forms, missing, strict=True), key=lambda pair: len(pair[1]) / len(pair[0]))
    if len(lack) < len(nearest):
        raise ValueError(f"data.path: {path} lacks {', '.join(lack)}, which MovieLens needs beside {nearest[0]}")
    raise ValueError(
        f"data.path: {path} has no MovieLens files; it needs a .inter, .user and .item file, or {', '.join(DAT)}, "
        "or ratings.parquet, users.parquet, movies.parquet"
    )


def _table(path: Path) -> _Table:
    if path.suffix == ".dat":
        return _Table(path, DAT[path.name])
    if path.suffix == ".parquet":
        return _Table(path, [SAME.get(name, name) for name in parquet_columns(path)])
    header = first_line(path).split("\t")
    if not all(re.fullmatch(r"[^:]+:[a-z_]+", name) for name in header):
        raise ValueError(f"{path}: the first line must name the columns as name:type, tab-separated; got {header[:5]}")
    return _Table(path, [name.partition(":")[0] for name in header])
