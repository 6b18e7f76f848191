"""Compact tables of a trained, sharded model, for serving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from thresher import rundir
from thresher.embedding.representation import Composed, Masked, SoftThreshold
from thresher.embedding.rows import Rows, table_rows
from thresher.embedding.sharding import ShardedCollection, collections_of
from thresher.plugin.scheme import Scheme
from thresher.tables.format import NAME, Layout, mask_bytes, rows_by_kept, unpack_masks
from thresher.tables.values import Dtype
from thresher.tables.vocabulary import Keys
from thresher.tables.writer import Writer

_Table = tuple[ShardedCollection, EmbeddingBagConfig]


def export(
    model: nn.Module,
    folder: str | Path,
    scheme: Scheme | None = None,
    dtype: Dtype = "fp16",
    vocabularies: Mapping[str, Keys] | None = None,
    name: str = "model",
    layout: Layout | Literal["auto"] = "auto",
) -> None:
    """Write the tables of a model as lookups give them, for `thresher.tables.load`; every rank must call it.

    Each table is streamed from the ranks that hold it to the first, which writes. The folder is complete when it has a
    `manifest.json` (docs/table_format.md).

    Args:
        model: sharded and trained, with tables that are Dense, Masked, or SoftThreshold with a scheme.
        folder: empty or not there yet; of the first rank.
        scheme: what stays of tables that are not Masked; needed where thresholds were learned.
        dtype: precision of the values: fp32, fp16, bf16, int8 or int4. Of the last two see that your metric bears them.
        vocabularies: by feature the raw keys of its rows from row 1 on, where row 0 is that of unknown keys. The ids of
            features that are left out are rows, for serving too.
        name: of the model, as the manifest says it.
        layout: of every table's file; auto takes the smallest of each. Tables of which every feature has a vocabulary
            may be bucketed: their rows then get other numbers, which `Tables.rows` gives.

    Raises:
        ValueError: on every rank, if the folder holds anything, the model has tables that cannot be exported, or its
            names do not fit the format; on the first, if a value is not finite at the precision.
    """
    keys_of = vocabularies or {}
    tables = [(own, config) for own in collections_of(model) for config in own._embedding_bag_configs]
    _check_model(model, tables)
    _check_names(tables, keys_of)
    for collection, config in tables:
        _check_table(collection, config, scheme)
    writer = _start(Path(folder), tables, scheme, name)
    for collection, config in tables:
        chunks = _chunks(collection, config, scheme)
        if writer is None:
            for _ in chunks:
                pass
            continue
        with writer.table(
            config.name,
            dim=config.embedding_dim,
            rows_by_kept=_rows_by_kept(collection, config, scheme),
            dtype=dtype,
            layout=layout,
            renumber=all(feature in keys_of for feature in config.feature_names),
        ) as table:
            for values_ND, mask_ND in chunks:
                table.write(values_ND, mask_ND)
        for feature in config.feature_names:
            keys = keys_of.get(feature)
            writer.field(
                feature,
                table=config.name,
                kind="multi",
                encoding="id" if keys is None else "vocabulary",
                pooling="mean" if config.pooling == PoolingType.MEAN else "sum",
                keys=keys,
            )
    if writer is not None:
        writer.dense(_dense_part(model, tables))
        writer.finish()
    dist.barrier()  # when it returns, the folder is complete for every rank that sees it


def _check_model(model: nn.Module, tables: list[_Table]) -> None:
    if not tables:
        raise ValueError(
            "the model has no sharded thresher.EmbeddingBagCollection; export what DistributedModelParallel gave"
        )
    for path, module in model.named_modules():
        if isinstance(module, ShardedModule) and not isinstance(module, ShardedCollection):
            raise ValueError(
                f"{path}: is a {type(module).__name__}, whose tables are spread over the ranks; replace it"
            )


def _check_names(tables: list[_Table], vocabularies: Mapping[str, Keys]) -> None:
    features = Counter(feature for _, config in tables for feature in config.feature_names)
    for name in [*features, *(config.name for _, config in tables)]:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r}: names of tables and features must be a letter and up to 62 letters, digits or _"
            )
    for feature, count in features.items():
        if count > 1:
            raise ValueError(f"feature {feature}: is looked up in {count} tables, and a field of an export in one")
    if unknown := sorted(set(vocabularies) - set(features)):
        raise ValueError(
            f"vocabulary of feature {unknown[0]}: there is no such feature; there are {', '.join(features)}"
        )
    for _, config in tables:
        for feature in config.feature_names:
            if (keys := len(vocabularies.get(feature, ()))) >= config.num_embeddings:
                raise ValueError(
                    f"vocabulary of feature {feature}: {keys} keys have rows 1 to {keys}, but table {config.name} has "
                    f"{config.num_embeddings} rows"
                )


def _check_table(collection: ShardedCollection, config: EmbeddingBagConfig, scheme: Scheme | None) -> None:
    representation = collection.representations[config.name]
    if isinstance(representation, Composed):
        raise ValueError(f"table {config.name}: composed tables are exported by jobs alone; train the model by a spec")
    if isinstance(representation, Masked):
        return
    if scheme is None or config.name not in scheme.masks:
        if isinstance(representation, SoftThreshold):
            raise ValueError(f"table {config.name}: learned thresholds; export it with the scheme that says what stays")
        return
    wanted = (config.num_embeddings, mask_bytes(config.embedding_dim))
    if scheme.masks[config.name].shape != wanted:
        raise ValueError(
            f"table {config.name}: the scheme has a mask {scheme.masks[config.name].shape} of it, not {wanted}; take a "
            "scheme made for these tables"
        )


def _start(folder: Path, tables: list[_Table], scheme: Scheme | None, name: str) -> Writer | None:
    """The writer, on the first rank; an error on every rank where the first cannot start."""
    writer, box = None, [""]
    if dist.get_rank() == 0:
        try:
            writer = _writer(folder, tables, scheme, name)
        except ValueError as error:
            box = [str(error)]
    dist.broadcast_object_list(box, src=0)
    if box[0]:
        raise ValueError(box[0])
    return writer


def _writer(folder: Path, tables: list[_Table], scheme: Scheme | None, name: str) -> Writer:
    made_from = {
        "model": name,
        "tables": {
            config.name: [config.num_embeddings, config.embedding_dim, config.feature_names, config.pooling.value]
            for _, config in tables
        },
    }
    masked = [own.representations[config.name] for own, config in tables]
    schemes = [own.masks for own in masked if isinstance(own, Masked) and isinstance(own.masks, Scheme)]
    if scheme is not None:
        schemes.append(scheme)
    return Writer(
        folder,
        model=name,
        seed=tables[0][0].seed,
        budget=schemes[0].budget if schemes else None,
        spec_fingerprint=rundir.fingerprint(made_from),
    )


def _rows_by_kept(collection: ShardedCollection, config: EmbeddingBagConfig, scheme: Scheme | None) -> list[int]:
    """How many rows of a table keep 0, 1, … D columns."""
    representation, rows, dim = collection.representations[config.name], config.num_embeddings, config.embedding_dim
    if isinstance(representation, Masked):
        return rows_by_kept(representation.masks.packed(config.name, 0, rows).numpy(), dim)
    if scheme is not None and config.name in scheme.masks:
        return rows_by_kept(scheme.masks[config.name], dim)
    return [0] * dim + [rows]


def _chunks(collection: ShardedCollection, config: EmbeddingBagConfig, scheme: Scheme | None) -> Iterator[Rows]:
    """A table's rows in order, on the first rank, with the scheme's masks where it has any."""
    done = 0
    for values_ND, mask_ND in table_rows(collection, config.name):
        stop = done + len(values_ND)
        if mask_ND is None and scheme is not None and config.name in scheme.masks:
            yield values_ND, unpack_masks(scheme.masks[config.name][done:stop], config.embedding_dim)
        else:
            yield values_ND, mask_ND
        done = stop


def _dense_part(model: nn.Module, tables: list[_Table]) -> dict[str, NDArray[Any]]:
    """Parameters and buffers outside the tables, by the model's names."""
    inside = {id(tensor) for own, _ in tables for tensor in (*own.parameters(), *own.buffers())}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: _array(tensor) for name, tensor in tensors.items() if id(tensor) not in inside}


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    wide = tensor.detach().cpu()
    found: NDArray[Any] = np.asarray(wide.float() if wide.dtype == torch.bfloat16 else wide)
    return found
