"""Imports point one way, and TorchRec still has the hooks that our kernel enters by."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import ShardEstimator
from torchrec.distributed.sharding.dp_sharding import BaseDpEmbeddingSharding

from thresher.embedding import lookup, planning, replicated, sharding

PACKAGE = Path(__file__).parents[2] / "service" / "thresher"

# A part may import from parts further down, and from itself.
LAYERS = [
    {"cli", "rank", "pipeline", "launch", "sweep", "worker"},
    {"stages", "plugin", "serve"},
    {"methods", "train", "data", "models", "tables", "report"},
    {"embedding"},
    {"kernels"},
    {"specfile", "specdoc", "progress", "trust", "cells", "signals"},
    {"spec", "rundir"},
    {"budget"},
]
HEIGHT = {part: -number for number, layer in enumerate(LAYERS) for part in layer}


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("thresher.")}
    return found & set(HEIGHT)


def test_imports_point_one_way() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 40
    wrong = []
    for path in files:
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert part in HEIGHT, f"{path}: say in LAYERS where {part} belongs"
        wrong += [f"{path} imports {other}" for other in imported(path) if HEIGHT[other] > HEIGHT[part]]
    assert wrong == []


# What torchrec 1.8 passes to the methods that we override; where one changes, look at embedding/sharding.py again.
HOOKS = [
    (GroupedPooledEmbeddingsLookup, "__init__", ["self", "grouped_configs", "device", "pg", "feature_processor",
        "scale_weight_gradients", "sharding_type", "env"]),
    (GroupedPooledEmbeddingsLookup, "_create_embedding_kernel", ["self", "config", "device", "pg", "sharding_type",
        "env"]),
    (ShardedEmbeddingBagCollection, "_create_lookups", ["self"]),
    (ShardedEmbeddingBagCollection, "_initialize_torch_state", ["self", "skip_registering"]),
    (ShardedEmbeddingBagCollection, "reset_parameters", ["self"]),
    (ShardedEmbeddingBagCollection, "_create_input_dist", ["self", "input_feature_names"]),
    (ShardedEmbeddingBagCollection, "input_dist", ["self", "ctx", "features"]),
    (ShardedEmbeddingBagCollection, "sharded_parameter_names", ["self", "prefix"]),
    (ShardedEmbeddingBagCollection, "create_grouped_sharding_infos", ["module", "table_name_to_parameter_sharding",
        "prefix", "fused_params", "suffix"]),
    (ShardedEmbeddingBagCollection, "create_embedding_bag_sharding", ["sharding_infos", "env", "device",
        "permute_embeddings", "qcomm_codecs_registry"]),
    (ShardedEmbeddingBagCollection, "_pre_load_state_dict_hook", ["self", "state_dict", "prefix", "args"]),
    (BaseDpEmbeddingSharding, "__init__", ["self", "sharding_infos", "env", "device"]),
    (BaseDpEmbeddingSharding, "create_input_dist", ["self", "device"]),
    (BaseDpEmbeddingSharding, "create_output_dist", ["self", "device"]),
    (BaseDpEmbeddingSharding, "create_lookup", ["self", "device", "fused_params", "feature_processor"]),
    (BaseBatchedEmbeddingBag, "state_dict", ["self", "destination", "prefix", "keep_vars"]),
    (EmbeddingEnumerator, "__init__", ["self", "topology", "batch_size", "constraints", "estimator",
        "use_exact_enumerate_order"]),
    (EmbeddingEnumerator, "_filter_sharding_types", ["self", "name", "allowed_sharding_types", "sharder_key"]),
    (EmbeddingEnumerator, "populate_estimates", ["self", "sharding_options"]),
    (EmbeddingStorageEstimator, "estimate", ["self", "sharding_options", "sharder_data_map"]),
    (ShardEstimator, "estimate", ["self", "sharding_options", "sharder_data_map"]),
    (EmbeddingBagCollectionSharder, "shard", ["self", "module", "params", "env", "device", "module_fqn"]),
    (EmbeddingBagCollectionSharder, "sharding_types", ["self", "compute_device_type"]),
    (EmbeddingBagCollectionSharder, "compute_kernels", ["self", "sharding_type", "compute_device_type"]),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "parameters"), HOOKS)
def test_torchrec_has_the_hooks(owner: type, name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_every_override_is_guarded() -> None:
    guarded = {name for _, name, _ in HOOKS}
    ours = (
        lookup.PooledLookup,
        sharding.ShardedCollection,
        sharding.Sharder,
        replicated._ReplicatedLookup,
        replicated.ReplicatedSharding,
        planning.Enumerator,
        planning.CostEstimator,
        planning.StorageEstimator,
    )
    for cls in ours:
        for name, member in vars(cls).items():
            inherited = any(hasattr(base, name) for base in cls.__mro__[1:-1])
            if inherited and inspect.isfunction(inspect.unwrap(member)) and name != "__init__":
                assert name in guarded, f"{cls.__name__}.{name} overrides TorchRec; guard its signature"
