"""The C++ lookup core gives what the NumPy reference gives, to the bit, with every set of instructions."""

import ctypes
import threading
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from thresher.tables import Writer, binding, layouts, load
from thresher.tables.format import LAYOUTS, pack_masks, rows_by_kept
from thresher.tables.index import index_of
from thresher.tables.layouts import Bags, Shape
from thresher.tables.values import STORED

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    CORE = binding.library()
pytestmark = pytest.mark.skipif(CORE is None, reason="the core is not built")


def instructions() -> Iterator[str]:
    """Lets the core use each set of instructions that the processor has."""
    best = CORE.thresher_instructions()
    for number, name in enumerate(binding.INSTRUCTIONS):
        if CORE.thresher_use(number) == number:
            yield name
    CORE.thresher_use(best)


def arrays_of(folder, layout, dtype, values_ND, mask_ND):
    """A table's arrays, copied so that a sanitizer sees where each ends, and its shape."""
    writer = Writer(folder, model="fm", seed=3, budget=0.2, spec_fingerprint="0" * 64)
    rows, dim = values_ND.shape
    by_kept = rows_by_kept(pack_masks(mask_ND), dim)
    with writer.table("t", dim=dim, rows_by_kept=by_kept, dtype=dtype, layout=layout, renumber=True) as table:
        table.write(values_ND, mask_ND)
    path = folder / "tables" / "t.safetensors"
    arrays = {name: array.copy() for name, array in load_file(path).items()}
    return arrays, Shape(layout, dtype, rows, dim, int(mask_ND.sum()))


def table_of(rows, dim, seed=0):
    rng = np.random.default_rng(seed)
    values_ND = rng.standard_normal((rows, dim)).astype(np.float32)
    mask_ND = rng.random((rows, dim)) < rng.choice([0.03, 0.1, 0.5, 0.95], rows)[:, None]
    mask_ND[rng.integers(rows)] = True
    return values_ND, mask_ND


def both(tmp_path, layout, dtype, dim, rows=150):
    arrays, shape = arrays_of(tmp_path, layout, dtype, *table_of(rows, dim, dim))
    return layouts.table_of(arrays, shape, "x"), binding.NativeTable(CORE, arrays, shape, "x")


