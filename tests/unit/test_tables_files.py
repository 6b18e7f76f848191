"""The files of compact tables: what is written, and that nothing but exactly that is read."""

import hashlib
import json
import mmap
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import thresher
from thresher.tables import Writer, load, safetensors_file, strict_json
from thresher.tables.format import pack_masks, record_bytes, rows_by_kept
from thresher.tables.index import index_of
from thresher.tables.safetensors_file import TensorSpec

SPEC = "0123456789abcdef" * 4
ROWS, DIM = 40, 11


def write(folder, *, share=0.1, dtype="fp32"):
    """A small folder with a file of each sort; its table `t` has an unused bit in each mask."""
    rng = np.random.default_rng(0)
    values_ND = rng.standard_normal((ROWS, DIM)).astype(np.float32)
    mask_ND = rng.random((ROWS, DIM)) < share
    mask_ND[0, 0] = True  # of unknown keys: else keys of empty rows would leave the vocabularies
    writer = Writer(folder, model="fm", seed=3, budget=0.1, spec_fingerprint=SPEC)
    by_kept = rows_by_kept(pack_masks(mask_ND), DIM)
    with writer.table("t", dim=DIM, rows_by_kept=by_kept, dtype=dtype) as table:
        table.write(values_ND, mask_ND)
    with writer.table("b", dim=DIM, rows_by_kept=by_kept, dtype=dtype, layout="bucketed", renumber=True) as table:
        table.write(values_ND, mask_ND)
    with writer.table("d", dim=2, rows_by_kept=[0, 0, 3], dtype=dtype) as table:
        table.write(values_ND[:3, :2].copy())
    writer.field("words", table="t", kind="categorical", encoding="vocabulary", keys=["b", "äh", "a"])
    writer.field("known", table="b", kind="categorical", encoding="vocabulary", keys=np.arange(1, ROWS))
    writer.field("counts", table="d", kind="numeric", encoding="log_bucket", keys=np.array([3, 1]))
    writer.field("tags", table="t", kind="multi", encoding="hash", pooling="sum")
    writer.dense({"bias": np.ones(2, np.float32)})
    writer.finish()
    return values_ND, mask_ND


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "tables")
    return tmp_path / "tables"


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_declared_bytes_and_hashes_are_those_on_disk(folder):
    tables = load(folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert tables.total_bytes == manifest["total_bytes"] == sum(path.stat().st_size for path in files_of(folder))
    assert manifest["manifest_bytes"] == (folder / "manifest.json").stat().st_size
    assert tables.table_bytes == sum(path.stat().st_size for path in files_of(folder / "tables"))
    assert manifest["vocabulary_bytes"] == sum(path.stat().st_size for path in files_of(folder / "vocabulary"))
    listed = {file.path: file for file in tables.manifest.files()}
    assert listed.keys() | {"manifest.json"} == {str(path.relative_to(folder)) for path in files_of(folder)}
    for path, file in listed.items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == file.sha256


def test_the_manifest_counts_itself_at_every_length(tmp_path):
    for size in range(60):  # somewhere on the way the number of bytes gets another digit
        writer = Writer(tmp_path / str(size), model="m" * (size + 1), seed=0, budget=None, spec_fingerprint=SPEC)
        for table in range(2):
            with writer.table(f"t{table}", dim=1, rows_by_kept=[1, 0], dtype="fp16") as out:
                out.write(np.zeros((1, 1), np.float32), np.zeros((1, 1), bool))
        writer.field("a", table="t0", kind="categorical", encoding="hash")
        writer.finish()
        assert load(tmp_path / str(size)).total_bytes == sum(p.stat().st_size for p in files_of(tmp_path / str(size)))


def test_the_same_content_gives_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    for path in files_of(tmp_path / "a"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_the_safetensors_library_reads_every_file(tmp_path, share, dtype):
    values_ND, mask_ND = write(tmp_path, share=share, dtype=dtype)
    stored = {"fp32": np.float32, "fp16": np.float16}[dtype]
    table = load_file(tmp_path / "tables" / "t.safetensors")
    if share == 1.0:
        np.testing.assert_array_equal(table["values"], values_ND.astype(stored))
    else:
        present_N = mask_ND.any(axis=1)
        np.testing.assert_array_equal(table["present"], np.packbits(np.pad(present_N, (0, 24)), bitorder="little"))
        values = values_ND[mask_ND].astype(stored).tobytes()
        assert table["records"].tobytes() == pack_masks(mask_ND[present_N]).tobytes() + values + bytes(64)
        bucketed, expected = load_file(tmp_path / "tables" / "b.safetensors"), b""
        counts_N = mask_ND.sum(axis=1)
        assert bucketed["bucket_rows"].tolist() == np.bincount(counts_N, minlength=DIM + 1).tolist()
        for row in sorted(range(ROWS), key=lambda row: counts_N[row]):
            record = index_of(DIM, int(counts_N[row])).encode(mask_ND[row : row + 1]).tobytes()
            expected += record + values_ND[row][mask_ND[row]].astype(stored).tobytes()
            assert len(record) + counts_N[row] * stored().nbytes == record_bytes(dtype, DIM, int(counts_N[row]))
        assert bucketed["records"].tobytes() == expected + bytes(64)
    words = load_file(tmp_path / "vocabulary" / "words.safetensors")
    assert bytes(words["bytes"]) == "abäh".encode()
    assert (words["starts"].tolist(), words["rows"].tolist()) == ([0, 1, 2, 5], [3, 1, 2])
    counts = load_file(tmp_path / "vocabulary" / "counts.safetensors")
    assert (counts["keys"].tolist(), counts["rows"].tolist()) == ([1, 3], [2, 1])
    assert load_file(tmp_path / "dense.safetensors")["bias"].tolist() == [1, 1]


def test_tensors_are_aligned():
    specs = [TensorSpec(name, np.dtype(kind), (3,)) for name, kind in [("a", "u1"), ("bb", "<f4"), ("c", "<i8")]]
    start, offsets = safetensors_file.header(specs)
    assert len(start) % 8 == 0
    assert all(offsets[spec.name] % spec.dtype.itemsize == 0 for spec in specs)


# Damage


def test_every_flipped_byte_is_found_and_its_file_named(folder):
    for path in files_of(folder):
        whole = path.read_bytes()
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.name):
                load(folder)
        path.write_bytes(whole)
    load(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_every_truncation_is_found_and_its_file_named(folder, verify):
    for path in files_of(folder):
        whole = path.read_bytes()
        for size in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=path.name):
                load(folder, verify=verify)
        path.write_bytes(whole + b"\0")
        with pytest.raises(ValueError, match=path.name):
            load(folder, verify=verify)
        path.unlink()
        with pytest.raises(ValueError, match=f"{path.name}: cannot be opened: No such file"):
            load(folder, verify=verify)
        path.write_bytes(whole)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_unverified_damage_is_an_error_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        write(folder)
    path = data.draw(st.sampled_from(files_of(folder)))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        tables = load(folder, verify=False)
        for name, field in tables.fields.items():
            ids = np.arange(tables.tables[field.table].rows)
            assert np.isfinite(tables.embed({name: (ids, [0, len(ids)]) if field.kind == "multi" else ids})[name]).all()
            tables.rows(name, [1, 2, 3] if field.kind == "numeric" else ["a", "b", "zz"])
    except ValueError:
        pass
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["tables/t.safetensors", "manifest.json", "tables", "vocabulary"])
def test_links_are_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "moved")
    (folder / name).symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"{Path(name).name}: (cannot be opened|is a link)"):
        load(folder)


