import itertools
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_files import movielens_atomic, prepared, spec_of, stored
from thresher.data import shards
from thresher.data.loader import Loader


def write(folder, sizes, *, multi=True):
    """Prepared data whose sample number i has i everywhere: as its id, in its list, as its dense input."""
    samples = sum(sizes)
    kind = shards.id_type(max(samples, 2))
    schema = [pa.field(shards.LABEL, pa.uint8()), pa.field(shards.sparse("one"), kind)]
    schema += [pa.field(shards.sparse("many"), pa.list_(kind))] if multi else []
    schema = pa.schema([*schema, pa.field(shards.dense("x"), pa.float32())])
    (folder / "train").mkdir(parents=True)
    files, first = [], 0
    for number, size in enumerate(sizes):
        ids = list(range(first, first + size))
        columns = {"label": [i % 2 for i in ids], "sparse.one": ids, "sparse.many": [[i] * (i % 4) for i in ids]}
        table = pa.Table.from_pydict({**columns, "dense.x": ids}, schema) if multi else None
        table = table or pa.Table.from_pydict({"label": columns["label"], "sparse.one": ids, "dense.x": ids}, schema)
        with pa.ipc.new_file(folder / "train" / f"{number}.arrow", schema) as file:
            file.write_table(table)
        files.append(f"train/{number}.arrow")
        first += size
    fields = [{"name": "one", "rows": samples, "one_hot": True}]
    fields += [{"name": "many", "rows": samples, "one_hot": False}] if multi else []
    split = {"samples": samples, "files": files}
    meta = {"fields": fields, "dense": ["x"], "splits": {"train": split}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def loader(folder, batch_size, rank=0, world_size=1, seed=0, shuffle=True):
    return Loader(folder, "train", batch_size=batch_size, rank=rank, world_size=world_size, seed=seed, shuffle=shuffle)


def samples_of(batch):
    """The sample numbers of a batch, after a look at all of its parts."""
    jagged = batch.sparse.to_dict()
    lengths = jagged["one"].lengths()
    valid = batch.weights == 1
    assert lengths.tolist() == valid.int().tolist()
    ids = jagged["one"].values()
    assert ids.dtype == torch.int64
    assert torch.equal(batch.dense[valid, 0].long(), ids)
    assert torch.equal(batch.labels[valid].long(), ids % 2)
    assert not batch.labels[~valid].any()
    assert not batch.dense[~valid].any()
    if "many" in jagged:
        many = jagged["many"]
        assert torch.equal(many.lengths()[valid], ids % 4)
        assert not many.lengths()[~valid].any()
        assert torch.equal(many.values(), torch.repeat_interleave(ids, ids % 4))
    assert batch.sparse.stride() == len(batch.labels)
    assert torch.equal(batch.sparse.offsets()[1:], batch.sparse.lengths().cumsum(0))
    return ids.tolist()


def order(loader, epoch, start_step=0):
    return [samples_of(batch) for batch in loader.epoch(epoch, start_step)]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    local=st.integers(1, 9),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**31 - 1),
    shuffle=st.booleans(),
    multi=st.booleans(),
    window=st.integers(1, 4),
    data=st.data(),
)
def test_one_order_for_any_number_of_ranks_from_any_step(
    tmp_path_factory, sizes, local, epoch, seed, shuffle, multi, window, data
):
    folder = write(tmp_path_factory.mktemp("loader") / "data", sizes, multi=multi)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thresher.data.loader.WINDOW_GROUPS", window)
        batch_size = 4 * local
        one = loader(folder, batch_size, seed=seed, shuffle=shuffle)
        whole = order(one, epoch)
        assert len(whole) == one.steps_per_epoch == -(-sum(sizes) // batch_size)
        assert sorted(itertools.chain(*whole)) == list(range(sum(sizes)))  # each sample exactly once
        if not shuffle:
            assert list(itertools.chain(*whole)) == list(range(sum(sizes)))
        for world_size in (2, 4):
            ranks = [loader(folder, batch_size, r, world_size, seed, shuffle) for r in range(world_size)]
            shares = [order(of_rank, epoch) for of_rank in ranks]
            assert [list(itertools.chain(*step)) for step in zip(*shares, strict=True)] == whole
        start = data.draw(st.integers(0, one.steps_per_epoch))
        assert order(loader(folder, batch_size, seed=seed, shuffle=shuffle), epoch, start) == whole[start:]


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
    folder = write(tmp_path / "data", [50] * 4)
    orders = [tuple(itertools.chain(*order(loader(folder, 10, seed=s), e))) for s in (0, 1) for e in (0, 1, 2)]
    assert len(set(orders)) == 6


def test_the_order_does_not_change_between_versions(tmp_path):
    """A run that is resumed after an update goes on in the same order."""
    folder = write(tmp_path / "data", [4, 4])
    assert list(itertools.chain(*order(loader(folder, 4, seed=3), 1))) == [5, 4, 3, 0, 2, 6, 1, 7]


def test_the_last_step_is_padded_on_every_rank(tmp_path):
    folder = write(tmp_path / "data", [9])
    batches = [list(loader(folder, 8, rank=r, world_size=4, shuffle=False).epoch(0)) for r in range(4)]
    assert [[batch.weights.tolist() for batch in of_rank] for of_rank in batches] == [
        [[1, 1], [1, 0]], [[1, 1], [0, 0]], [[1, 1], [0, 0]], [[1, 1], [0, 0]]
    ]  # fmt: skip
    assert [[batch.count for batch in of_rank] for of_rank in batches] == [[8, 1]] * 4
    assert [batch.sparse.values().tolist() for batch in (of_rank[1] for of_rank in batches)] == [[8], [], [], []]


def test_what_one_batch_does_reaches_no_other(tmp_path):
    one = loader(write(tmp_path / "data", [8]), 4)
    first = next(one.epoch(0))
    first.labels.add_(5)
    first.weights.zero_()
    first.sparse.values().zero_()
    assert sorted(itertools.chain(*order(one, 0))) == list(range(8))


def test_a_window_is_read_once_while_it_serves(tmp_path, monkeypatch):
    monkeypatch.setattr("thresher.data.loader.WINDOW_GROUPS", 2)
    few, many = (loader(write(tmp_path / str(n), [10] * n), 3) for n in (2, 6))
    reads = []
    real = shards.ShardReader.read
    monkeypatch.setattr(shards.ShardReader, "read", lambda self, group: reads.append(group) or real(self, group))
    for epoch in range(3):
        order(few, epoch)
    assert sorted(reads) == [0, 1]  # it fits into one window, and stays from epoch to epoch
    reads.clear()
    order(many, 0)
    assert sorted(reads) == list(range(6))
    resumed = loader(tmp_path / "6", 3)
    reads.clear()
    order(resumed, 0, start_step=15)
    assert len(reads) == 2  # what comes before is not read


def test_batches_of_prepared_data_hold_what_is_stored(tmp_path):
    spec = spec_of(format="movielens", path=str(movielens_atomic(tmp_path / "ml")), label={"positive_from": 4})
    meta = prepared(spec, tmp_path / "data")
    table = stored(tmp_path / "data", meta, "train")
    one = Loader(tmp_path / "data", "train", batch_size=1000, rank=0, world_size=1, seed=0, shuffle=False)
    (batch,) = one.epoch(0)
    jagged = batch.sparse.to_dict()
    assert list(jagged) == [field["name"] for field in meta["fields"]]
    for name, one_field in jagged.items():
        stored_ids = table[f"sparse.{name}"].to_pylist()
        flat = list(itertools.chain(*stored_ids)) if name == "class" else stored_ids
        assert one_field.values().tolist() == flat
    assert batch.dense.shape == (1000, 0)


def test_a_batch_moves(tmp_path):
    batch = next(loader(write(tmp_path / "data", [8]), 4).epoch(0))
    moved = batch.to(torch.device("cpu"))
    assert samples_of(moved) == samples_of(batch)
    assert moved.count == batch.count


def spoil(folder, name, ids):
    """Write another shard whose column `name` holds `ids`, of a signed type."""
    path = folder / "train" / "0.arrow"
    table = pa.ipc.open_file(path).read_all()
    kind = pa.list_(pa.int32()) if name == "sparse.many" else pa.int32()
    table = table.set_column(table.column_names.index(name), name, pa.array(ids, kind))
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=3)


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("sparse.one", [0, 1, 2, 3, 6, 5], "row 5: id 6 of field `one` is outside its table of 6 rows"),
        ("sparse.one", [0, -1, 2, 3, 4, 5], "row 2: id -1 of field `one` is outside"),
        ("sparse.many", [[], [1], [2], [], [0, 9], []], "row 5: id 9 of field `many` is outside"),
    ],
)
def test_an_id_outside_its_table_is_named(tmp_path, name, ids, message):
    folder = write(tmp_path / "data", [6])
    spoil(folder, name, ids)
    with pytest.raises(ValueError, match=message):
        order(loader(folder, 2), 0)


