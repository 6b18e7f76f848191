"""Checkpoints that are whole or absent: a fresh folder a step, a hash of every file, the marker last.

They hold the tables and their optimizer's state as sharded tensors (torch.distributed.checkpoint), so that they load
on any number of ranks and under another sharding; the dense optimizer's state; and the trainer's own, as JSON. DCP's
metadata is a pickle: load only checkpoints that your own jobs wrote.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from thresher.rundir import file_sha256, fsync_dir, read_json, write_bytes, write_json
from thresher.train.build import Job

COMMIT = "commit.json"
_NAME = re.compile(r"step-(\d{9})")
_log = logging.getLogger(__name__)


def save(job: Job, folder: Path, step: int, trainer: dict[str, Any], keep: set[int]) -> None:
    """Write the checkpoint of `step` and remove all others but those of the steps to `keep`. All ranks call it."""
    target = folder / f"step-{step:09d}"
    work = folder / f".step-{step:09d}"
    if job.ranks.first:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    job.ranks.barrier()
    dcp.save(_state(job), checkpoint_id=work / "tensors")
    job.ranks.barrier()
    if job.ranks.first:
        _commit(job, work, target, {**trainer, "step": step})
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) not in keep | {step}:
                shutil.rmtree(path)
    job.ranks.barrier()


def _commit(job: Job, work: Path, target: Path, trainer: dict[str, Any]) -> None:
    """Add what is alike on every rank, then the marker, and give the folder its name."""
    buffer = io.BytesIO()
    torch.save(job.optimizer.state_dict(), buffer)
    write_bytes(work / "dense_optimizer.pt", buffer.getvalue())
    write_json(work / "trainer.json", trainer)
    files = sorted(path for path in work.rglob("*") if path.is_file())
    write_json(work / COMMIT, {str(path.relative_to(work)): file_sha256(path) for path in files})
    shutil.rmtree(target, ignore_errors=True)
    work.rename(target)
    fsync_dir(target.parent)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose hashes hold; broken ones are passed over with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if problem := broken(path):
            _log.warning("%s; trying the checkpoint before it", problem)
        else:
            return path
    return None


def at(folder: Path, step: int) -> Path:
    """The checkpoint of one step.

    Raises:
        ValueError: if it is missing or broken.
    """
    path = folder / f"step-{step:09d}"
    if problem := broken(path):
        raise ValueError(f"{problem}; run the stage that wrote it again")
    return path


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    if not (path / COMMIT).is_file():
        return f"{path}: no committed checkpoint"
    for name, sha256 in read_json(path / COMMIT).items():
        if not (path / name).is_file() or file_sha256(path / name) != sha256:
            return f"{path / name}: missing, or changed since the checkpoint was written"
    return None


def load(job: Job, path: Path, optimizers: bool = True) -> dict[str, Any]:
    """Load a checkpoint into a model of the same tables; gives the trainer's part. All ranks call it."""
    state = _state(job)
    if not optimizers:
        del state["row_optimizer"]
    dcp.load(state, checkpoint_id=path / "tensors")
    job.model.load_state_dict(state["model"])
    if optimizers:
        job.model.fused_optimizer.load_state_dict(state["row_optimizer"])
        job.optimizer.load_state_dict(torch.load(path / "dense_optimizer.pt", weights_only=True))
    trainer: dict[str, Any] = read_json(path / "trainer.json")
    return trainer


def load_dense(job: Job, path: Path) -> None:
    """Load only the parameters outside the tables."""
    state = {"model": {name: parameter.detach() for name, parameter in job.dense.items()}}
    dcp.load(state, checkpoint_id=path / "tensors")


def _state(job: Job) -> dict[str, Any]:
    return {"model": job.model.state_dict(), "row_optimizer": job.model.fused_optimizer.state_dict()}
