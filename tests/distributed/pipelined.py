"""TorchRec's overlap of input distribution and compute, on our sharded collection; importable by the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from tests.distributed import jobs
from thresher.embedding.sharding import reduce_shared_thresholds
from thresher.spec import Spec
from thresher.train import build
from thresher.train.build import Job
from thresher.train.group import process_group

STEPS = 10


@dataclass
class PipelinedBatch(Pipelineable):
    """A rank's share of a step, as TorchRec's pipelines want it."""

    sparse: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor
    scale: Tensor  # of each sample's loss

    def to(self, device: torch.device, non_blocking: bool = False) -> PipelinedBatch:
        return PipelinedBatch(
            self.sparse.to(device, non_blocking),
            *(tensor.to(device, non_blocking=non_blocking) for tensor in (self.dense, self.labels, self.scale)),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        self.sparse.record_stream(stream)


class WithLoss(nn.Module):
    """A model whose forward gives the loss, which a pipeline calls backward on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PipelinedBatch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.sparse, batch.dense)
        losses = binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        loss = (losses * batch.scale).sum()
        return loss, loss.detach()


def losses(spec: Spec, data: Path, cases: list[tuple[str, str]]) -> dict[Any, tuple[list[float], list[float]]]:
    """For each representation and sharding, this rank's losses in a plain loop and in the pipeline."""
    found = {}
    create = build.create_model
    with (
        process_group(spec) as ranks,
        mock.patch("thresher.train.build.create_model", lambda *args: WithLoss(create(*args))),
    ):
        for name, sharding in cases:
            both = []
            for run in (plain, pipelined):
                job = jobs.make_job(jobs.with_rule(jobs.with_sharding(spec, sharding), "sgd"), data, ranks, name)
                job.optimizer.register_step_pre_hook(lambda *_, job=job: reduce_shared_thresholds(job.collection))
                training = jobs.loader(spec, data, ranks, "train")
                batches = (
                    PipelinedBatch(b.sparse, b.dense, b.labels, b.weights * (ranks.world_size / b.count))
                    for b in training.epoch(0, start_step=training.steps_per_epoch - STEPS)
                )
                both.append(run(job, batches))
            found[name, sharding] = both[0], both[1]
    return found


def plain(job: Job, batches: Iterator[PipelinedBatch]) -> list[float]:
    """One step after the other."""
    found = []
    for batch in batches:
        job.optimizer.zero_grad()
        loss, _ = job.model(batch)
        loss.backward()
        job.optimizer.step()
        found.append(float(loss.detach()))
    return found


def pipelined(job: Job, batches: Iterator[PipelinedBatch]) -> list[float]:
    """The ids of the next batch travel while this one is computed."""
    found: list[float] = []
    pipeline = TrainPipelineSparseDist(job.model, job.optimizer, torch.device("cpu"))
    while True:
        try:
            found.append(float(pipeline.progress(batches)))
            assert len(pipeline._pipelined_modules) == 1
        except StopIteration:
            return found