def test_what_is_no_regular_file_is_refused(folder):
    (folder / "dense.safetensors").unlink()
    os.mkfifo(folder / "dense.safetensors")  # opening one could wait for ever
    with pytest.raises(ValueError, match=r"dense\.safetensors: not a regular file"):
        load(folder)
    with pytest.raises(ValueError, match=r"manifest\.json: cannot be opened"):
        load(folder / "nothing")


# Crafted manifests


def at(value, path):
    for step in path[:-1]:
        value = value[step]
    return value, path[-1]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 1, "format 1: this reader knows format 2"),
        (["format"], "1", "format: must be a whole number"),
        (["format"], True, "format: must be a whole number"),
        (["model"], "a\nb", "model: must be a printable string"),
        (["model"], "x" * 201, "model: must be"),
        (["seed"], -1, "seed: must be"),
        (["seed"], 1.0, "seed: must be"),
        (["budget"], 0, "budget: must be"),
        (["budget"], "0.1", "budget: must be"),
        (["spec_fingerprint"], "0" * 63, "spec_fingerprint: must be 64"),
        (["vocabulary_bytes"], 1, "vocabulary_bytes: says 1, counted"),
        (["table_bytes"], 2**70, "table_bytes: must be"),
        (["manifest_bytes"], 5, "manifest_bytes: says 5"),
        (["manifest_sha256"], "X" * 64, "manifest_sha256: must be 64"),
        (["extra"], 1, "top level: unknown member 'extra'"),
        (["tables"], {}, "tables: must be a list"),
        (["fields"], [], "fields: must be a list with at least one"),
        (["tables", 0], [], r"tables\[0\]: must be an object"),
        (["tables", 0, "name"], "../t", r"tables\[0\].name: must be a letter"),
        (["tables", 0, "name"], "/etc/passwd", "must be a letter"),
        (["tables", 0, "name"], "t\u0000", "must be a letter"),
        (["tables", 0, "name"], "a" * 64, "must be a letter"),
        (["tables", 0, "name"], "d", r"tables\[0\].file.path: must be 'tables/d.safetensors'"),
        (["tables", 0, "file", "path"], "tables/../../x", r"tables\[0\].file.path: must be 'tables/t.safetensors'"),
        (["tables", 0, "file", "path"], 7, "file.path: must be"),
        (["tables", 0, "file", "bytes"], 0, r"tables\[0\].file.bytes: must be"),
        (["tables", 0, "file", "sha256"], "", "file.sha256: must be"),
        (["tables", 0, "rows"], 0, r"tables\[0\].rows: must be"),
        (["tables", 0, "rows"], 2**32, r"tables\[0\].rows: must be"),
        (["tables", 0, "rows"], 41.0, r"tables\[0\].rows: must be"),
        (["tables", 0, "dim"], 0, r"tables\[0\].dim: must be a whole number from 1 to 1024"),
        (["tables", 0, "dim"], 1025, r"tables\[0\].dim: must be"),
        (["tables", 0, "kept"], ROWS * DIM + 1, r"tables\[0\].kept: must be"),
        (["tables", 0, "kept"], -1, r"tables\[0\].kept: must be"),
        (["tables", 0, "layout"], "csr", r"tables\[0\].layout: must be one of dense, bucketed, bitmap"),
        (["tables", 0, "dtype"], "fp64", r"tables\[0\].dtype: must be one of fp32, fp16"),
        (["fields", 0, "name"], "words/", r"fields\[0\].name: must be"),
        (["fields", 0, "table"], "none", r"fields\[0\].table: must be one of t, b, d"),
        (["fields", 0, "table"], [], r"fields\[0\].table: must be one of t, b, d"),
        (["fields", 0, "kind"], "list", r"fields\[0\].kind: must be one of"),
        (["fields", 0, "pooling"], "max", r"fields\[0\].pooling: must be one of"),
        (["fields", 0, "encoding"], "md5", r"fields\[0\].encoding: must be one of"),
        (["fields", 0, "oov_row"], ROWS, r"fields\[0\].oov_row: must be a whole number from 0 to 39"),
        (["fields", 0, "oov_row"], None, r"fields\[0\]: encoding vocabulary needs"),
        (["fields", 0, "vocabulary"], None, r"fields\[0\]: encoding vocabulary needs"),
        (["fields", 0, "vocabulary", "form"], "pickle", "vocabulary.form: must be one of"),
        (["fields", 0, "vocabulary", "keys"], ROWS, "vocabulary.keys: must be"),
        (["fields", 0, "definition"], "md5", r"fields\[0\].definition: must be None"),
        (["fields", 2, "definition"], "other", r"fields\[2\].definition: must be floor_ln_squared"),
        (["fields", 3, "definition"], None, r"fields\[3\].definition: must be fnv1a64_mix64"),
        (["fields", 3, "oov_row"], 0, r"fields\[3\]: encoding hash has no"),
        (["fields", 3, "encoding"], "id", r"fields\[3\].definition: must be None for encoding id"),
        (["dense", "path"], "../dense.safetensors", "dense.path: must be"),
        (["dense"], None, "dense: must be an object"),
    ],
)
def test_crafted_manifests_are_refused(folder, path, value, message):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_bytes())
    member, key = at(manifest, path)
    member[key] = value
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{message}"):
        load(folder, verify=False)


