"""Graphs and manifests that anyone may have written: what does not fit the tables is refused with a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.serve.models import COLUMNS, write_export
from thresher.rundir import file_sha256
from thresher.tables import load, manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_export(tmp_path / "export")


def write_graph(folder: Path, graph: bytes) -> None:
    """Replace the graph, its hash too."""
    path = folder / "dense.onnx"
    entries = load(folder).manifest
    assert entries.onnx is not None
    path.write_bytes(graph)
    own = replace(entries.onnx, bytes=len(graph), sha256=file_sha256(path))
    (folder / "manifest.json").write_bytes(manifest.to_bytes(replace(entries, onnx=own)))


def test_a_changed_graph_is_found_when_tables_are_loaded(folder: Path) -> None:
    data = bytearray((folder / "dense.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "dense.onnx").write_bytes(data)
    with pytest.raises(ValueError, match=r"dense\.onnx: does not have the SHA-256 of the manifest"):
        load(folder)
    (folder / "dense.onnx").write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"dense\.onnx: has \d+ bytes, the manifest says"):
        load(folder, verify=False)
    (folder / "dense.onnx").unlink()
    (folder / "dense.onnx").symlink_to(folder / "golden.json")
    with pytest.raises(ValueError, match=r"dense\.onnx: cannot be opened"):
        load(folder)


def test_what_is_no_graph_is_refused_by_name(folder: Path) -> None:
    write_graph(folder, b"not a graph")
    tables = load(folder)  # lookups need no graph
    assert tables.lookup("user", [10]).shape == (1, 4)
    with pytest.raises(ValueError, match=r"dense\.onnx: ONNX Runtime refuses it: "):
        tables.score(COLUMNS)


@pytest.mark.parametrize("change", ["input", "columns", "output"])
def test_a_graph_of_other_tables_is_refused(change: str, folder: Path) -> None:
    model = onnx.load(folder / "dense.onnx", load_external_data=False)
    if change == "input":
        for node in model.graph.node:
            node.input[:] = ["field.other" if name == "field.user" else name for name in node.input]
        model.graph.input[0].name = "field.other"
    elif change == "columns":
        for own in model.graph.input[:2]:
            own.type.tensor_type.shape.dim[1].dim_value += 1 if own.name == "field.user" else -1
    else:
        model.graph.output[0].name = model.graph.node[-1].output[0] = "other"
    write_graph(folder, model.SerializeToString())
    with pytest.raises(ValueError, match=r"dense\.onnx: has inputs .* for these tables it must have"):
        load(folder).score(COLUMNS)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/../../secret"])
def test_weights_outside_of_the_folder_are_not_read(location: str, folder: Path) -> None:
    (folder.parent / "secret").write_bytes(np.ones(100, np.float32).tobytes())
    model = onnx.load(folder / "dense.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    write_graph(folder, model.SerializeToString())
    with pytest.raises(ValueError, match=r"dense\.onnx: ONNX Runtime refuses it: "):
        load(folder).score(COLUMNS)


CHANGES: list[tuple[list[Any], Any, str]] = [
    (["onnx"], 5, "onnx: must be an object"),
    (["onnx", "path"], "../dense.onnx", "onnx.path: must be 'dense.onnx'"),
    (["numeric"], {}, "numeric: must be a list"),
    (["numeric", 0, "name"], "a/b", r"numeric\[0\].name: must be a letter"),
    (["numeric", 0, "name"], "city", "numeric: 'city' stands there twice"),
    (["numeric", 0, "column"], 5, r"numeric\[0\].column: must be a printable string"),
    (["numeric", 0, "definition"], "ln", r"numeric\[0\].definition: must be one of ln_one_plus"),
    (["numeric", 0], {"name": "age"}, r"numeric\[0\]: column is missing"),
    (["fields", 0, "column"], "", r"fields\[0\].column: must be a printable string"),
    (["fields", 0, "separator"], "|", r"fields\[0\].separator: must be null, or for kind multi one character"),
    (["fields", 2, "separator"], "||", r"fields\[2\].separator: must be null, or for kind multi one character"),
]


@pytest.mark.parametrize(("path", "value", "message"), CHANGES)
def test_crafted_members_are_refused(path: list[Any], value: Any, message: str, folder: Path) -> None:
    text = json.loads((folder / "manifest.json").read_text())
    member = text
    for key in path[:-1]:
        member = member[key]
    member[path[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=rf"manifest\.json: {message}"):
        load(folder, verify=False)


def test_tables_without_a_graph_say_so(folder: Path) -> None:
    entries = load(folder).manifest
    (folder / "manifest.json").write_bytes(manifest.to_bytes(replace(entries, onnx=None)))
    with pytest.raises(ValueError, match=r"has no dense\.onnx, so it cannot score"):
        load(folder).score(COLUMNS)