def bags_of(rows, seed=1):
    """Bags of 0 to 200 ids, among them missing ones: some longer than what is looked up together."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(rng.choice([0, 0, 1, 2, 7, 64, 200], 150))])
    ids_L = rng.integers(-1, rows, offsets[-1])
    return ids_L, offsets, rng.standard_normal(len(ids_L)).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", STORED)
def test_core_equals_reference(tmp_path, layout, dtype):
    for dim in (1, 3, 4, 7, 8, 15, 16, 17, 24, 33, 48, 64, 65, 128, 1024):
        reference, native = both(tmp_path / str(dim), layout, dtype, dim)
        ids_L, offsets, weights_L = bags_of(150)
        ids_L[:1] = -1
        rows_LD = reference.lookup(ids_L)
        every = [
            Bags(native, ids_L, offsets, weights, mean) for mean in (False, True) for weights in (None, weights_L)
        ] + [Bags(native, ids_L[:150], None, weights_L[:150], True)]
        pooled = [layouts.pool(rows_LD[: len(bags.ids_L)], bags) for bags in every]
        for name in instructions():
            for count in (0, 1, 63, 64, 65, 200):  # around the numbers that are looked up together
                assert native.lookup(ids_L[:count]).tobytes() == rows_LD[:count].tobytes(), (name, dim, count)
            for got, expected in zip(binding.pooled(every), pooled, strict=True):
                np.testing.assert_array_equal(got, expected, err_msg=f"{name} {dim}")


def test_many_fields_at_once(tmp_path):
    rng, every, expected = np.random.default_rng(0), [], []
    for number in range(40):
        layout, dtype = LAYOUTS[number % 3], list(STORED)[number % 5]
        reference, native = both(tmp_path / str(number), layout, dtype, 1 + 7 * number)
        offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 5, 150))])
        if number % 2:
            ids_L, offsets = rng.integers(-1, 150, 150), None
        else:
            ids_L = rng.integers(-1, 150, offsets[-1])
        every.append(Bags(native, ids_L, offsets, mean=number % 4 == 0))
        expected.append(layouts.pooled(Bags(reference, ids_L, offsets, mean=number % 4 == 0)))
    for _ in instructions():
        for got, wanted in zip(binding.pooled(every), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert binding.pooled([]) == []


def test_the_first_id_outside_is_named(tmp_path):
    _, native = both(tmp_path, "bucketed", "fp16", 16)
    ids_L, offsets, _ = bags_of(150)
    binding.pooled([Bags(native, ids_L, offsets)])
    for bad in (150, -2, 2**31, 2**62, -(2**63)):
        ids_L[[77, 300]] = bad
        for _ in instructions():
            with pytest.raises(binding.OutsideError) as error:
                binding.pooled([Bags(native, ids_L % 100, offsets), Bags(native, ids_L, offsets)])
            assert (error.value.bags, error.value.position) == (1, 77)


def test_bad_offsets_are_refused(tmp_path):
    _, native = both(tmp_path, "bitmap", "fp16", 16)
    for offsets in ([0, 2, 1, 3], [1, 2, 2, 3], [0, 1, 2, 4], [0, -1, 2, 3], [0, 2**62, 2, 3]):
        with pytest.raises(ValueError, match="bags 0: offsets must rise from 0 to the number of ids"):
            binding.pooled([Bags(native, np.zeros(3, np.int64), np.array(offsets))])


def test_threads_look_up_at_once(tmp_path):
    reference, native = both(tmp_path, "bitmap", "fp16", 24, rows=3000)
    expected, wrong = reference.lookup(np.arange(3000)), []

    def run(seed):
        ids_L = np.random.default_rng(seed).integers(0, 3000, 5000)
        for _ in range(20):
            wrong.extend([seed] * (native.lookup(ids_L).tobytes() != expected[ids_L].tobytes()))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 1024), st.data())
def test_lists_hold_their_columns(dim, data):
    kept = data.draw(st.integers(1, dim))
    columns = sorted(
        data.draw(st.sets(st.integers(0, dim - 1), min_size=kept, max_size=kept)) if kept < 40 else range(kept)
    )
    mask_ND = np.zeros((1, dim), bool)
    mask_ND[0, columns] = True
    index = index_of(dim, kept)
    encoded = index.encode(mask_ND)
    assert encoded.shape == (1, index.bytes)
    assert index.decode(encoded, "x").tolist() == [columns]


def test_short_lists_fit_the_words_that_they_are_read_as():
    for dim in range(2, 65):
        for kept in range(1, dim):
            index = index_of(dim, kept)
            assert index.bytes <= -(-dim // 8)
            assert index.form != "list" or (kept <= 16 and index.bytes < 8 and index.high_bits <= 32)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(LAYOUTS), st.sampled_from(list(STORED)), st.sampled_from([3, 16, 40, 64, 130]), st.data())
def test_crafted_tables_are_refused_as_by_the_reference_or_read_alike(tmp_path_factory, layout, dtype, dim, data):
    folder = tmp_path_factory.getbasetemp() / f"{layout}{dtype}{dim}"
    if not folder.exists():
        arrays_of(folder, layout, dtype, *table_of(70, dim, 5))
    path = folder / "tables" / "t.safetensors"
    arrays = {name: array.copy() for name, array in load_file(path).items()}
    for _ in range(data.draw(st.integers(1, 4))):
        flat = arrays[data.draw(st.sampled_from(sorted(arrays)))].view(np.uint8).reshape(-1)
        flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
    _, mask_ND = table_of(70, dim, 5)
    shape = Shape(layout, dtype, 70, dim, int(mask_ND.sum()))
    found = []
    for make in (layouts.table_of, lambda *table: binding.NativeTable(CORE, *table)):
        try:
            found.append(make(arrays, shape, "x").lookup(np.arange(-1, 70)).tobytes())
        except ValueError as error:
            assert str(error).startswith("x: ")  # noqa: PT017 - one of the two may be right
            found.append(None)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": 3}, "layout 3 is unknown"),
        ({"dtype": -1}, "dtype -1 is unknown"),
        ({"rows": 0}, "rows must be 1 to 2^31 - 1, not 0"),
        ({"rows": 2**32}, "rows must be 1 to 2^31 - 1, not 4294967296"),
        ({"dim": 0}, "dim must be 1 to 1024, not 0"),
        ({"dim": 1025}, "dim must be 1 to 1024, not 1025"),
        ({"record_bytes": 63}, "records: have 63 bytes, must have 79"),
        ({"index_bytes": 4}, "bucket_rows: has 4 bytes, must have 12"),
        ({"kept": 6}, "bucket_rows: keep 7 parameters, the manifest says 6"),
        ({"layout": 1}, "present: has 12 bytes, 4 rows need 8"),
        ({"layout": 0, "record_bytes": 16}, "values: a value near row 0 is not finite"),
        ({"layout": 0}, "values: have 79 bytes, must have 16"),
        ({"scale_bytes": 4}, "scales: have 4 bytes, must have 0"),
    ],
)
def test_the_core_itself_refuses_parts_that_do_not_fit(change, message):
    """Whatever binding calls it: 4 rows of 2 columns, of which one keeps one, three keep both, as bf16."""
    records, counts = (ctypes.c_uint8 * 79)(), (ctypes.c_uint32 * 3)(0, 1, 3)
    if change.get("layout") == 0:
        records[0:2] = [0x80, 0x7F]
    parts = {
        "layout": 2, "dtype": 2, "rows": 4, "dim": 2, "kept": 7, "records": ctypes.addressof(records),
        "record_bytes": 79, "index": ctypes.addressof(counts), "index_bytes": 12, "scales": None, "scale_bytes": 0,
    }  # fmt: skip
    error = ctypes.create_string_buffer(200)
    assert not CORE.thresher_table_open(ctypes.byref(binding._Parts(**parts | change)), error, 200)
    assert message in error.value.decode()


def test_embed_takes_weights_and_missing_ids(tmp_path):
    values_ND, mask_ND = table_of(30, 6)
    writer = Writer(tmp_path, model="fm", seed=3, budget=0.2, spec_fingerprint="0" * 64)
    with writer.table("t", dim=6, rows_by_kept=rows_by_kept(pack_masks(mask_ND), 6), dtype="fp32") as table:
        table.write(values_ND, mask_ND)
    writer.field("one", table="t", kind="categorical", encoding="hash")
    writer.field("many", table="t", kind="multi", encoding="hash", pooling="mean")
    writer.finish()
    tables, kept_ND = load(tmp_path), values_ND * mask_ND
    found = tables.embed(
        {"one": [3, -1], "many": [[1, -1, 2], []]}, weights={"one": [2, 5], "many": np.array([0.5, 9, -1])}
    )
    np.testing.assert_array_equal(found["one"], [kept_ND[3] * 2, np.zeros(6)])
    bag_D = (kept_ND[1] * np.float32(0.5) + kept_ND[2] * np.float32(-1)) / np.float32(2)
    np.testing.assert_array_equal(found["many"], [bag_D, np.zeros(6)])
    for weights in ([1], [1, np.nan], [[1, 2]], ["x", 1]):
        with pytest.raises(ValueError, match="field one: weights must be one row of 2 finite numbers"):
            tables.embed({"one": [3, 4]}, weights={"one": weights})
    with pytest.raises(ValueError, match="weights of field 'many': there are no ids of it"):
        tables.embed({"one": [3, 4]}, weights={"many": []})