@pytest.mark.parametrize("path", [["seed"], ["tables", 0, "rows"], ["fields", 1, "table"], ["dense", "bytes"]])
def test_missing_members_are_refused(folder, path):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_bytes())
    member, key = at(manifest, path)
    del member[key]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{key} is missing"):
        load(folder, verify=False)


@pytest.mark.parametrize("names", [("tables", "b"), ("fields", "known")])
def test_repeated_entries_are_refused(folder, names):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_bytes())
    kind, name = names
    manifest[kind].append(manifest[kind][1])
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{kind}: '{name}' stands there twice"):
        load(folder, verify=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"[]", "top level: must be an object"),
        (b"\xff{}", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"format": 1, "format": 1}', "the key 'format' stands there twice"),
        (b'{"format": 1, "seed": NaN}', "NaN is not JSON"),
        (b'{"format": 1, "seed": -Infinity}', "-Infinity is not JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b"1" * 10_000, "not valid JSON"),
        (b" " * (16 * 2**20 + 1), "at most 16777216 are read"),
    ],
)
def test_what_is_no_manifest_is_refused(folder, data, message):
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(ValueError, match=rf"manifest\.json: .*{message}"):
        load(folder, verify=False)


# Crafted data, in files of the declared size


def craft(folder, name, change):
    """Let `change` alter the tensors of a file, which then has the same header and other data."""
    path = folder / name
    arrays = {key: array.copy() for key, array in load_file(path).items()}
    change(arrays)
    size = path.stat().st_size
    safetensors_file.write(path, arrays)
    assert path.stat().st_size == size


