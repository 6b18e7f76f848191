"""A TorchRec model that knows nothing of us, with our tables in it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.types import ShardedModule, ShardingPlan
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchRecEmbeddingBagCollection

from thresher.embedding.collection import EmbeddingBagCollection
from thresher.embedding.planning import make_plan
from thresher.embedding.representation import Representation, RowOptimizer, SoftThreshold

_DTYPES = (DataType.FP32, DataType.FP16, DataType.BF16)


def replace(
    model: nn.Module,
    representation: Representation | Mapping[str, Representation],
    optimizer: RowOptimizer | None = None,
    seed: int = 0,
    init_scale: float = 0.05,
) -> nn.Module:
    """Put `thresher.EmbeddingBagCollection` in the place of every torchrec.EmbeddingBagCollection of a model.

    Tables keep names, features, rows, columns, pooling and data type. Their values start anew, uniform in
    [-init_scale, init_scale) and a function of (seed, table name, row, column) alone, so that two models with equal
    seeds start alike on any ranks; `init_fn`, `weight_init_min` and `weight_init_max` of their configs are not used.

    Args:
        model: not sharded yet; changed in place.
        representation: of every table, or of each by its name.
        optimizer: the update rule of every table, which runs inside backward; default Adam, learning rate 1e-3.
        seed: of the initial values.
        init_scale: half the width of the initial values' range.

    Returns:
        The model; if it is itself a collection, the one that takes its place.

    Raises:
        ValueError: if the model has no collection, is sharded, or has a collection or a table that we cannot replace:
            one with sample weights, of another data type than fp32, fp16 and bf16, or with a name that stands there
            twice. Nothing is replaced then.
    """
    found: dict[nn.Module, EmbeddingBagCollection] = {}
    names: list[str] = []
    for path, module in model.named_modules():
        where = path or type(module).__name__
        if isinstance(module, ShardedModule):
            raise ValueError(f"{where}: is sharded already; replace collections before DistributedModelParallel")
        if not isinstance(module, TorchRecEmbeddingBagCollection):
            continue
        _check(module, where)
        configs = module.embedding_bag_configs()
        own = (
            {config.name: representation[config.name] for config in configs if config.name in representation}
            if isinstance(representation, Mapping)
            else representation
        )
        found[module] = EmbeddingBagCollection(configs, own, optimizer, seed, init_scale)
        names += [config.name for config in configs]
    if not found:
        raise ValueError("the model has no torchrec.EmbeddingBagCollection that could be replaced")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"table {twice[0]}: two collections have one of this name; give each table a name of its own")
    if isinstance(representation, Mapping) and (unknown := sorted(set(representation) - set(names))):
        raise ValueError(f"representation of table {unknown[0]}: there is no such table; there are {', '.join(names)}")
    _check_sharing([collection.soft_threshold for collection in found.values()])
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in found:
                setattr(parent, name, found[child])
    return found.get(model, model)


def _check(collection: TorchRecEmbeddingBagCollection, where: str) -> None:
    if isinstance(collection, EmbeddingBagCollection):
        raise ValueError(f"{where}: was replaced already; build the model anew to give it other representations")
    if type(collection) is not TorchRecEmbeddingBagCollection:
        raise ValueError(f"{where}: is a {type(collection).__name__}, which may do more than what takes its place does")
    if collection.is_weighted():
        raise ValueError(
            f"{where}: its features have sample or position weights, which our collection does not pass on; weigh the "
            "pooled vectors, or keep such tables in a model of their own"
        )
    for config in collection.embedding_bag_configs():
        _check_table(config)


def _check_table(config: EmbeddingBagConfig) -> None:
    if config.data_type not in _DTYPES:
        raise ValueError(f"table {config.name}: trains in {config.data_type.value}; take FP32, FP16 or BF16")
    if config.need_pos or config.use_virtual_table:
        raise ValueError(f"table {config.name}: position weights and virtual tables have no kernel here; remove them")


def _check_sharing(soft_thresholds: list[SoftThreshold | None]) -> None:
    shared = [own for own in soft_thresholds if own is not None]
    if len(set(shared)) > 1:
        raise ValueError(
            f"representation: there are {len(set(shared))} different SoftThresholds; give all tables the same"
        )
    if len(shared) > 1 and (wide := [own.granularity for own in shared if own.granularity in ("global", "dimension")]):
        raise ValueError(
            f"granularity {wide[0]} shares thresholds by all tables, but they are in {len(shared)} collections; take "
            f"{'table' if wide[0] == 'global' else 'table_dimension'}"
        )


def plan(
    model: nn.Module,
    batch_size: int,
    device: torch.device | str = "cpu",
    sharding: str | None = None,
) -> ShardingPlan:
    """Where each table's parts go: TorchRec's planner, told what our tables weigh, cost and may have.

    Every rank makes the same plan by itself. TorchRec's own planners work too, as far as their constraints forbid
    what a representation cannot have (`Sharder` says which that is).

    Args:
        model: with replaced collections, not sharded yet.
        batch_size: samples a step on each rank.
        device: that the tables will be on.
        sharding: TorchRec's name of the sharding type of all tables, such as `row_wise`; None to choose for each table.

    Raises:
        ValueError: if a table cannot have the sharding type, or no collection was replaced.
    """
    if not any(isinstance(module, EmbeddingBagCollection) for module in model.modules()):
        raise ValueError("the model has no thresher.EmbeddingBagCollection; call thresher.replace(model, …) first")
    world_size = dist.get_world_size()
    return make_plan(
        model,
        sharding,
        world_size=world_size,
        local_world_size=get_local_size(world_size),
        device_type=torch.device(device).type,
        batch_size=batch_size,
    )
