"""A job of a sweep: its stages one after another in one process, which imports torch once.

`python -m thresher.worker --spec FILE STAGE…`; the sweep starts it, and it ends with the sweep, however that ends.
With several ranks, or on a scheduler, the stages are TorchX jobs as `thresher pipeline` starts them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from thresher import rundir
from thresher.specfile import load_spec

LEASE_S = 30.0  # that an older worker may take to end after its sweep was killed


def main() -> None:
    """Run the stages that the command line names."""
    parser = argparse.ArgumentParser(prog="thresher.worker")
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--scheduler", default="none")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spec = load_spec(arguments.spec)
    with _only_worker(Path(spec.runtime.run_dir)):
        if arguments.scheduler == "none" and spec.runtime.ranks == 1:
            for stage in arguments.stages:
                importlib.import_module(f"thresher.stages.{stage}").run(spec)
        else:
            scheduler = "local_cwd" if arguments.scheduler == "none" else arguments.scheduler
            importlib.import_module("thresher.pipeline").run(arguments.spec, [], scheduler, arguments.stages)


def _end_with_parent() -> None:
    """Stop this process when the other end of its input closes: the sweep that holds it is gone."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _only_worker(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; wait for a worker that has yet to notice that its sweep was killed."""
    until_s = time.monotonic() + LEASE_S
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(rundir.lease(run_dir, "thresher sweep", name="worker-lease"))
            except ValueError:
                if time.monotonic() > until_s:
                    raise
            else:
                yield
                return
        time.sleep(0.1)


if __name__ == "__main__":
    main()
    # As in `rank`: gloo's threads may abort a process that is being taken down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
