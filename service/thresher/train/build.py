"""From a spec to a sharded model with its optimizers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from thresher.embedding.collection import EmbeddingBagCollection
from thresher.embedding.double_hash import DoubleHash
from thresher.embedding.expansion import Expansion
from thresher.embedding.path import PathTable
from thresher.embedding.planning import make_plan
from thresher.embedding.representation import Masked, RowOptimizer, entries_of
from thresher.embedding.separate import Separate
from thresher.embedding.sharding import ShardedCollection, Sharder, collection_of
from thresher.embedding.sharding_types import COLUMN_SPLIT
from thresher.embedding.table_plan import FieldTable, TablePlan
from thresher.kernels.layout import Optimizer
from thresher.models import factory
from thresher.models.autoint import AutoInt
from thresher.models.dcnv2 import DCNv2
from thresher.models.deepfm import DeepFM
from thresher.models.dense_onnx import dense_onnx, dense_tensors
from thresher.models.dlrm import DLRM
from thresher.models.fields import Fields
from thresher.models.fm import FM
from thresher.models.wide_deep import WideDeep
from thresher.spec import ModelSpec, Spec, TrainSpec
from thresher.tables.safetensors_file import TensorSpec
from thresher.train.group import Ranks

for noisy in ("torchrec", "torch.fx"):  # what they say at warning level is about their own calls
    logging.getLogger(noisy).setLevel(logging.ERROR)

MODELS: dict[str, factory.Factory] = {
    "fm": FM,
    "wide_deep": WideDeep,
    "deepfm": DeepFM,
    "autoint": AutoInt,
    "dlrm": DLRM,
    "dcnv2": DCNv2,
}


@dataclass
class Job:
    """A sharded model in training.

    Attributes:
        model: the model; maps (sparse, dense) to logits.
        collection: its tables on this rank.
        dense: the parameters outside the tables, alike on every rank.
        fields_at: where the model has its fields, for the names of their parameters.
        optimizer: of the dense parameters and of thresholds that are replicated; the tables' own runs in backward.
        train: how it is trained.
        ranks: who takes part.
    """

    model: DistributedModelParallel
    collection: ShardedCollection
    dense: dict[str, nn.Parameter]
    fields_at: str
    optimizer: torch.optim.Optimizer
    train: TrainSpec
    ranks: Ranks


def build(
    spec: Spec,
    meta: Mapping[str, Any],
    ranks: Ranks,
    plan: TablePlan,
    train: TrainSpec,
    table_seed: int,
    dense_seed: int,
) -> Job:
    """A model with initial values, sharded over the ranks.

    Args:
        spec: the job.
        meta: what `prepare` found in the data.
        ranks: who takes part.
        plan: of the tables.
        train: how it will be trained.
        table_seed: of the tables' initial values.
        dense_seed: of the dense part's initial values.
    """
    collection = EmbeddingBagCollection(
        [
            _table(field, plan.fields[field["name"]])
            for field in meta["fields"]
            if field["name"] in plan.fields and field["name"] not in plan.paths
        ],
        representation={name: table.representation for name, table in plan.fields.items()},
        optimizer=RowOptimizer(
            rule=Optimizer[train.embedding_optimizer.upper()],
            learning_rate=train.embedding_learning_rate,
            weight_decay=train.embedding_weight_decay,
        ),
        seed=table_seed,
        init_scale=spec.model.init_scale,
    )
    with torch.random.fork_rng():
        torch.manual_seed(dense_seed)
        model = create_model(spec.model, collection, plan, len(meta["dense"]))
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    sharded = DistributedModelParallel(
        model,
        env=env,
        device=ranks.device,
        plan=_plan(spec, model, collection, ranks),
        sharders=[Sharder()],
    )
    tables = collection_of(sharded)
    inside = {id(parameter) for parameter in tables.parameters()}
    dense = {name: p for name, p in sharded.named_parameters() if id(p) not in inside}
    return Job(sharded, tables, dense, fields_at(model), _optimizer(train, dense, tables), train, ranks)


def _table(field: Mapping[str, Any], own: FieldTable) -> EmbeddingBagConfig:
    """A field's table, as TorchRec wants it."""
    name = field["name"]
    expanded = own.outside if isinstance(own.outside, Separate | DoubleHash) else None
    mean = field["pooling"] == "mean" and not field["one_hot"] and not isinstance(expanded, DoubleHash)
    return EmbeddingBagConfig(
        name=name,
        feature_names=expanded.names(name) if expanded else [name],
        num_embeddings=expanded.rows if expanded else field["rows"],
        embedding_dim=own.dim,
        pooling=PoolingType.MEAN if mean else PoolingType.SUM,
    )


