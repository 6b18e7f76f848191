"""The one training loop: baseline, search and retraining all run through `fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits

from thresher.data.loader import Batch, Loader
from thresher.embedding.sharding import reduce_shared_thresholds
from thresher.progress import Progress
from thresher.train import checkpoint
from thresher.train.build import Job
from thresher.train.evaluation import Score, better, evaluate


@dataclass
class Trainer:
    """What a resumed run must know beside the tensors."""

    step: int = 0
    best_step: int = 0
    best: Score | None = None
    stale: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    search: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Trainer:
        """The trainer that a checkpoint holds."""
        best = value.pop("best")
        return cls(**value, best=Score(**best) if best else None)


def train_step(job: Job, batch: Batch, step: int) -> float:
    """Forward, backward with the tables' update in it, and the dense step; gives this rank's share of the mean loss.

    The loss is the mean over the samples of all ranks, whatever each rank got of them.

    Raises:
        FloatingPointError: if the loss is not finite; the tables are then as the last step left them.
    """
    device = job.ranks.device
    torch.manual_seed(step)  # dropout is a function of the step, so that a resumed run equals an undisturbed one
    job.optimizer.zero_grad()
    logits = job.model(batch.sparse.to(device), batch.dense.to(device))
    losses = binary_cross_entropy_with_logits(logits, batch.labels.to(device), reduction="none")
    # DDP and TorchRec divide gradients by the number of ranks, so the local sum is scaled up by it.
    loss = (losses * batch.weights.to(device)).sum() * (job.ranks.world_size / batch.count)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"step {step}: the loss is {value}; the checkpoints before it are finite. Lower "
            "train.embedding_learning_rate or train.dense_learning_rate, or check the data's numeric fields"
        )
    loss.backward()
    reduce_shared_thresholds(job.collection)
    if job.train.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(list(job.dense.values()), job.train.clip_norm)
    job.optimizer.step()
    return value


def fit(
    job: Job,
    loader: Loader,
    validation: Loader,
    folder: Path,
    progress: Progress,
    *,
    before_step: Callable[[Trainer, float], None] | None = None,
    stop_early: bool = True,
    done_before: int = 0,
) -> Trainer:
    """Train until the epochs are over or validation AUC stops rising; resumes from the folder's newest checkpoint.

    Args:
        job: the model, left with the weights of its best validation (of its last step without `stop_early`).
        loader: training samples.
        validation: validation samples.
        folder: of the checkpoints; holds that of the best step when training is over.
        progress: told every step.
        before_step: called before each step with the trainer and the mean loss of the step before.
        stop_early: stop after `train.patience` validations without a better AUC.
        done_before: steps to add to those that progress shows.
    """
    train = job.train
    trainer = Trainer()
    found = job.ranks.tell(str(checkpoint.newest(folder) or "") if job.ranks.first else None)
    if found:
        trainer = Trainer.from_json(checkpoint.load(job, Path(found)))
    began = time.monotonic() - trainer.seconds  # as if it had run without a break
    total = train.epochs * loader.steps_per_epoch
    eval_every = train.eval_every or loader.steps_per_epoch
    checkpoint_every = train.checkpoint_every or eval_every
    loss, losses = math.nan, []
    for epoch, batch in _batches(loader, trainer.step, train.epochs):
        if stop_early and trainer.stale >= train.patience:
            break
        if before_step is not None:
            before_step(trainer, loss)
        loss = _mean_over_ranks(job, train_step(job, batch, trainer.step))
        losses.append(loss)
        trainer.step += 1
        progress.update(done_before + trainer.step, loss=loss)
        save = trainer.step % checkpoint_every == 0
        if trainer.step % eval_every == 0 or trainer.step == total:
            now = evaluate(job, validation)
            trainer.history.append(
                {
                    "step": trainer.step,
                    "epoch": epoch + 1,
                    "train_loss": sum(losses) / len(losses),
                    "validation_auc": now.auc,
                    "validation_logloss": now.logloss,
                }
            )
            losses.clear()
            progress.update(done_before + trainer.step, loss=loss, validation_auc=now.auc)
            improved = better(now, trainer.best)
            trainer.stale = 0 if improved else trainer.stale + 1
            if improved or not stop_early:
                trainer.best, trainer.best_step, save = now, trainer.step, True
        if save:
            trainer.seconds = time.monotonic() - began
            checkpoint.save(job, folder, trainer.step, asdict(trainer), keep={trainer.best_step})
    if before_step is not None:
        before_step(trainer, loss)
    if trainer.best_step != trainer.step:
        checkpoint.load(job, checkpoint.at(folder, trainer.best_step))
    trainer.seconds = time.monotonic() - began
    return trainer


def _batches(loader: Loader, step: int, epochs: int) -> Iterator[tuple[int, Batch]]:
    """Batches from a global step on, each with its epoch."""
    first, within = divmod(step, loader.steps_per_epoch)
    for epoch in range(first, epochs):
        for batch in loader.epoch(epoch, start_step=within if epoch == first else 0):
            yield epoch, batch


def _mean_over_ranks(job: Job, value: float) -> float:
    """Mean of the ranks' values; their losses are scaled so that this is the mean over all samples."""
    if job.ranks.world_size == 1:
        return value
    total = torch.tensor([value], dtype=torch.float64, device=job.ranks.device)
    dist.all_reduce(total)
    return float(total) / job.ranks.world_size
