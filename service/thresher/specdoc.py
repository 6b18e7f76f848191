"""The reference of spec keys as Markdown, made of the JSON Schema: docs/spec.md is its output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from thresher.spec import Spec

_HEAD = """\
# Spec reference

Made by `thresher schema --markdown > docs/spec.md`; edit `service/thresher/spec.py` instead of this file.

A spec is one YAML file. Keys that are not listed here are errors, and so are keys that stand twice, anchors, aliases,
merge keys, tags, NaN and infinities. `1e-3` is a number; only `true` and `false` are booleans; `no`, `on`, `1:30` and
dates are text. On the command line `train.epochs=3` replaces a key, with a value in YAML
(`'prune.budgets=[0.5, 0.1]'`). `thresher validate --spec FILE` lists all errors of a spec,
`thresher schema` prints its JSON Schema.
"""


def spec_markdown() -> str:
    """All keys of the spec: one table a section, in the order of the spec."""
    schema = Spec.model_json_schema()
    return "\n".join([_HEAD, *_section(schema, schema["$defs"], "")])


def _section(section: dict[str, Any], definitions: dict[str, Any], key: str) -> Iterator[str]:
    """Heading, text and table of one section, then the sections inside it."""
    yield f"## {f'`{key}`' if key else 'Top level'}\n"
    yield f"{section['description']}\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    required = section.get("required", [])
    inner: list[tuple[str, str]] = []
    for name, value in section["properties"].items():
        default = "required" if name in required else f"`{json.dumps(value['default'])}`"
        of, suffix = _inner_section(value)
        if of is not None:
            inner.append((of, f"{key}.{name}{suffix}".lstrip(".")))
            if name not in required and value["default"] is not None:
                default = "its defaults"
        cells = [f"`{name}`", _kind(value), default, value.get("description", "")]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""
    for of, inner_key in inner:
        yield from _section(definitions[of], definitions, inner_key)


def _branches(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The kinds that a value may have, without null."""
    return [branch for branch in value.get("anyOf", [value]) if branch.get("type") != "null"]


def _inner_section(value: dict[str, Any]) -> tuple[str | None, str]:
    """Name of the section that a value is, or holds one of for each name; and what follows its key."""
    for branch in _branches(value):
        if "$ref" in branch:
            return branch["$ref"].rpartition("/")[2], ""
        entries = [*branch.get("patternProperties", {}).values(), branch.get("additionalProperties")]
        for entry in entries:
            if isinstance(entry, dict) and "$ref" in entry:
                return entry["$ref"].rpartition("/")[2], ".NAME"
    return None, ""


def _kind(value: dict[str, Any]) -> str:
    """Type and range of a value, in words."""
    return " or ".join(_one_kind(branch) for branch in _branches(value))


def _one_kind(value: dict[str, Any]) -> str:
    if "$ref" in value:
        return "section"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{choice}`" for choice in value.get("enum", [value.get("const")]))
    if value["type"] == "array":
        least, most = value.get("minItems"), value.get("maxItems")
        count = f" of {least}" if least is not None and least == most else ""
        return f"list{count}: {_kind(value['items'])}"
    if value["type"] == "object":
        entries = list(value.get("patternProperties", {}).values()) or [value.get("additionalProperties")]
        return (
            "overrides for each name"
            if isinstance(entries[0], dict) and "anyOf" in entries[0]
            else "a section for each name"
        )
    words: str = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}[
        value["type"]
    ]
    if value.get("maxLength") == 1:
        words = "one character"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join(
        [words, ", ".join(f"{sign} {value[name]:,}" for name, sign in bounds.items() if name in value)]
    ).strip()
