"""Prepare: raw rows become ids, a vocabulary and columnar shards.

Three passes, each in memory that does not grow with the number of rows (only with the number of different ids):

1. the raw files, once: each row checked and its keys numbered as they come, into one intermediate file
2. the intermediate file: how often the training split holds each number, which makes the vocabulary
3. the intermediate file: numbers become table rows, samples go to the shards of their split
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from thresher.data import parse, shards
from thresher.data.check import check
from thresher.data.examples import RAW, Examples
from thresher.data.formats import Plan, column, open_source, plan
from thresher.data.rows import parse_rows
from thresher.data.source import BadRows, Source
from thresher.data.splits import SPLITS, TimeSplit
from thresher.data.vocabulary import OOV_ROW, Encoder, HashEncoder, Rows, VocabularyEncoder, write_vocabulary
from thresher.rundir import file_sha256, write_json
from thresher.spec import DataSpec, FieldSpec, Spec

META = "meta.json"
SPLIT = "split"  # column of the intermediate file


def prepare(spec: Spec, out: Path, on_rows: Callable[[int], None]) -> dict[str, Any]:
    """Write the prepared data of a spec into a folder.

    Args:
        spec: its `data` and `seed` are used.
        out: the folder, there and empty.
        on_rows: called with the number of rows read so far.

    Returns:
        what is in meta.json.

    Raises:
        ValueError: if data and spec do not fit, a bad row stops the run, or a split is of no use.
    """
    if differences := check(spec):
        raise ValueError("the spec does not fit the data:\n" + "\n".join(f"- {line}" for line in differences))
    data = spec.data
    source = open_source(data, spec.seed)
    what, _ = plan(data, source)
    bad = BadRows(data.on_bad_row, data.max_bad_rows)
    encoders = {name: _encoder(name, field, data) for name, field in what.fields.items() if is_sparse(field)}
    intermediate, times = out / "intermediate.arrow", out / "times.u64"
    examples = Examples(what.fields, spec.seed)
    dropped = _read_raw(spec, source, what, encoders, bad, examples, intermediate, times, on_rows)

    def samples() -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        by_time = TimeSplit(times, data.split.fractions) if data.split.by == "time" else None
        with pa.OSFile(str(intermediate)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield batch, by_time.next(batch.num_rows) if by_time else batch.column(SPLIT).to_numpy()

    tables = _count(what, encoders, samples())
    (out / "vocabulary").mkdir()
    (out / "counts").mkdir()
    for name, rows in tables.items():
        np.save(out / "counts" / f"{name}.npy", rows.counts)
        if rows.keys is not None:
            write_vocabulary(out / "vocabulary" / f"{name}.parquet", rows)
    splits, oov_rates = _write_shards(data, what, tables, samples(), out)
    for file in (intermediate, times):
        file.unlink(missing_ok=True)
    meta = {
        "fields": [_field_meta(name, what.fields[name], rows, oov_rates[name]) for name, rows in tables.items()],
        "dense": [name for name, field in what.fields.items() if not is_sparse(field)],
        "splits": splits,
        "inputs": [
            {"path": str(file), "bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in source.files
        ],
        "bad_rows": {"count": bad.count, "first": bad.first},
        "dropped": dropped,
        "seed": spec.seed,
    }
    write_json(out / RAW, examples.finish({name: rows.of_number for name, rows in tables.items()}))
    write_json(out / META, meta)
    return meta


def is_sparse(field: FieldSpec) -> bool:
    """Whether a field has an embedding table; the others are dense inputs."""
    return field.kind != "numeric" or field.numeric == "log_bucket"


def _encoder(name: str, field: FieldSpec, data: DataSpec) -> Encoder:
    if field.encoding == "hash":
        assert field.rows is not None  # the spec asks for it
        return HashEncoder(field.rows)
    return VocabularyEncoder(name, data.max_vocabulary)


def _read_raw(
    spec: Spec,
    source: Source,
    what: Plan,
    encoders: dict[str, Encoder],
    bad: BadRows,
    examples: Examples,
    intermediate: Path,
    times: Path,
    on_rows: Callable[[int], None],
) -> int:
    """Pass 1; gives the number of samples that the spec's `label.drop` left out."""
    schema = [pa.field(SPLIT, pa.uint8()), pa.field(shards.LABEL, pa.uint8())]
    for name, field in what.fields.items():
        if name not in encoders:
            schema.append(pa.field(shards.dense(name), pa.float32()))
        else:
            number = pa.int64() if field.encoding == "hash" else pa.int32()
            schema.append(pa.field(shards.sparse(name), pa.list_(number) if field.kind == "multi" else number))
    dropped = rows = 0
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with times.open("wb") as time_file, pa.ipc.new_stream(intermediate, pa.schema(schema), options=options) as stream:
        for chunk in source.chunks(what.wanted, bad):
            parsed = parse_rows(spec.data, spec.seed, what, chunk)
            bad.add(chunk.file, parsed.bad)
            dropped += parsed.dropped
            if parsed.time is not None:
                parsed.time[parsed.kept].tofile(time_file)
            arrays = [pa.array(parsed.split[parsed.kept]), pa.array(parsed.labels[parsed.kept])]
            mask = pa.array(parsed.kept)
            for name, field in what.fields.items():
                raw = chunk.columns[column(name, field)]
                if name not in encoders:
                    arrays.append(pa.array(parse.dense(parsed.numbers[name][parsed.kept])))
                elif field.kind == "multi":
                    entries, lengths = parse.lists(raw.filter(mask), field.separator)
                    keys, codes = parse.keys(entries)
                    arrays.append(_ragged(encoders[name].encode(keys)[codes], lengths))
                else:
                    if field.kind == "numeric":
                        keys, codes = parse.log_buckets(parsed.numbers[name][parsed.kept])
                    else:
                        keys, codes = parse.keys(raw.filter(mask))
                    arrays.append(pa.array(encoders[name].encode(keys)[codes]))
            arrays = [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)]
            encoded = pa.record_batch(arrays, schema=pa.schema(schema))
            stream.write_batch(encoded)
            examples.add(chunk, parsed, encoded)
            rows += len(chunk.rows)
            on_rows(rows)
    return dropped


