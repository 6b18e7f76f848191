"""Reads a spec from disk, strictly, and words its errors: where, which key, what was expected, what was found.

Only YAML's events are used and plain Python values made of them: no object is ever constructed by a tag. Scalars are
read by YAML 1.2's core schema (`1e-3` is a number, `no` and `1:30` are text), and what a reader of the file could
misjudge is refused: keys that stand twice, anchors and aliases, merge keys, tags, NaN and infinities.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from thresher import cells
from thresher.spec import Spec

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_NUMBER_LENGTH = 64  # characters; Python itself refuses to convert integers of more than 4,300 digits
MAX_ERRORS = 100  # listed at once

Loc = tuple[str | int, ...]  # the way to a value: keys of mappings and indexes of lists

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

# What was expected, by pydantic's type of error; the names in braces are its limits.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text (quote it)",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "literal_error": "one of {expected}",
    "greater_than_equal": "a number of at least {ge}",
    "greater_than": "a number above {gt}",
    "less_than_equal": "a number of at most {le}",
    "less_than": "a number below {lt}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "a name that matches {pattern}",
}


class SpecError(ValueError):
    """A spec that cannot be used; the message lists every error, one a line."""

    def __init__(self, errors: Sequence[str]) -> None:
        """Word the list of errors."""
        self.errors = list(errors)
        shown = self.errors[:MAX_ERRORS]
        if len(self.errors) > MAX_ERRORS:
            shown.append(f"and {len(self.errors) - MAX_ERRORS:,} more")
        super().__init__("\n".join(shown if len(shown) == 1 else [f"{len(self.errors):,} errors in the spec", *shown]))


def load_spec(path: Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec file and the `key=value` overrides that stand after it.

    Args:
        path: a YAML file (JSON is YAML too), UTF-8.
        overrides: dotted keys with a value in YAML, such as `train.epochs=3` or `prune.budgets=[0.5, 0.1]`; a value
            replaces the file's as a whole. Each key may be given once.

    Raises:
        SpecError: lists all errors: of the YAML, unknown keys, wrong values. Conditions between sections are looked
            at only once every section is right by itself.
    """
    source = _Source(str(path))
    root = source.read(_read_text(path), ())
    if source.fatal:
        raise SpecError(source.words())
    if not isinstance(root, dict):
        raise SpecError([f"{path}: expected a mapping of sections (data, model, …), found {_found(root)}"])
    _override_all(source, root, overrides, ())
    _read_cell_overrides(source, root)
    try:
        spec = Spec.model_validate(root)
    except ValidationError as error:
        _word_validation(source, error)
        raise SpecError(source.words()) from None
    if not source.errors and spec.sweep is not None:
        _check_cells(source, spec)
    if source.errors:
        raise SpecError(source.words())
    return spec


def _read_cell_overrides(source: _Source, root: dict[str, Any]) -> None:
    """Turn the lists of `key=value` in the sweep's methods and models into mappings."""
    sweep = root.get("sweep")
    for kind in ("methods", "models"):
        entries = sweep.get(kind) if isinstance(sweep, dict) else None
        if not isinstance(entries, dict):
            continue
        for name, listed in entries.items():
            if isinstance(listed, list) and all(isinstance(override, str) for override in listed):
                entries[name] = {}
                _override_all(source, entries[name], listed, ("sweep", kind, name))


