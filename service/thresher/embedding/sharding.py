"""Our collection under TorchRec's sharding.

Planner, input and output distribution, state dict and pipelines are TorchRec's, the kernel is ours.
TorchRec takes a kernel by name only; ours goes by `fused`, and these overrides put it in place of FBGEMM's. They
follow torchrec 1.8; a test guards the signatures.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embedding_types import (
    BaseEmbeddingSharder,
    EmbeddingComputeKernel,
    ShardedEmbeddingTable,
)
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import PoolingType, data_type_to_dtype
from torchrec.optim.fused import EmptyFusedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher.embedding.bucket_rows import bucket_rows
from thresher.embedding.collection import EmbeddingBagCollection
from thresher.embedding.compact import flat_sharded
from thresher.embedding.exchanged import ExchangedSharding
from thresher.embedding.fused import KERNEL, FusedEmbeddingBag
from thresher.embedding.lookup import PooledLookup
from thresher.embedding.partitions import Partitions
from thresher.embedding.replicated import ReplicatedSharding
from thresher.embedding.representation import (
    Masked,
    Representation,
    SoftThreshold,
    TableKernel,
    composed_of,
    entries_of,
)
from thresher.embedding.sharding_types import ROW_SPLIT, SHARDING_TYPES, refusal
from thresher.embedding.state import own_parts, sharded_like
from thresher.kernels.layout import Combine, Shared

_EXCHANGED = "exchanged"  # beside TorchRec's names of sharding types


class ShardedCollection(ShardedEmbeddingBagCollection):
    """A rank's part of an `EmbeddingBagCollection`.

    In its state dict each table has `weight` and, by its representation, `threshold` and `seen`, sharded like the
    weight, or plain tensors where every rank holds the table; of a masked table the weight is the kept entries alone,
    of a composed one the rows of its buckets. Thresholds shared by tables or columns are the replicated parameters
    `shared_thresholds.*`.
    """

    def __init__(
        self, module: EmbeddingBagCollection, plan: dict[str, ParameterSharding], *args: Any, **kwargs: Any
    ) -> None:
        for name, parameter in plan.items():
            if problem := refusal(module.representations[name], module.optimizer, parameter.sharding_type):
                raise ValueError(f"table {name}, sharding {parameter.sharding_type}: {problem}")
        self.representations = module.representations  # read by the hooks that super().__init__ calls
        self.soft_threshold = module.soft_threshold
        self.seed = module.seed
        super().__init__(module, plan, *args, **kwargs)
        self.shared_thresholds = nn.ParameterDict()
        if module.soft_threshold and module.soft_threshold.replicated:
            self._share_thresholds(module.soft_threshold)

    def _share_thresholds(self, representation: SoftThreshold) -> None:
        """Make the replicated thresholds: for all learning tables or for each, of one value or of one a column."""
        by_table: dict[str, nn.Parameter] = {}
        for config in self._embedding_bag_configs:
            if entries_of(self.representations[config.name]) != representation:
                continue
            width = 1 if representation.shared == Shared.TABLE else config.embedding_dim
            key = config.name if representation.granularity in ("table", "table_dimension") else "all"
            if key not in self.shared_thresholds:
                self.shared_thresholds[key] = nn.Parameter(
                    torch.full((width,), representation.init, device=self._device)
                )
            by_table[config.name] = self.shared_thresholds[key]
            if by_table[config.name].numel() != width:
                raise ValueError(f"granularity dimension needs tables of one width; {config.name} has {width}")
        for kernel in self.kernels():
            if entries_of(kernel.kernel.representation) == representation:
                kernel.shared_thresholds = [by_table[name] for name in kernel.names]

    @classmethod
    def create_grouped_sharding_infos(cls, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Put our marker in place of FBGEMM's parameters; tables with equal markers form a group."""
        infos = super().create_grouped_sharding_infos(module, *args, **kwargs)
        found: dict[str, list[EmbeddingShardingInfo]] = {}
        for kind, info in ((kind, info) for kind, own in infos.items() for info in own):
            representation = module.representations[info.embedding_config.name]
            kernel = TableKernel(representation, module.optimizer, module.seed, module.init_scale)
            info.fused_params = {KERNEL: kernel}
            found.setdefault(_EXCHANGED if _rows_travel(representation, kind) else kind, []).append(info)
        return found

    @classmethod
    def create_embedding_bag_sharding(
        cls,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        permute_embeddings: bool = False,
        qcomm_codecs_registry: Any = None,
    ) -> Any:
        """TorchRec's sharding, but for tables that every rank holds (it would use DDP) or whose rows travel."""
        kind = sharding_infos[0].param_sharding.sharding_type
        if kind == ShardingType.DATA_PARALLEL.value:
            return ReplicatedSharding(sharding_infos, env, device)
        if _rows_travel(sharding_infos[0].fused_params[KERNEL].representation, kind):
            return ExchangedSharding(sharding_infos, env, device)
        return super().create_embedding_bag_sharding(
            sharding_infos, env, device, permute_embeddings, qcomm_codecs_registry
        )

    def _create_lookups(self) -> None:
        self._divide_means(ShardingType.GRID_SHARD.value)  # as TorchRec does for row-wise and table-row-wise tables
        for kind, sharding in zip(self._sharding_types, self._embedding_shardings, strict=True):
            if isinstance(sharding, ReplicatedSharding | ExchangedSharding):
                self._lookups.append(sharding.create_lookup(self._device))
                continue
            self._lookups.append(
                PooledLookup(
                    sharding._grouped_embedding_configs_per_rank[self._env.rank],
                    pg=sharding._pg,
                    device=self._device,
                    # where rows are split, mean pooling divides after the ranks' sums were added, and ids come as rows
                    sharding_type=ShardingType.ROW_WISE if kind in ROW_SPLIT else None,
                    env=self._env,
                )
            )

    def _divide_means(self, kind: str) -> None:
        """Have TorchRec divide the tables of a sharding type by the lengths of their bags after the ranks' sums."""
        for config in self._embedding_bag_configs:
            if self.module_sharding_plan[config.name].sharding_type == kind:
                self._pooling_type_to_rs_features[config.pooling.value].extend(config.feature_names)

    def _create_input_dist(self, input_feature_names: list[str]) -> None:
        super()._create_input_dist(input_feature_names)
        self._divisor_rows = torch.tensor(self._divisors_of(input_feature_names), device=self._device)
        for kind, sharding, input_dist in zip(
            self._sharding_types, self._embedding_shardings, self._input_dists, strict=True
        ):
            if kind in ROW_SPLIT:
                # In the order of sharding.feature_names(): row-wise tables are on all ranks, others on those of a node.
                nodes = getattr(sharding, "_grouped_embedding_configs_per_node", None)
                groups = itertools.chain(*(nodes or [sharding._grouped_embedding_configs]))
                tables = itertools.chain(*(group.embedding_tables for group in groups))
                own = [self._partitions(table.name) for table in tables for _ in table.feature_names]
                if any(own):
                    input_dist.register_forward_pre_hook(lambda _, args, own=own: (bucket_rows(args[0], own),))

    def _partitions(self, table: str) -> Partitions | None:
        composed = composed_of(self.representations[table])
        return composed.partitions[table] if composed else None

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Any:
        """Send each id to the rank that has its row."""
        if features.variable_stride_per_key():
            raise ValueError("batch sizes that differ between features have no kernel yet; give each the same stride")
        awaitable = super().input_dist(ctx, features)
        if self._has_mean_pooling_callback:
            ctx.divisor = self._divisor(features)
        return awaitable

    def _divisor(self, features: KeyedJaggedTensor) -> Tensor:
        """By what the vectors [B, Σ D] are divided: where rows are split and pooled to means, by the ids of a bag.

        TorchRec's divides those of all other tables too, once more or wrongly, as soon as one table needs it.
        """
        lengths_FB = features.lengths().view(len(features.keys()), -1).float().clamp(min=1)
        one_1B = lengths_FB.new_ones(1, lengths_FB.shape[1])
        return torch.cat([lengths_FB, one_1B])[self._divisor_rows].T.repeat_interleave(self._dim_per_key, dim=1)

    def _divisors_of(self, features: list[str]) -> list[int]:
        """For the vectors in their order, the place of the feature whose bags' lengths divide them; one more for 1."""
        tables = {config.name: config for config in self._embedding_bag_configs}
        only = {feature: config.name for config in tables.values() for feature in config.feature_names}
        found = []
        for name in self._embedding_names:
            feature, _, table = name.partition("@")  # with its table, where a feature is looked up in several
            config = tables[table or only[feature]]
            split = self.module_sharding_plan[config.name].sharding_type in ROW_SPLIT
            found.append(features.index(feature) if split and config.pooling == PoolingType.MEAN else len(features))
        return found

    def kernels(self) -> Iterator[FusedEmbeddingBag]:
        """This rank's groups of tables."""
        for lookup in self._lookups:
            yield from lookup._emb_modules

    def reset_parameters(self) -> None:
        """Nothing to do: each kernel filled its shards by their place in the table."""

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        plan: EmbeddingModuleShardingPlan = self.module_sharding_plan  # type: ignore[has-type]
        masked = {name for name, own in self.representations.items() if isinstance(entries_of(own), Masked)}
        if masked:
            # Customized kernels TorchRec leaves to us; it would insist on values of the full table's shape.
            custom = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value
            self.module_sharding_plan = EmbeddingModuleShardingPlan(
                {name: replace(own, compute_kernel=custom) if name in masked else own for name, own in plan.items()}
            )
        super()._initialize_torch_state(skip_registering)
        self.module_sharding_plan = plan
        pg = self._env.process_group
        # What stands in a state dict for each key, and the tensors of this rank that it fills.
        self._sharded: dict[str, tuple[ShardedTensor, list[Tensor]]] = {
            f"embedding_bags.{name}.weight": (whole, own_parts(whole))
            for name, whole in self._model_parallel_name_to_sharded_tensor.items()
        }
        local: dict[tuple[str, str], list[tuple[ShardedEmbeddingTable, Tensor]]] = {}
        for kernel in self.kernels():
            for shard, states in kernel.row_states():
                for name, tensor in states.items():
                    local.setdefault((shard.name, name), []).append((shard, tensor))
        self._add_kept_entries()
        for config in self._embedding_bag_configs:
            for name, (dtype, one_a_row) in _expected_states(self.representations[config.name]).items():
                parts = local.get((config.name, name), [])
                tensors = [tensor for _, tensor in parts] or [torch.empty(0, dtype=dtype, device=self._device)]
                self.embedding_bags[config.name].register_buffer(name, tensors[0])
                spec = self.module_sharding_plan[config.name].sharding_spec
                if spec is None:  # every rank holds the table, so the buffer stands in the state dict as it is
                    continue
                size = torch.Size([config.num_embeddings, config.embedding_dim])
                values = spec.build_metadata(size, TensorProperties(dtype=dtype))
                own = [(shard.local_metadata, tensor) for shard, tensor in parts]
                whole = sharded_like(values, one_a_row, dtype, own, pg)
                self._sharded[f"embedding_bags.{config.name}.{name}"] = whole, tensors if parts else []
        if not skip_registering:
            self._register_state_dict_hook(_give_sharded)

    def _add_kept_entries(self) -> None:
        """Name the kept entries of masked tables, which TorchRec was told to pass over."""
        local = {
            shard.name: (shard, values)
            for kernel in self.kernels()
            for shard, values in zip(kernel.config.embedding_tables, kernel.weights, strict=True)
        }
        for config in self._embedding_bag_configs:
            entries = entries_of(self.representations[config.name])
            spec = self.module_sharding_plan[config.name].sharding_spec
            # Where every rank holds the table, its parameter stands in the state dict as it is.
            if not isinstance(entries, Masked) or spec is None:
                continue
            own = []
            if config.name in local:
                shard, values = local[config.name]
                assert shard.local_metadata is not None
                own = [(shard.local_metadata, values)]
            else:
                empty = nn.Parameter(torch.empty(0, device=self._device))
                empty._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
                self.embedding_bags[config.name].register_parameter("weight", empty)
            dtype = data_type_to_dtype(config.data_type)
            full = spec.build_metadata(
                torch.Size([config.num_embeddings, config.embedding_dim]), TensorProperties(dtype=dtype)
            )
            flat = flat_sharded(full, config.name, dtype, own, entries.masks, self._env.process_group)
            self._sharded[f"embedding_bags.{config.name}.weight"] = flat, [values for _, values in own]

    @staticmethod
    def _pre_load_state_dict_hook(self: ShardedCollection, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Fill this rank's shards; nn.Module then finds its own tensors in their place, and copies them to themselves.

        TorchRec's hook puts blocks of columns together, which must be equally wide for it.

        Raises:
            ValueError: if a table comes in other parts than it has here.
        """
        for key, (whole, tensors) in self._sharded.items():
            value = state_dict.get(prefix + key)
            if not isinstance(value, ShardedTensor):
                continue
            parts = own_parts(value)
            if len(parts) != len(whole.local_shards()):
                raise ValueError(
                    f"{key}: {len(parts)} parts came for the {len(whole.local_shards())} that this rank holds; load it "
                    "with torch.distributed.checkpoint, which fits it to another sharding"
                )
            for number, tensor in enumerate(tensors):  # one value a row comes once for all blocks of columns
                tensor.copy_(parts[min(number, len(parts) - 1)])
            table, name = key.rsplit(".", 1)
            state_dict[prefix + key] = getattr(self.get_submodule(table), name)

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """All of its parameters and buffers: DDP must neither broadcast nor reduce any of them."""
        for name, _ in itertools.chain(self.named_parameters(prefix), self.named_buffers(prefix)):
            yield name


def _rows_travel(representation: Representation, sharding_type: str) -> bool:
    """Whether vectors are no sums of what the ranks could look up of them each for itself."""
    composed = composed_of(representation)
    return composed is not None and composed.combine != Combine.ADD and sharding_type in ROW_SPLIT


def _expected_states(representation: Representation) -> dict[str, tuple[torch.dtype, bool]]:
    """What a table has beside its values, also where a rank has no shard: dtype, and whether one value a row."""
    entries = entries_of(representation)
    if not isinstance(entries, SoftThreshold):
        return {}
    seen = {"seen": (torch.bool, True)}
    if entries.replicated:
        return seen
    return {"threshold": (torch.float32, entries.shared == Shared.ROW)} | seen


def _give_sharded(module: ShardedCollection, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key, (whole, _tensors) in module._sharded.items():
        state[prefix + key] = whole


class Sharder(EmbeddingBagCollectionSharder):
    """Shards `EmbeddingBagCollection` for DistributedModelParallel.

    Not every table may have every sharding type: `thresher.embedding.sharding_types` says which, and
    `thresher.embedding.planning` has a planner that keeps to it.
    """

    def __init__(self) -> None:
        BaseEmbeddingSharder.__init__(self)

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedCollection:
        """The rank's part of the collection under a plan."""
        return ShardedCollection(module, params, env, device=device, module_fqn=module_fqn)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """What a planner may choose from, as far as the sharder knows without a table."""
        del compute_device_type
        return list(SHARDING_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Always `fused`, the name under which our kernel stands."""
        del sharding_type, compute_device_type
        return [EmbeddingComputeKernel.FUSED.value]

    @property
    def module_type(self) -> type[EmbeddingBagCollection]:
        """The collection it shards."""
        return EmbeddingBagCollection


def collections_of(model: nn.Module) -> list[ShardedCollection]:
    """The sharded collections of a model."""
    return [module for module in model.modules() if isinstance(module, ShardedCollection)]


def collection_of(model: nn.Module) -> ShardedCollection:
    """The one sharded collection of a model.

    Raises:
        ValueError: if the model has none, or several.
    """
    found = collections_of(model)
    if len(found) != 1:
        raise ValueError(f"the model has {len(found)} sharded EmbeddingBagCollections; Thresher needs exactly 1")
    return found[0]


def reduce_shared_thresholds(collection: ShardedCollection) -> None:
    """Sum the gradients of replicated thresholds over the ranks, in one all-reduce; call before the optimizer's step.

    DDP is not used for them: ranks without a table have no gradient, and its order of buckets would differ by rank.
    """
    parameters: list[nn.Parameter] = list(collection.shared_thresholds.values())
    if not parameters:
        return
    grads: list[Tensor] = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat(grads)
    dist.all_reduce(flat, group=collection._env.process_group)
    for parameter, grad in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
        parameter.grad = grad.clone()
