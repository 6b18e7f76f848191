"""Do spec and data fit? Found from names, headers and the first rows, before anything starts."""

from __future__ import annotations

import numpy as np

from thresher.data import parse
from thresher.data.formats import Plan, column, open_source, plan
from thresher.data.rows import parse_rows
from thresher.data.source import BadRows, Chunk
from thresher.spec import Spec

NAMED_ROWS = 5  # bad rows that are listed


def check(spec: Spec) -> list[str]:
    """Every difference between a spec and its data that the first rows show; empty if they fit."""
    data = spec.data
    try:
        source = open_source(data, spec.seed)
    except ValueError as error:
        return [str(error)]
    what, problems = plan(data, source)
    there = [name for name in what.wanted if name in source.columns]
    bad = BadRows("skip", 1 << 62)
    try:
        chunk = next(source.chunks(there, bad), None)
    except ValueError as error:
        return [*problems, str(error)]
    if chunk is None:
        empty = f"{source.files[0]}: " + (f"no row can be read; {bad.first[0]}" if bad.first else "there are no rows")
        return [*problems, empty]
    problems += _wrong_types(what, chunk)
    if problems:
        return problems
    reasons = parse_rows(data, spec.seed, what, chunk).bad
    bad.add(chunk.file, reasons)
    if mend_label := _label_of_other_values(spec, what, chunk):
        return mend_label
    if bad.count and (data.on_bad_row == "fail" or len(reasons) == len(chunk.rows)):
        named = bad.first[:NAMED_ROWS]
        more = f" (and {bad.count - len(named)} more in the first rows)" if bad.count > len(named) else ""
        mend = "mend them, or set data.on_bad_row: skip" if len(reasons) < len(chunk.rows) else "no row is left"
        return [*named[:-1], f"{named[-1]}{more}; {mend}"]
    return []


def _wrong_types(what: Plan, chunk: Chunk) -> list[str]:
    """Columns of a type that cannot be what the spec makes of them."""
    problems = []
    kinds = {name: array.type for name, array in chunk.columns.items()}
    for name, field in what.fields.items():
        kind = kinds.get(column(name, field))
        if kind is None:
            continue
        raw = f"column `{column(name, field)}` holds {kind}"
        if field.kind == "multi" and parse.is_list(kind):
            if not parse.is_key(kind.value_type):
                problems.append(f"data.fields.{name}: {raw}, whose entries cannot be ids")
        elif parse.is_list(kind):
            problems.append(f"data.fields.{name}: {raw}; set kind: multi")
        elif not parse.is_key(kind):
            problems.append(f"data.fields.{name}: {raw}, which cannot be made into ids; choose another column")
    for key, named in (("label", what.label), ("split", what.split)):
        if named in kinds and not parse.is_key(kinds[named]):
            problems.append(f"data.{key}.column: column `{named}` holds {kinds[named]}; name one of numbers or text")
    return problems


def _label_of_other_values(spec: Spec, what: Plan, chunk: Chunk) -> list[str]:
    """What explains a label column that is mostly no label."""
    label = spec.data.label
    values, _ = parse.numbers(chunk.columns[what.label])
    values = values[~np.isnan(values) & ~np.isin(values, label.drop)]
    seen = np.unique(values)
    if label.positive_from is not None or len(seen) < 2 or np.isin(values, (0, 1)).mean() > 0.5:
        return []
    return [
        f"data.label.positive_from: column `{what.label}` holds {', '.join(f'{value:g}' for value in seen[:6])}"
        f"{' …' if len(seen) > 6 else ''} and not just 0 and 1; set positive_from to the smallest that counts as 1"
    ]