def _ragged(values: np.ndarray, lengths: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _count(
    what: Plan, encoders: dict[str, Encoder], samples: Iterator[tuple[pa.RecordBatch, np.ndarray]]
) -> dict[str, Rows]:
    """Pass 2: the rows of each table."""
    counts = {name: np.zeros(encoder.size, np.int64) for name, encoder in encoders.items()}
    for batch, split in samples:
        train = batch.filter(pa.array(split == 0))
        for name, count in counts.items():
            numbers, _ = _flat(train.column(shards.sparse(name)))
            if len(numbers) * 8 < len(count):  # a long table: touch only what is there
                distinct, times = np.unique(numbers, return_counts=True)
                count[distinct] += times
            else:
                count += np.bincount(numbers, minlength=len(count))
    return {name: encoders[name].finish(count, what.fields[name].min_count) for name, count in counts.items()}


def _write_shards(
    data: DataSpec,
    what: Plan,
    tables: dict[str, Rows],
    samples: Iterator[tuple[pa.RecordBatch, np.ndarray]],
    out: Path,
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Pass 3; gives `splits` of meta.json, and each field's share of OOV ids by split."""
    schema = [pa.field(shards.LABEL, pa.uint8())]
    for name, field in what.fields.items():
        if name in tables:
            kind = shards.id_type(len(tables[name].counts))
            schema.append(pa.field(shards.sparse(name), pa.list_(kind) if field.kind == "multi" else kind))
        else:
            schema.append(pa.field(shards.dense(name), pa.float32()))
    writers = [shards.ShardWriter(out / split, pa.schema(schema), data.row_group_rows) for split in SPLITS]
    positive = [0] * len(SPLITS)
    ids = {name: np.zeros(len(SPLITS), np.int64) for name in tables}
    oov = {name: np.zeros(len(SPLITS), np.int64) for name in tables}
    for batch, split in samples:
        for which, writer in enumerate(writers):
            part = batch.filter(pa.array(split == which))
            positive[which] += int(np.count_nonzero(part.column(shards.LABEL)))
            arrays = []
            for field in schema:
                array = part.column(field.name)
                name = field.name.removeprefix("sparse.")
                if field.name == shards.sparse(name):
                    numbers, lengths = _flat(array)
                    rows = tables[name].of_number
                    if rows is not None:
                        numbers = rows[numbers]
                        oov[name][which] += np.count_nonzero(numbers == OOV_ROW)
                    ids[name][which] += len(numbers)
                    array = pa.array(numbers) if lengths is None else _ragged(numbers, lengths)
                arrays.append(array.cast(field.type))
            writer.write(pa.record_batch(arrays, schema=pa.schema(schema)))
    for writer in writers:
        writer.close()
    splits = {}
    for name, writer, ones in zip(SPLITS, writers, positive, strict=True):
        files = [f"{name}/{file}" for file in writer.files]
        splits[name] = {"samples": writer.samples, "label_rate": ones / max(writer.samples, 1), "files": files}
    _check_usable(splits, data)
    rates = {name: dict(zip(SPLITS, (oov[name] / np.maximum(ids[name], 1)).tolist(), strict=True)) for name in tables}
    return splits, rates


def _flat(array: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids of a column, and of a list column how many each row has."""
    if not pa.types.is_list(array.type):
        return array.to_numpy(), None
    return array.flatten().to_numpy(), np.diff(array.offsets.to_numpy()).astype(np.int64)


def _check_usable(splits: dict[str, Any], data: DataSpec) -> None:
    for number, (name, split) in enumerate(splits.items()):
        if split["samples"] == 0:
            mend = "there are too few samples for data.split.fractions"
            if data.split.by == "column":
                value = data.split.values[number]
                mend = f"no row has {value!r} in `{data.split.column}`; check data.split.values"
            raise ValueError(f"data.split: the {name} split is empty: {mend}")
    for name, split in splits.items():
        if split["label_rate"] in (0, 1):
            raise ValueError(
                f"data.label: all {split['samples']} labels of the {name} split are {split['label_rate']:.0f}, so "
                "there is nothing to learn or to measure; check data.label.positive_from and data.split"
            )


def _field_meta(name: str, field: FieldSpec, rows: Rows, oov_rate: dict[str, float]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": field.kind,
        "rows": len(rows.counts),
        "pooling": field.pooling,
        "one_hot": field.kind != "multi",
        "encoding": "log_bucket" if field.kind == "numeric" else field.encoding,
        "oov_row": OOV_ROW if rows.keys is not None else None,
        "train_count": int(rows.counts.sum()),
        "oov_rate": oov_rate,
    }
