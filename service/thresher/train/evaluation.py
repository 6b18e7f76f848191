"""AUC and log loss over all ranks' samples together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc

from thresher.data.loader import Loader
from thresher.train.build import Job


@dataclass(frozen=True)
class Score:
    """Quality on one split."""

    auc: float
    logloss: float


def score(logits: Tensor, labels: Tensor) -> Score:
    """AUC and mean log loss (natural logarithm) of logits [B] for labels 0 and 1.

    Raises:
        ValueError: if a logit is not finite, or there is one class only.
    """
    logits = logits.double()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} predictions are not finite; "
            "lower train.embedding_learning_rate or train.dense_learning_rate"
        )
    if labels.min() == labels.max():
        raise ValueError(f"all {labels.numel()} labels are {labels[0]:g}; AUC needs both classes: change data.split")
    auc = binary_auroc(torch.sigmoid(logits), labels.long(), validate_args=False)
    return Score(float(auc), float(binary_cross_entropy_with_logits(logits, labels.double())))


@torch.no_grad()
def evaluate(job: Job, loader: Loader) -> Score:
    """Score the model on a split, alike on every rank: predictions are gathered, not the ranks' scores averaged."""
    job.model.eval()
    parts = []
    for batch in loader.epoch(0):
        logits = job.model(batch.sparse.to(job.ranks.device), batch.dense.to(job.ranks.device))
        parts.append(torch.stack([logits.cpu(), batch.labels, batch.weights]))
    job.model.train()
    own = torch.cat(parts, dim=1).to(job.ranks.device)
    gathered = [torch.empty_like(own) for _ in range(job.ranks.world_size)]
    dist.all_gather(gathered, own)
    logits, labels, weights = torch.cat(gathered, dim=1).cpu()
    return score(logits[weights > 0], labels[weights > 0])


def better(new: Score, best: Score | None) -> bool:
    """Whether a validation is the best so far."""
    return best is None or (math.isfinite(new.auc) and new.auc > best.auc)
