"""Our collection under TorchRec's sharding.

Planner, input and output distribution, state dict and pipelines are TorchRec's, the kernel is ours.
TorchRec takes a kernel by name only; ours goes by `fused`, and these overrides put it in place of FBGEMM's. They
follow torchrec 1.8; a test guards the signatures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, EmbeddingComputeKernel, GroupedEmbeddingConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType

from thresher.embedding.collection import EmbeddingBagCollection
from thresher.embedding.fused import KERNEL, FusedEmbeddingBag, shard_of, sharded_like
from thresher.embedding.representation import Masked, SoftThreshold, TableKernel
from thresher.kernels.ops import Shared


class _Lookup(GroupedPooledEmbeddingsLookup):
    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup | None,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> FusedEmbeddingBag:
        del env
        return FusedEmbeddingBag(config, pg, device, sharding_type)


class ShardedCollection(ShardedEmbeddingBagCollection):
    """A rank's part of an `EmbeddingBagCollection`.

    In its state dict each table has `weight` and, by its representation, `threshold`, `seen` and `mask`, sharded like
    the weight; thresholds shared by tables or columns are the replicated parameters `shared_thresholds.*`.
    """

    def __init__(self, module: EmbeddingBagCollection, *args: Any, **kwargs: Any) -> None:
        self._representation = module.representation  # read by the hooks that super().__init__ calls
        super().__init__(module, *args, **kwargs)
        self.shared_thresholds = nn.ParameterDict()
        if isinstance(module.representation, SoftThreshold) and module.representation.replicated:
            self._share_thresholds(module.representation)

    def _share_thresholds(self, representation: SoftThreshold) -> None:
        """Make the replicated thresholds: one for all tables, or one a table, of one value or one a column."""
        by_table: dict[str, nn.Parameter] = {}
        for config in self._embedding_bag_configs:
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
            kernel.shared_thresholds = [by_table[name] for name in kernel.names]

    @classmethod
    def create_grouped_sharding_infos(cls, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Put our marker in place of FBGEMM's parameters; tables with equal markers form a group."""
        infos = super().create_grouped_sharding_infos(module, *args, **kwargs)
        kernel = TableKernel(module.representation, module.optimizer, module.seed, module.init_scale)
        for group in infos.values():
            for info in group:
                info.fused_params = {KERNEL: kernel}
        return infos

    def _create_lookups(self) -> None:
        for sharding in self._embedding_shardings:
            sharding_type = (
                ShardingType.ROW_WISE if "Rw" in type(sharding).__name__ else None
            )  # row-wise mean pooling divides after the ranks' sums were added
            self._lookups.append(
                _Lookup(
                    sharding._grouped_embedding_configs,
                    pg=sharding._pg,
                    device=self._device,
                    sharding_type=sharding_type,
                    env=self._env,
                )
            )

    def input_dist(self, ctx: Any, features: Any) -> Any:
        """Send each id to the rank that has its row."""
        awaitable = super().input_dist(ctx, features)
        if self._has_mean_pooling_callback:
            # TorchRec divides every row-wise field by its length + 1e-6, one-hot ones too, which costs the last bits.
            ctx.divisor = ctx.divisor.round().clamp_(min=1)
        return awaitable

    def kernels(self) -> Iterator[FusedEmbeddingBag]:
        """This rank's groups of tables."""
        for lookup in self._lookups:
            yield from lookup._emb_modules

    def reset_parameters(self) -> None:
        """Nothing to do: each kernel filled its shards by their place in the table."""

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        super()._initialize_torch_state(skip_registering)
        self._row_states: dict[str, ShardedTensor] = {}
        local = {shard.name: (shard, states) for kernel in self.kernels() for shard, states in kernel.row_states()}
        for config in self._embedding_bag_configs:
            for name, (dtype, width) in self._expected_states(config.embedding_dim).items():
                key = f"embedding_bags.{config.name}.{name}"
                if config.name in local:
                    shard, states = local[config.name]
                    self._row_states[key] = shard_of(states[name], shard, self._env.process_group)
                    tensor = states[name]
                else:
                    spec = self.module_sharding_plan[config.name].sharding_spec
                    assert spec is not None
                    size = torch.Size([config.num_embeddings, config.embedding_dim])
                    whole = spec.build_metadata(size, TensorProperties(dtype=dtype))
                    self._row_states[key] = sharded_like(whole, width, dtype, None, None, self._env.process_group)
                    tensor = torch.empty(0, dtype=dtype, device=self._device)
                self.embedding_bags[config.name].register_buffer(name, tensor)
        if not skip_registering:
            self._register_state_dict_hook(_give_row_states)
            self._register_load_state_dict_pre_hook(_take_row_states, with_module=True)

    def _expected_states(self, dim: int) -> dict[str, tuple[torch.dtype, int]]:
        """Names, dtypes and widths of what each table has beside its values, also where a rank has no shard of it."""
        if isinstance(self._representation, SoftThreshold):
            seen = {"seen": (torch.bool, 1)}
            if self._representation.replicated:
                return seen
            return {"threshold": (torch.float32, 1 if self._representation.shared == Shared.ROW else dim)} | seen
        return {"mask": (torch.bool, dim)} if isinstance(self._representation, Masked) else {}

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """All of its parameters and buffers: DDP must neither broadcast nor reduce any of them."""
        yield from super().sharded_parameter_names(prefix)
        for name, _ in self.named_buffers(prefix):
            yield name


def _give_row_states(module: ShardedCollection, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key, sharded in module._row_states.items():
        state[prefix + key] = sharded


def _take_row_states(module: ShardedCollection, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in module._row_states:
        value = state.get(prefix + key)
        if isinstance(value, ShardedTensor):
            shards = value.local_shards()
            state[prefix + key] = shards[0].tensor if shards else torch.empty(0, dtype=value.dtype)


class Sharder(EmbeddingBagCollectionSharder):
    """Shards `EmbeddingBagCollection` for DistributedModelParallel: table-wise and row-wise."""

    SHARDING_TYPES: ClassVar[list[str]] = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]

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
        """What the planner may choose from."""
        del compute_device_type
        return self.SHARDING_TYPES

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Always `fused`, the name under which our kernel stands."""
        del sharding_type, compute_device_type
        return [EmbeddingComputeKernel.FUSED.value]

    @property
    def module_type(self) -> type[EmbeddingBagCollection]:
        """The collection it shards."""
        return EmbeddingBagCollection


def collection_of(model: nn.Module) -> ShardedCollection:
    """The one sharded collection of a model.

    Raises:
        ValueError: if the model has none, or several.
    """
    found = [module for module in model.modules() if isinstance(module, ShardedCollection)]
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
