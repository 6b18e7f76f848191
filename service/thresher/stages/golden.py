"""Requests with the scores of the trained model: what a server checks before it serves exported tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from thresher import rundir
from thresher.spec import Spec
from thresher.stages.evaluate import round_tables
from thresher.tables import load
from thresher.tables.golden import GOLDEN, check_golden
from thresher.train.build import Job


def write_golden(spec: Spec, meta: Mapping[str, Any], job: Job, examples: Mapping[str, Any], folder: Path) -> None:
    """Score the example rows with the trained model, at the precision in which its tables are served.

    The ids come from the prepared data and the scores from torch: nothing of the exported tables is in them.

    Args:
        spec: the job.
        meta: what `prepare` found in the data.
        job: the trained model; its tables are rounded in place.
        examples: rows of the data, raw and as ids.
        folder: the finished export, which is held against the scores where it can score.

    Raises:
        ValueError: if the exported tables score otherwise.
    """
    round_tables(job, spec.export.dtype)
    scores = _scores(meta, job, examples)
    if job.ranks.first:
        rundir.write_json(folder / GOLDEN, {"columns": examples["columns"], "scores": scores})
        if (tables := load(folder)).manifest.onnx is not None:
            try:
                check_golden(tables)
            except ValueError as error:
                raise ValueError(f"{error}; export.onnx: false leaves the graph out") from None


@torch.no_grad()
def _scores(meta: Mapping[str, Any], job: Job, examples: Mapping[str, Any]) -> list[float]:
    """Every rank looks the same rows up, since each has its share of the tables."""
    bags = [bag for field in meta["fields"] for bag in examples["ids"][field["name"]]]
    sparse = KeyedJaggedTensor.from_lengths_sync(
        keys=[field["name"] for field in meta["fields"]],
        values=torch.tensor([i for bag in bags for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int64),
    )
    samples = len(bags) // len(meta["fields"])
    numeric = np.array([examples["dense"][name] for name in meta["dense"]], np.float32).reshape(-1, samples).T
    job.model.eval()
    logits = job.model(sparse.to(job.ranks.device), torch.from_numpy(numeric.copy()).to(job.ranks.device))
    job.model.train()
    scores: list[float] = torch.sigmoid(logits).cpu().tolist()
    return scores
