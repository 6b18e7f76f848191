"""SSEDS: how many columns each field deserves, found in a single pass (Qu et al., SIGIR 2022).

A mask α of ones stands on the pooled vectors of a trained uniform model, ẽ_bf = α_f ⊙ e_bf. The gradient of the loss
by α, g_fj = Σ_b (∂L/∂e_bf)_j (e_bf)_j, says what leaving out column j of field f would cost. The mask commutes with the
pooling, so no table is read for it, and none is changed: one forward and one backward for each batch.

Shapes: B samples, F fields, D columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from thresher.data.loader import Batch
from thresher.models.fields import Fields
from thresher.train.build import Job


class MaskedColumns(nn.Module):
    """A collection whose pooled vectors are multiplied by a mask α [F, D]; the tables get no gradient.

    Args:
        embeddings: collection of fields that are equally wide.
        fields: their names, in the order of α.
        dim: columns D.
        device: of the vectors.
    """

    def __init__(self, embeddings: nn.Module, fields: list[str], dim: int, device: torch.device) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.names = fields
        self.alpha_FD = nn.Parameter(torch.ones(len(fields), dim, dtype=torch.float64, device=device))

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        """Masked vectors [B, D] by field."""
        with torch.no_grad():
            pooled = self.embeddings(sparse).to_dict()
        # In float64, so that the sum over the samples does not depend on how ranks share them out.
        return KeyedTensor.from_tensor_list(
            self.names,
            [
                (pooled[name].double() * alpha_D).float()
                for name, alpha_D in zip(self.names, self.alpha_FD, strict=True)
            ],
        )


def saliency(job: Job, batches: Iterable[Batch]) -> tuple[NDArray[np.float64], int]:
    """Σ |g| over the batches, divided by its sum: [F, D]; and the number of batches.

    The signed sum over a batch's samples is taken over all ranks before its absolute value, so the result does not
    depend on the number of ranks. Parameters are as before.

    Args:
        job: a trained model whose fields are equally wide.
        batches: of this rank; equally many on each.
    """
    model = job.model.module  # without DDP, which waits for gradients of the dense part
    fields = next(module for module in model.modules() if isinstance(module, Fields))
    masked = MaskedColumns(fields.embeddings, fields.names, fields.dims[0], job.ranks.device)
    fields.embeddings = masked
    total_FD, count = torch.zeros_like(masked.alpha_FD), 0
    model.eval()
    try:
        for batch in batches:
            logits = model(batch.sparse.to(job.ranks.device), batch.dense.to(job.ranks.device))
            losses = binary_cross_entropy_with_logits(logits, batch.labels.to(job.ranks.device), reduction="none")
            loss = (losses * batch.weights.to(job.ranks.device)).sum() / batch.count
            (signed_FD,) = torch.autograd.grad(loss, [masked.alpha_FD])
            dist.all_reduce(signed_FD)
            total_FD += signed_FD.abs()
            count += 1
    finally:
        fields.embeddings = masked.embeddings
        model.train()
    return (total_FD / total_FD.sum()).cpu().numpy(), count


def choose(
    saliency_FD: NDArray[np.float64],
    rows: Mapping[str, int],
    params: int,
    rank: Literal["saliency", "per_parameter"],
) -> tuple[dict[str, int], str]:
    """Columns of each field: its entries among the most salient that the budget allows.

    Entries are taken in order; one whose rows are more parameters than are left is passed over. One column is the least
    that a model can have: where the budget has not even that, the field with the fewest rows gets it.

    Args:
        saliency_FD: of each field and column.
        rows: n_f of each field, in the order of `saliency_FD`.
        params: that may stay.
        rank: `saliency` as published; `per_parameter` divides by n_f, what a column of the field costs.

    Returns:
        The fields' columns, 0 for those that leave the model, and why not exactly `params` stay; empty if they do.
    """
    names, costs_F = list(rows), np.array(list(rows.values()))
    key_FD = saliency_FD / (costs_F[:, None] if rank == "per_parameter" else 1)
    columns = dict.fromkeys(names, 0)
    left = params
    for entry in np.argsort(-key_FD, axis=None, kind="stable"):
        field = int(entry) // key_FD.shape[1]
        if costs_F[field] <= left:
            columns[names[field]] += 1
            left -= int(costs_F[field])
    if left == params:
        columns[names[int(costs_F.argmin())]] = 1
        return columns, f"one column of the field with the fewest rows is {costs_F.min()} parameters"
    return columns, "" if not left else f"{left} parameters are less than any further column takes"
