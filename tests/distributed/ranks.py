"""Run a function in real processes that form a gloo group, with a deadline."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, per_node: int | None = None, deadline_s: float = 240
) -> list[Any]:
    """What `function(*args)` gives on each rank; the environment is what torchrun would set.

    With `per_node` the ranks believe that they are on several nodes.

    Raises:
        AssertionError: with the failing rank's traceback, or when the deadline has passed.
    """
    context = mp.get_context("spawn")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(rank) for rank in range(world_size)]
        processes = [
            context.Process(
                target=_rank,
                args=(rank, world_size, per_node or world_size, port, results[rank], function, args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            end = time.monotonic() + deadline_s
            while any(process.is_alive() for process in processes):
                failed = [p.exitcode for p in processes if p.exitcode]
                assert not failed, "\n".join(_failures(results)) or f"a rank died with exit code {failed[0]}"
                assert time.monotonic() < end, f"not finished after {deadline_s} s"
                time.sleep(0.05)
            assert all(path.exists() for path in results), "a rank gave no result"
            outcomes = [pickle.loads(path.read_bytes()) for path in results]
        finally:
            for process in processes:
                process.kill()
    failures = [text for ok, text in outcomes if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in outcomes]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _failures(results: list[Path]) -> list[str]:
    outcomes = [pickle.loads(path.read_bytes()) for path in results if path.exists()]
    return [text for ok, text in outcomes if not ok]


def _rank(
    rank: int, world_size: int, per_node: int, port: int, result: Path, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank % per_node),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(per_node),
        OMP_NUM_THREADS="1",
    )
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, f"rank {rank}:\n{traceback.format_exc()}")
    temporary = result.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps(outcome))
    temporary.rename(result)
    os._exit(
        0 if outcome[0] else 1
    )  # as thresher.rank does; and peers that wait for a failed rank must not be waited for