def test_bad_arguments_are_named(tmp_path):
    folder = write(tmp_path / "data", [6])
    with pytest.raises(ValueError, match="batch_size 5 must be a positive multiple of the 2 ranks"):
        loader(folder, 5, world_size=2)
    with pytest.raises(ValueError, match=r"rank 2 must be in 0\.\.1"):
        loader(folder, 4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="split 'dev': must be one of train, validation, test"):
        Loader(folder, "dev", batch_size=1, rank=0, world_size=1, seed=0, shuffle=True)
    with pytest.raises(ValueError, match=r"start_step 4 must be in 0\.\.3"):
        next(loader(folder, 2).epoch(0, 4))


def test_data_that_are_not_whole_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no prepared data .* run prepare first"):
        loader(tmp_path, 2)
    folder = write(tmp_path / "data", [600, 6])
    path = folder / "train" / "0.arrow"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"0\.arrow: cannot be read .* run prepare again"):
        loader(folder, 2)
    shutil.copy(folder / "train" / "1.arrow", path)
    with pytest.raises(ValueError, match=r"the train files hold 12 samples, meta\.json says 606"):
        loader(folder, 2)
    path.unlink()
    with pytest.raises(ValueError, match=r"0\.arrow: cannot be read"):
        loader(folder, 2)


def test_a_file_holds_a_number_of_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUPS", 2)
    schema = pa.schema([("label", pa.uint8())])
    writer = shards.ShardWriter(tmp_path / "train", schema, 4)
    for size in (3, 0, 9, 1, 20, 5):
        writer.write(pa.record_batch([pa.array(np.zeros(size, np.uint8))], schema=schema))
    writer.close()
    assert writer.samples == 38
    reader = shards.ShardReader(tmp_path / "train", writer.files)
    assert [reader.read(group).num_rows for group in range(len(reader))] == [4] * 9 + [2]
    assert len(writer.files) == 5
    assert reader.where(3, 1) == f"{tmp_path / 'train' / '00001.arrow'}, row 6"


def test_ids_take_the_smallest_type_that_holds_them():
    kinds = [shards.id_type(rows) for rows in (1, 256, 257, 65_536, 65_537, 1 << 32, (1 << 32) + 1)]
    assert kinds == [pa.uint8(), pa.uint8(), pa.uint16(), pa.uint16(), pa.uint32(), pa.uint32(), pa.int64()]