def _check_cells(source: _Source, spec: Spec) -> None:
    """Note what is wrong in the specs of a sweep's cells, at the places of their overrides."""
    noted = set(source.errors)
    for model, method in cells.pairs(spec):
        try:
            Spec.model_validate(cells.overridden(spec, model, method))
        except ValidationError as error:
            # As if the overrides stood where the keys are that they replace.
            own = {
                kind: {loc[3:]: place for loc, place in source.places.items() if loc[:3] == ("sweep", kind, name)}
                for kind, name in (("models", model), ("methods", method))
            }
            cell = _Source(source.name, {**source.places, **own["models"], **own["methods"]})
            _word_validation(cell, error)
            for place, message in cell.errors:
                whose = f"sweep.methods.{method} with sweep.models.{model}"
                for kind, name in (("models", model), ("methods", method)):
                    if place in own[kind].values():
                        whose = f"sweep.{kind}.{name}"
                worded = (place, f"{whose}: {message}")
                if worded not in noted:
                    noted.add(worded)
                    source.errors.append(worded)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError([f"{path}: no such file; give the path of a spec, such as specs/movielens_pep.yaml"]) from None
    except OSError as error:
        raise SpecError([f"{path}: cannot be read: {error.strerror}"]) from None
    if len(data) > MAX_BYTES:
        raise SpecError([f"{path}: larger than {MAX_BYTES:,} bytes, the most that a spec may have"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(
            [f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"]
        ) from None


@dataclass(frozen=True)
class _Place:
    """Where something stands: in a file at a line and column, or in an override."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"


@dataclass
class _Source:
    """What was read, where each key stands, and what is wrong with it."""

    name: str
    places: dict[Loc, _Place] = field(default_factory=dict)
    errors: list[tuple[_Place, str]] = field(default_factory=list)
    refused: set[Loc] = field(default_factory=set)  # values that are wrong already: one error each is enough
    fatal: bool = False  # the text ended in the middle

    def refuse(self, loc: Loc, place: _Place, message: str) -> None:
        """Note an error about the value at `loc`; the empty `loc` marks no value as wrong."""
        self.errors.append((place, message))
        if loc:
            self.refused.add(loc)

    def words(self) -> list[str]:
        """All errors by their place: those of the file by line, then those of overrides."""
        ordered = sorted(self.errors, key=lambda error: (error[0].line or math.inf, error[0].column or 0))
        return [f"{place}: {message}" for place, message in ordered]

    def read(self, text: str, at: Loc, override: str | None = None) -> Any:
        """The value that `text` holds; it belongs at `at`. Errors are noted, and `fatal` if the text is no YAML."""
        place = _Place(self.name) if override is None else _Place(f"override {_printable(override)}")
        try:
            events = yaml.parse(text, Loader=yaml.SafeLoader)
            value = _Builder(self, place, events).document(at)
        except _TooDeepError as error:
            self.errors.append((error.place, f"nested more than {MAX_DEPTH} levels deep, the most that a spec may be"))
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            place = place if override is not None else _Place(self.name, line, 1)
            self.errors.append((place, f"character U+{int(error.character):04X} is not allowed in YAML; remove it"))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            if mark is not None and override is None:
                place = _Place(self.name, mark.line + 1, mark.column + 1)
            context = f" ({error.context})" if error.context else ""
            self.errors.append((place, f"not valid YAML: {error.problem}{context}"))
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # The scanner converts escapes and directives by int() and chr() without checks of its own.
            self.errors.append((place, f"not valid YAML: {error}"))
        else:
            return value
        self.fatal = True
        return None


class _TooDeepError(Exception):
    def __init__(self, place: _Place) -> None:
        self.place = place


class _Builder:
    """Makes plain values of YAML's events, and notes their places in a `_Source`."""

    def __init__(self, source: _Source, place: _Place, events: Iterator[yaml.Event]) -> None:
        self._source, self._base, self._events = source, place, events

    def document(self, at: Loc) -> Any:
        """The only document of the stream; None where there is none."""
        self._next()  # StreamStart
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        value = self._value(self._next(), at, depth=len(at))
        self._next()  # DocumentEnd
        more = self._next()
        if not isinstance(more, yaml.StreamEndEvent):
            self._source.refuse((), self._place(more), "a second document begins; keep one")
        return value

    def _next(self) -> yaml.Event:
        return next(self._events)

    def _place(self, event: yaml.Event) -> _Place:
        if self._base.source != self._source.name:
            return self._base  # an override is its own place
        assert event.start_mark is not None
        return _Place(self._base.source, event.start_mark.line + 1, event.start_mark.column + 1)

    def _value(self, event: yaml.Event, loc: Loc, depth: int) -> Any:
        """The value that begins with `event`; reads events up to its end."""
        assert isinstance(event, yaml.NodeEvent)
        place = self._place(event)
        if depth > MAX_DEPTH:
            raise _TooDeepError(place)
        if isinstance(event, yaml.AliasEvent):
            self._source.refuse(loc, place, f"{_key(loc)}: alias *{event.anchor} is not taken; write the value out")
            return None
        if event.anchor is not None:
            self._source.refuse((), place, f"{_key(loc)}: anchor &{event.anchor} is not taken; remove it")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, loc)
        assert isinstance(event, yaml.CollectionStartEvent)
        if event.tag is not None:
            self._source.refuse((), place, f"{_key(loc)}: tag {_printable(event.tag)} is not taken; remove it")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := self._next(), yaml.SequenceEndEvent):
                at = (*loc, len(items))
                self._source.places[at] = self._place(event)
                items.append(self._value(event, at, depth + 1))
            return items
        return self._mapping(loc, depth)

    def _mapping(self, loc: Loc, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        first: dict[str, _Place] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            place = self._place(event)
            key = self._mapping_key(event, loc, depth)
            value_event = self._next()
            if key is None:
                self._value(value_event, (*loc, "?"), depth + 1)  # for the errors inside
                continue
            if key in first:
                where = f", first on line {first[key].line}" if first[key].line is not None else ""
                self._source.refuse((), place, f"{_key((*loc, key))}: this key stands twice{where}; keep one")
                self._value(value_event, (*loc, f"{key} (again)"), depth + 1)
                continue
            first[key] = self._source.places[(*loc, key)] = place
            mapping[key] = self._value(value_event, (*loc, key), depth + 1)
        return mapping

    def _mapping_key(self, event: yaml.Event, loc: Loc, depth: int) -> str | None:
        """The key, or None where it is refused."""
        place = self._place(event)
        if not isinstance(event, yaml.ScalarEvent):
            self._value(event, (*loc, "?"), depth + 1)
            self._source.refuse((), place, f"{_key(loc)}: expected a key of text, found a list, a mapping or an alias")
            return None
        if event.implicit[0] and event.value == "<<":
            self._source.refuse((), place, f"{_key(loc)}: merge key << is not taken; write the keys out")
            return None
        if event.anchor is not None:
            self._source.refuse((), place, f"{_key(loc)}: anchor &{event.anchor} is not taken; remove it")
        key = self._scalar(event, loc)
        if not isinstance(key, str):
            self._source.refuse((), place, f'{_key(loc)}: expected a key of text, found {event.value}; quote it: "…"')
            return None
        return key

    def _scalar(self, event: yaml.ScalarEvent, loc: Loc) -> Any:
        """A scalar by YAML 1.2's core schema."""
        text, place = event.value, self._place(event)
        if event.tag is not None:
            self._source.refuse((), place, f"{_key(loc)}: tag {_printable(event.tag)} is not taken; remove it")
            return text
        if not event.implicit[0]:  # quoted, or a block
            try:
                # JSON escapes a character beyond 16 bits as two surrogates, which YAML's scanner leaves apart.
                return text.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                self._source.refuse(loc, place, f"{_key(loc)}: half a surrogate pair is no character; remove it")
                return ""
        if text in ("", "~", "null", "Null", "NULL"):
            return None
        if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return text[0] in "tT"
        is_int = _INT.fullmatch(text) is not None
        if not is_int and not _FLOAT.fullmatch(text) and not _NOT_FINITE.fullmatch(text):
            return text
        if len(text) > MAX_NUMBER_LENGTH:
            self._source.refuse(
                loc, place, f"{_key(loc)}: a number of {len(text):,} characters; {MAX_NUMBER_LENGTH} is the most"
            )
            return None
        if is_int:
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        number = math.nan if _NOT_FINITE.fullmatch(text) else float(text)
        if not math.isfinite(number):
            self._source.refuse(loc, place, f"{_key(loc)}: expected a finite number, found {text}")
            return None
        return number


def _override_all(source: _Source, root: dict[str, Any], overrides: Sequence[str], above: Loc) -> None:
    """Put the values of each `key=value` into `root`, which stands at `above`."""
    given: set[str] = set()
    for override in overrides:
        key = override.partition("=")[0]
        if key in given:
            source.refuse((), _Place(f"override {_printable(override)}"), f"{key}: given twice; keep one")
        given.add(key)
        _override(source, root, override, above)


def _override(source: _Source, root: dict[str, Any], override: str, above: Loc) -> None:
    """Put the value of `key=value` into `root`, which stands at `above`."""
    key, equals, text = override.partition("=")
    parts = tuple(key.split("."))
    loc = (*above, *parts)
    place = _Place(f"override {_printable(override)}")
    if not equals or not all(parts):
        source.refuse((), place, "expected KEY=VALUE with a dotted key, such as train.epochs=3")
        return
    if len(loc) > MAX_DEPTH:
        source.refuse((), place, f"a key of {len(loc)} parts; {MAX_DEPTH} is the most")
        return
    mapping = root
    for depth, part in enumerate(parts[:-1], start=len(above) + 1):
        inner = mapping.get(part)
        if inner is None:
            inner = mapping[part] = {}
            source.places[loc[:depth]] = place
            source.refused.discard(loc[:depth])
        if not isinstance(inner, dict):
            whole = _key(loc[:depth])
            source.refuse((), place, f"{whole} is {_found(inner)} and has no keys; replace it whole: {whole}=…")
            return
        mapping = inner
    for known in [known for known in source.places if known[: len(loc)] == loc]:
        del source.places[known]
    source.refused = {wrong for wrong in source.refused if wrong[: len(loc)] != loc}
    source.places[loc] = place
    mapping[parts[-1]] = source.read(text, loc, override)
    if source.fatal:
        source.refused.add(loc)
        source.fatal = False


def _word_validation(source: _Source, error: ValidationError) -> None:
    """Note pydantic's errors in our words, at the places of their keys."""
    alternatives: dict[Loc, list[str]] = {}  # the branches of a union report one error each: one error for all
    found: dict[Loc, Any] = {}
    for item in error.errors():
        loc = item["loc"]
        known = _longest_known(source.places, loc)
        if any(known[:length] in source.refused for length in range(1, len(known) + 1)):
            continue
        place = source.places.get(known, _Place(source.name))
        if item["type"] == "missing":
            source.refuse((), place, f"{_key(loc)}: this key is required and missing; add it")
        elif item["type"] == "extra_forbidden":
            source.refuse((), place, f"{_key(loc)}: {_unknown(loc)}")
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
            # Such a message begins with the key it is about: point at that key's line.
            named = re.match(r"[\w.]*", message)
            place = source.places.get((*loc, *(named[0] if named else "").split(".")), place)
            source.refuse((), place, f"{_key(loc)}: {message}" if loc else message)
        else:
            alternatives.setdefault(known, []).append(_expected(item["type"], item.get("ctx", {}), item["msg"]))
            found[known] = item["input"]
            if loc[-1] == "[key]":
                found[known] = known[-1]
    for known, expected in alternatives.items():
        nearest = ""
        choices = _choices(known)
        if isinstance(found[known], str) and choices:
            nearest = _did_you_mean(found[known], choices)
        words = f"{_key(known)}: expected {' or '.join(dict.fromkeys(expected))}, found {_found(found[known])}{nearest}"
        source.refuse((), source.places.get(known, _Place(source.name)), words)


def _longest_known(places: Mapping[Loc, _Place], loc: Loc) -> Loc:
    # pydantic adds the names of union branches, and `[key]`, to the way of a value.
    while loc and loc not in places:
        loc = loc[:-1]
    return loc


def _expected(kind: str, limits: Mapping[str, Any], message: str) -> str:
    """What pydantic expected, in words."""
    return _EXPECTED.get(kind, "something else ({message})").format(**limits, message=message)


def _found(value: Any) -> str:
    """What stands in the spec, in words; never longer than a line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping of keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"the text {value[:60]!a}" if isinstance(value, str) else str(value)


def _printable(text: str) -> str:
    """`text` on one line of moderate length, whatever it holds."""
    short = text if len(text) <= 100 else f"{text[:99]}…"
    return short if short.isprintable() else ascii(short)


def _key(loc: Loc) -> str:
    """`data.fields.genres`, `prune.budgets[2]`; the whole spec has no key."""
    words = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    return _printable(words) or "top level"


def _unknown(loc: Loc) -> str:
    """Words for the key at `loc` that no section has, with the nearest one that there is."""
    name, section = str(loc[-1]), _section(loc[:-1])
    keys = list(section.model_fields) if section is not None else []
    everywhere = _all_keys(Spec)
    elsewhere = [key for key in everywhere if key.rpartition(".")[2] == name]
    if name in everywhere and "." in name:
        nearest = "; dotted keys are for overrides: in a file, indent the last part below the others"
    elif elsewhere:
        nearest = f"; did you mean {' or '.join(elsewhere)}?"
    else:
        nearest = _did_you_mean(name, keys)
    return f"unknown key; expected one of {', '.join(keys)}{nearest}"


def _did_you_mean(name: str, choices: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name[:100], choices, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _annotation(loc: Loc) -> Any:
    """The type of the value at `loc`, without `| None`; None where the spec has no such place."""
    annotation: Any = Spec
    for part in loc:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            info = annotation.model_fields.get(str(part))
            annotation = None if info is None else info.annotation
        elif get_origin(annotation) in (dict, list):
            annotation = get_args(annotation)[-1]
        else:
            return None
        if get_origin(annotation) in (Union, types.UnionType):
            branches = [branch for branch in get_args(annotation) if branch is not types.NoneType]
            annotation = branches[0] if len(branches) == 1 else annotation
    return annotation


def _section(loc: Loc) -> type[BaseModel] | None:
    annotation = _annotation(loc)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _choices(loc: Loc) -> list[str]:
    """The texts of which the value at `loc` must be one; empty where it is no choice."""
    return [choice for choice in get_args(_annotation(loc)) if isinstance(choice, str)]


@functools.cache
def _all_keys(section: type[BaseModel], above: Loc = ()) -> tuple[str, ...]:
    """Dotted keys of a section and the sections inside it."""
    keys: list[str] = []
    for name in section.model_fields:
        keys.append(_key((*above, name)))
        inner = _section((*above, name))
        if inner is not None:
            keys += _all_keys(inner, (*above, name))
    return tuple(keys)