def create_model(spec: ModelSpec, embeddings: nn.Module, plan: TablePlan, numeric: int) -> nn.Module:
    """The model that the spec names, one of ours or the user's own.

    Args:
        spec: of the model.
        embeddings: collection of the fields' tables.
        plan: of the tables.
        numeric: number of numeric inputs.

    Raises:
        ValueError: if the user's own cannot be made, or is not trusted.
    """
    create = MODELS[spec.name] if spec.factory is None else factory.imported(spec)
    fields = Fields(
        embeddings,
        plan.vectors,
        plan.dim if getattr(create, "equal_dims", True) else None,
        Expansion(plan.expanded) if plan.expanded else None,
        {name: PathTable(path, plan.fields[name].dim, spec.init_scale) for name, path in plan.paths.items()},
        projected=plan.fields if spec.projection == "all" else (),
    )
    model = create(fields, numeric, spec)
    return model if spec.factory is None else factory.checked(model, fields, spec)


def fields_at(model: nn.Module) -> str:
    """Where a model has its fields; empty if they are not a part of it."""
    return next((name for name, module in model.named_modules() if isinstance(module, Fields)), "")


def dense_part(spec: Spec, meta: Mapping[str, Any], plan: TablePlan) -> tuple[list[TensorSpec], str]:
    """What `dense.safetensors` holds, and where the fields are, without making a model."""
    with torch.device("meta"):
        model = create_model(spec.model, nn.Identity(), plan, len(meta["dense"]))
    at = fields_at(model)
    apart = plan.exported_apart(at)
    return [
        TensorSpec(name, np.dtype(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))
        for name, tensor in dense_tensors(model).items()
        if name not in apart
    ], at


def dense_graph(spec: Spec, meta: Mapping[str, Any], plan: TablePlan) -> tuple[bytes | None, str]:
    """The dense part as ONNX, whose weights are those of `dense.safetensors`.

    Returns:
        The file; None, and why, where the spec wants none or a model of the user's own cannot be exported.
    """
    if not spec.export.onnx:
        return None, "export.onnx is false"
    stored, at = dense_part(spec, meta, plan)
    model = create_model(spec.model, nn.Identity(), plan, len(meta["dense"]))
    parts = {
        name: own.outside.names(name) if isinstance(own.outside, Separate) else [name]
        for name, own in plan.fields.items()
    }
    try:
        return dense_onnx(model, at, parts, len(meta["dense"]), stored), ""
    except Exception as error:  # of torch's exporter, or of the model's own code
        if spec.model.factory is None:
            raise
        return None, f"torch cannot export {spec.model.factory} to ONNX: {str(error).strip().splitlines()[0][:300]}"


def _plan(spec: Spec, model: nn.Module, collection: EmbeddingBagCollection, ranks: Ranks) -> ShardingPlan:
    names = {"auto": None, "grid": ShardingType.GRID_SHARD.value}  # the others are TorchRec's own
    sharding = names.get(spec.runtime.sharding, spec.runtime.sharding)
    masked = any(isinstance(entries_of(own), Masked) for own in collection.representations.values())
    if masked and sharding in COLUMN_SPLIT:
        sharding = None  # a search may split columns, but what it leaves of a row is stored together
    return make_plan(
        model,
        sharding,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        device_type=ranks.device.type,
        batch_size=spec.train.batch_size // ranks.world_size,
    )


def _optimizer(
    train: TrainSpec, dense: Mapping[str, nn.Parameter], collection: ShardedCollection
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": list(dense.values()), "lr": train.dense_learning_rate, "weight_decay": train.dense_weight_decay}
    ]
    if collection.soft_threshold and collection.soft_threshold.replicated:
        groups.append(
            {
                "params": list(collection.shared_thresholds.values()),
                "lr": collection.soft_threshold.learning_rate,
                "weight_decay": collection.soft_threshold.weight_decay,
            }
        )
    return torch.optim.Adam(groups) if train.dense_optimizer == "adam" else torch.optim.Adagrad(groups)