def set_value(value):
    def change(arrays):
        arrays["values"].reshape(-1)[-1] = value

    return change


def set_item(name, place, value):
    def change(arrays):
        arrays[name][place] = value

    return change


def at_row(row, place, *values):
    """Sets bytes, of which the last is at `place`, in the first record of table `b` that keeps so many columns."""

    def change(arrays):
        counts, begin = arrays["bucket_rows"].tolist(), 0
        for kept, count in enumerate(counts):
            if kept == row:
                for back, value in enumerate(values):
                    arrays["records"][begin + place - back] = value
            begin += count * (record_bytes("fp32", DIM, kept) if kept else 0)

    return change


def swap(arrays):
    arrays["bucket_rows"][[0, 1]] = arrays["bucket_rows"][[1, 0]]


def move_row(arrays):
    arrays["bucket_rows"][[0, 2]] += np.array([1, 1], np.uint32)
    arrays["bucket_rows"][1] -= 2


T, B = "tables/t.safetensors", "tables/b.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (T, set_item("present", 0, 0), r"table t: mask: has \d+ bits set for \d+ bytes of values"),
        (T, set_item("present", slice(None), 255), "table t: present: bits beyond row 39 are set"),
        (T, set_item("present", 5, 1), "table t: present: bits beyond row 39 are set"),
        (T, set_item("records", 0, 0), "table t: mask: a row that is present keeps nothing"),
        (T, set_item("records", 0, 255), "table t: mask: has 42 bits set for"),
        (T, set_item("records", 1, 0x80), "table t: mask: bits beyond column 10 are set"),
        (T, set_item("records", slice(-68, -64), [0, 0, 192, 127]), "table t: values: a value near position .* finite"),
        (T, set_item("records", -1, 1), "table t: records: must end with 64 bytes of 0"),
        (B, set_item("records", -1, 1), "table b: records: must end with 64 bytes of 0"),
        (B, set_item("bucket_rows", 0, 2**32 - 1), r"table b: bucket_rows: are \d+ rows, the manifest says 40"),
        (B, swap, r"table b: bucket_rows: keep \d+ parameters, the manifest says 35"),
        (B, move_row, r"table b: has tensors .* layout bucketed must have"),
        (B, at_row(1, 0, 12), "table b: records: bucket of 1: the columns of a list must rise and be below 11"),
        (B, at_row(1, 0, 16), "table b: records: bucket of 1: bits after a list are set"),
        (B, at_row(2, 0, 0x11), "table b: records: bucket of 2: the columns of a list must rise and be below 11"),
        (B, at_row(3, 0, 0xFF), "table b: records: bucket of 3: a mask does not have 3 bits set"),
        (B, at_row(3, 1, 0x80), "table b: records: bucket of 3: bits beyond column 10 are set"),
        (B, at_row(1, 4, 127, 128), "table b: values: a value near position 0 is not finite"),
        ("tables/d.safetensors", set_value(np.inf), "table d: values: a value near"),
        ("dense.safetensors", set_item("bias", 0, -np.inf), "bias: a value near"),
        ("vocabulary/words.safetensors", set_item("rows", 0, 40), "field words: rows: must be below 40, found 40"),
        ("vocabulary/words.safetensors", set_item("starts", 0, 1), "field words: starts: must rise"),
        ("vocabulary/words.safetensors", set_item("starts", 1, 3), "field words: starts: must rise"),
        ("vocabulary/words.safetensors", set_item("starts", 3, 4), "field words: starts: must rise"),
        ("vocabulary/counts.safetensors", set_item("keys", 0, 3), "field counts: keys: must rise"),
    ],
)
def test_crafted_tensors_are_refused(folder, name, change, message):
    craft(folder, name, change)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        load(folder, verify=False)


