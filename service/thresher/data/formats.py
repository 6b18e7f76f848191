"""Which reader opens which format, and what the spec takes from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from thresher.data.avazu import Avazu
from thresher.data.criteo import Criteo
from thresher.data.movielens import MovieLens
from thresher.data.parquet import Parquet
from thresher.data.source import Source, resolve_path
from thresher.data.synthetic import Synthetic
from thresher.spec import DataSpec, FieldSpec, SyntheticSpec

READERS: dict[str, Callable[[Path], Source]] = {
    "movielens": MovieLens.open,
    "criteo": Criteo.open,
    "avazu": Avazu.open,
    "parquet": Parquet.open,
}


def open_source(data: DataSpec, seed: int) -> Source:
    """Open the raw data of a spec; reads names and headers only.

    Raises:
        ValueError: if it is not there or not of that format.
    """
    if data.format == "synthetic":
        return Synthetic.open(data.synthetic or SyntheticSpec(), seed)
    assert data.path is not None  # the spec checks it
    return READERS[data.format](resolve_path(data.path))


@dataclass(frozen=True)
class Plan:
    """What is read: the spec's wishes and the format's defaults together.

    Attributes:
        fields: the model's fields in their order, each with its column filled in.
        label: column of the label.
        split: column of the split or of the time, None if the row number says it all.
    """

    fields: dict[str, FieldSpec]
    label: str
    split: str | None

    @property
    def wanted(self) -> list[str]:
        """The columns to read, each once."""
        split = [self.split] if self.split else []
        return list(dict.fromkeys([self.label, *split, *(column(*item) for item in self.fields.items())]))


def column(name: str, field: FieldSpec) -> str:
    """The raw column of a field."""
    return field.column or name


def plan(data: DataSpec, source: Source) -> tuple[Plan, list[str]]:
    """What to read for a spec, and each column that it names but the data lack."""
    problems = []
    fields = data.fields or source.fields
    label = data.label.column or source.label
    split = None
    if data.split.by == "column":
        split = data.split.column
    elif data.split.by == "time":
        split = data.split.column or source.time
        if split is None and not source.in_time_order:
            problems.append(
                "data.split.column: these data have no column of the time that is known; name one "
                f"({_listed(source.columns)}), or set data.split.by: random"
            )
    named = {f"data.fields.{name}": column(name, field) for name, field in fields.items()}
    assert label is not None  # the spec asks for one where the format has none
    named |= {"data.label.column": label} | ({"data.split.column": split} if split else {})
    for key, wanted in named.items():
        if wanted not in source.columns:
            near = get_close_matches(wanted, source.columns, 1)
            meant = f"did you mean `{near[0]}`? " if near else ""
            problems.append(f"{key}: no column `{wanted}` in the data; {meant}there are {_listed(source.columns)}")
    for name, field in fields.items():
        if column(name, field) == label:
            problems.append(f"data.fields.{name}: its column is the label; a model that reads it learns nothing else")
    if not any(field.kind != "numeric" or field.numeric == "log_bucket" for field in fields.values()):
        problems.append("data.fields: all are dense inputs; an embedding table needs one categorical field at least")
    return Plan(fields, label, split), problems


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
