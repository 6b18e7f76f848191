"""The process group of a training job, and what its ranks tell each other."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from thresher.spec import Spec


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def tell(self, value: Any) -> Any:
        """The first rank's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()


@contextlib.contextmanager
def process_group(spec: Spec) -> Iterator[Ranks]:
    """Join the ranks that torchrun started; without torchrun, be a job of one.

    Raises:
        ValueError: if the device is not there, or batch or ranks cannot be shared evenly.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % local_world_size:
        raise ValueError(
            f"{world_size} ranks are not a multiple of the {local_world_size} on this node; start equally many"
        )
    if spec.train.batch_size % world_size:
        raise ValueError(
            f"train.batch_size {spec.train.batch_size} must be a multiple of the {world_size} ranks that were started"
        )
    if spec.runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device is cuda, but torch sees no GPU here; set runtime.device: cpu")
    device = torch.device(spec.runtime.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # a rank a core; FBGEMM's and our lookups do not gain from more
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=None if "RANK" in os.environ else dist.HashStore(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=spec.runtime.timeout_s),
    )
    try:
        with warnings.catch_warnings():
            # Raised inside torch and torchrec, by calls that we have no part in.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch(rec)?\.")
            yield Ranks(rank, world_size, local_world_size, device)
    finally:
        dist.destroy_process_group()