@pytest.mark.parametrize("layout", ["dense", "bitmap", "bucketed"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e38])
def test_crafted_scales_are_refused(tmp_path, layout, value):
    writer = Writer(tmp_path, model="fm", seed=0, budget=0.5, spec_fingerprint=SPEC)
    with writer.table("t", dim=3, rows_by_kept=[0, 0, 9, 0], dtype="int8", layout=layout, renumber=True) as table:
        table.write(np.ones((9, 3), np.float32), np.array([[True, False, True]] * 9))
    writer.field("t", table="t", kind="categorical", encoding="vocabulary", keys=np.arange(8))
    writer.finish()
    load(tmp_path)
    craft(tmp_path, T, lambda arrays: arrays["scales"].reshape(-1).__setitem__(-1, value))
    with pytest.raises(ValueError, match=f"{T}: table t: scales: must be finite, from 0 to 2"):
        load(tmp_path, verify=False)


def test_more_values_than_declared_are_refused_in_a_dense_table(tmp_path):
    writer = Writer(tmp_path, model="fm", seed=0, budget=0.5, spec_fingerprint=SPEC)
    with writer.table("d", dim=3, rows_by_kept=[0, 0, 1, 0], dtype="fp32", layout="dense") as table:
        table.write(np.ones((1, 3), np.float32), np.array([[True, False, True]]))
    writer.field("d", table="d", kind="categorical", encoding="hash")
    writer.finish()
    assert load(tmp_path).embed({"d": [0]})["d"].tolist() == [[1, 0, 1]]
    craft(tmp_path, "tables/d.safetensors", set_item("values", (0, 1), 1))
    with pytest.raises(ValueError, match="table d: values: 3 are not 0, but the manifest says that 2"):
        load(tmp_path, verify=False)


def retype(name, dtype):
    def change(arrays):
        arrays[name] = arrays[name].view(dtype)

    return change


def rename(arrays):
    arrays["marks"] = arrays.pop("present")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tables/t.safetensors", retype("present", np.int8), "has tensors .* layout bitmap must have"),
        ("tables/t.safetensors", rename, "has tensors .* layout bitmap must have"),
        ("vocabulary/counts.safetensors", retype("keys", np.uint64), "field counts: keys: type uint64"),
        ("vocabulary/words.safetensors", retype("rows", bool), "field words: rows: type bool"),
        ("vocabulary/words.safetensors", lambda arrays: arrays.pop("rows"), "field words: has tensors"),
    ],
)
def test_other_tensors_than_the_layout_has_are_refused(folder, name, change, message):
    path = folder / name
    arrays = {key: array.copy() for key, array in load_file(path).items()}
    change(arrays)
    safetensors_file.write(path, arrays)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    entries = [*manifest["tables"], *(field["vocabulary"] for field in manifest["fields"] if field["vocabulary"])]
    file = next(entry["file"] for entry in entries if entry["file"]["path"] == name)
    grown = path.stat().st_size - file["bytes"]
    file["bytes"] += grown
    manifest["table_bytes" if name.startswith("tables") else "vocabulary_bytes"] += grown
    manifest["manifest_bytes"] = manifest["total_bytes"] = 0
    fixed_size(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        load(folder, verify=False)


def fixed_size(manifest):
    for _ in range(4):
        manifest["manifest_bytes"] = len(json.dumps(manifest))
        manifest["total_bytes"] = sum(
            manifest[f"{part}_bytes"] for part in ("table", "vocabulary", "dense", "manifest")
        )


def parsed(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with path.open("rb") as file:
        return safetensors_file.parse(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), "x.safetensors")


def file_with(header: str, data: bytes = b"\0" * 8) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def tensor(shape, begin, end, dtype="U8"):
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\1", "header of 1 bytes in a file of 1 bytes"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "header of 18446744073709551615 bytes"),
        ((16 * 2**20 + 8).to_bytes(8, "little") + b" " * 17 * 2**20, "header of 16777224 bytes"),
        (file_with("[]"), "not a JSON object"),
        (file_with("{}"), "8 bytes after the last tensor"),
        (file_with('{"a":1}'), "tensor 'a': must have dtype"),
        (file_with('{"__metadata__":{}}'), "tensor '__metadata__': must have"),
        (file_with(f'{{"a":{tensor([8], 0, 8)},"a":{tensor([8], 0, 8)}}}'), "the key 'a' stands there twice"),
        (file_with(f'{{"a":{tensor([8], 0, 8, "BF16")}}}'), "tensor 'a': unknown dtype 'BF16'"),
        (file_with('{"a":{"dtype":[],"shape":[8],"data_offsets":[0,8]}}'), "unknown dtype"),
        (file_with(f'{{"a":{tensor([9], 0, 9)}}}'), "do not hold U8"),
        (file_with(f'{{"a":{tensor([7], 0, 8)}}}'), "do not hold U8"),
        (file_with(f'{{"a":{tensor([8], 8, 0)}}}'), "do not hold U8"),
        (file_with(f'{{"a":{tensor([-8], 0, 8)}}}'), "shape must be"),
        (file_with(f'{{"a":{tensor([8.0], 0, 8)}}}'), "shape must be"),
        (file_with(f'{{"a":{tensor([0, 2**48, 2**48], 0, 0)}}}'), "shape must be"),
        (file_with(f'{{"a":{tensor([1] * 9, 0, 1)}}}'), "shape must be"),
        (file_with(f'{{"a":{tensor([8], 0, "8.0")}}}'), "data_offsets must be"),
        (file_with(f'{{"a":{tensor([4], 0, 4)},"b":{tensor([4], 3, 7)}}}'), "overlap or leave a gap at byte 4"),
        (file_with(f'{{"a":{tensor([4], 0, 4)},"b":{tensor([3], 5, 8)}}}'), "overlap or leave a gap at byte 4"),
    ],
)
def test_crafted_headers_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}"):
        parsed(tmp_path, data)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=20))
def test_any_bytes_are_parsed_or_refused(tmp_path_factory, text, data):
    try:
        parsed(tmp_path_factory.getbasetemp(), len(text).to_bytes(8, "little") + text + data)
        strict_json.loads(text, "x")
    except ValueError:
        pass


# The writer


def one(value):
    return np.full((1, DIM), value, np.float32)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "table 't': got 0 rows with 0 kept, declared were 2 with 22"),
        ([(one(1), None)], "got 1 rows with 11 kept, declared were 2 with 22"),
        ([(one(1), None), (one(1), np.zeros((1, DIM), bool))], "got 2 rows with 11 kept"),
        ([(one(1), None)] * 3, "got 3 rows with 33 kept"),
        ([(one(1)[:, 1:], None)], "got float32 values"),
        ([(one(1)[0], None)], "got float32 values"),
        ([(one(1).astype(np.float64), None)], "got float64 values"),
        ([(one(1), np.ones((1, 2), bool))], "got a bool mask"),
        ([(one(1), np.ones((1, DIM), np.uint8))], "got a uint8 mask"),
        ([(one(1), None), (one(np.nan), None)], "row 1, column 0: nan is not finite in fp16"),
        ([(one(7e4), None)], "row 0, column 0: 70000.0 is not finite in fp16"),
    ],
)
def test_rows_that_are_not_as_declared_are_refused(tmp_path, chunks, message):
    writer = Writer(tmp_path, model="fm", seed=0, budget=None, spec_fingerprint=SPEC)

    def run():
        with writer.table("t", dim=DIM, rows_by_kept=[0] * DIM + [2], dtype="fp16") as table:
            for values_ND, mask_ND in chunks:
                table.write(values_ND, mask_ND)

    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run()
    writer.field("t", table="t", kind="categorical", encoding="hash")
    with pytest.raises(ValueError, match=r"t\.safetensors: was not written to its end"):
        writer.finish()


def test_what_does_not_fit_the_format_is_refused(tmp_path):
    options = {"model": "fm", "seed": 0, "budget": None, "spec_fingerprint": SPEC}
    size = {"dim": 2, "rows_by_kept": [0, 3, 0], "dtype": "fp32"}
    with pytest.raises(ValueError, match="spec_fingerprint"):
        Writer(tmp_path / "a", **options | {"spec_fingerprint": "x"})
    writer = Writer(tmp_path / "b", **options)
    for change in ({"dim": 1025}, {"rows_by_kept": [0, -1, 9]}, {"dtype": "int2"}, {"rows_by_kept": [0, 1.0, 0]}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}: must be"):
            writer.table("t", **size | change)
    with pytest.raises(ValueError, match="rows: must be a whole number from 1"):
        writer.table("t", **size | {"rows_by_kept": [0, 0, 0]})
    with pytest.raises(ValueError, match="rows_by_kept: has 2 counts, must be 3, of 0 to 2 columns"):
        writer.table("t", **size | {"rows_by_kept": [0, 3]})
    with pytest.raises(ValueError, match="name: must be"):
        writer.table("../t", **size)
    with writer.table("t", **size) as table:
        table.write(
            np.ones((3, 2), np.float32), np.eye(3, 2, dtype=bool) | (np.arange(3) == 2)[:, None] & [True, False]
        )
    with pytest.raises(ValueError, match="'t' is written twice"):
        writer.table("t", **size)
    field = {"table": "t", "kind": "categorical", "encoding": "vocabulary"}
    with pytest.raises(ValueError, match="encoding vocabulary needs a vocabulary"):
        writer.field("f", **field)
    with pytest.raises(ValueError, match="keys: must be a whole number from 0 to 2"):
        writer.field("f", **field, keys=["a", "b", "c"])
    with pytest.raises(ValueError, match="key 'a' stands in the vocabulary twice"):
        writer.field("f", **field, keys=["a", "a"])
    with pytest.raises(ValueError, match="key 5 stands in the vocabulary twice"):
        writer.field("f", **field, keys=np.array([5, 5]))
    with pytest.raises(ValueError, match="half a surrogate pair"):
        writer.field("f", **field, keys=["\ud800"])
    with pytest.raises(ValueError, match="has strings as keys, got 5"):
        writer.field("f", **field, keys=[5])
    with pytest.raises(ValueError, match="one int64 array, not float64"):
        writer.field("f", **field, keys=np.array([5.0]))
    with pytest.raises(ValueError, match="table: must be one of t"):
        writer.field("f", **field | {"table": "u"}, keys=[])
    with pytest.raises(ValueError, match="fields: must be a list with at least one"):
        writer.finish()
    writer.field("f", **field, keys=[])
    with pytest.raises(ValueError, match="field 'f' is described twice"):
        writer.field("f", **field, keys=[])
    writer.dense({"w": np.array([np.nan])})
    with pytest.raises(ValueError, match=r"dense\.safetensors: w: a value near"):
        writer.finish()
    writer.dense({"w": np.array([1j])})
    with pytest.raises(ValueError, match="tensor 'w': type complex128 cannot be stored"):
        writer.finish()
    assert not (tmp_path / "b" / "manifest.json").exists()
    with pytest.raises(ValueError, match="already; tables are written into an empty folder"):
        Writer(tmp_path / "b", **options)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_memory_of_writing_and_loading_is_bounded(tmp_path, share):
    rows, dim, chunk = 200_000, 16, 1000
    rng = np.random.default_rng(0)
    values_ND = rng.standard_normal((chunk, dim)).astype(np.float32)
    mask_ND = rng.random((chunk, dim)) < share
    writer = Writer(tmp_path, model="fm", seed=0, budget=None, spec_fingerprint=SPEC)
    tracemalloc.start()
    try:
        by_kept = [count * (rows // chunk) for count in rows_by_kept(pack_masks(mask_ND), dim)]
        with writer.table("t", dim=dim, rows_by_kept=by_kept, dtype="fp32") as table:
            for _ in range(rows // chunk):
                table.write(values_ND, mask_ND)
        writer.field("t", table="t", kind="categorical", encoding="hash")
        writer.finish()
        written_bytes = tracemalloc.get_traced_memory()[1]
        del writer, table  # they hold a bit of every row
        tracemalloc.reset_peak()
        tables = load(tmp_path)
        held_bytes, load_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert written_bytes < 10 * values_ND.nbytes + 2 * rows  # the whole table has 200 chunks
    assert held_bytes < 2.2 * rows + 100_000
    assert load_bytes < held_bytes + 4_000_000  # and 1 MB a column of pieces that are checked together
    assert tables.tables["t"].layout == ("bitmap" if share < 1 else "dense")


# The reader's imports

LOAD = """
import sys
import numpy as np
from thresher.tables import load
tables = load(sys.argv[1])
tables.embed({"words": tables.rows("words", ["a"]), "tags": [tables.rows("tags", ["a", "b"])]})
print({"torch", "torchrec", "fbgemm_gpu", "pyarrow", "pydantic", "safetensors"} & sys.modules.keys())
"""


def test_tables_are_read_on_numpy_alone(folder):
    root = Path(thresher.__path__[0]).parent
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOAD, str(folder)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "set()\n", "")
