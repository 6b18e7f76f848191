"""What every stage does around its work: the lease, the check for a finished output, and the publishing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher import rundir
from thresher.rundir import RunDir
from thresher.spec import Spec

if TYPE_CHECKING:  # prepare needs no torch, which takes a second to import
    from thresher.train.group import Ranks


@contextlib.contextmanager
def run_lease(spec: Spec, stage: str, ranks: Ranks | None = None) -> Iterator[RunDir]:
    """Hold the run directory for a stage; with several ranks the first holds it for all.

    Raises:
        ValueError: on every rank, if another process holds it.
    """
    run = RunDir(Path(spec.runtime.run_dir))
    with contextlib.ExitStack() as stack:
        refused = None
        if ranks is None or ranks.first:
            try:
                stack.enter_context(rundir.lease(run.path, stage))
                rundir.write_json(run.path / "spec.json", spec.model_dump(mode="json"))
            except ValueError as error:
                if ranks is None:
                    raise
                refused = str(error)
        if ranks is not None and (refused := ranks.tell(refused)):
            raise ValueError(refused)
        yield run


@contextlib.contextmanager
def building(stage: str, output: Path, inputs: Mapping[str, Any], ranks: Ranks | None = None) -> Iterator[Path | None]:
    """A folder to make `output` in, or None where it is complete and made from the same inputs.

    The folder is given its name when the block ends well. After a failure it stays, so that the next try goes on.
    """
    first = ranks is None or ranks.first
    complete = first and rundir.is_complete(output, inputs)
    if ranks is not None:
        complete = ranks.tell(complete)
    if complete:
        if first:
            print(f"{stage}: {output} is up to date", flush=True)  # noqa: T201 - what the user asked to know
        yield None
        return
    began = time.monotonic()
    work = rundir.start(output, inputs) if first else rundir.working_folder(output, inputs)
    if ranks is not None:
        ranks.barrier()
    yield work
    if ranks is not None:
        ranks.barrier()
    if first:
        rundir.publish(output, inputs, time.monotonic() - began)


def inputs_of(spec: Spec, sections: list[str], **upstream: Path) -> dict[str, Any]:
    """What an output is made from: parts of the spec, the seed, and the finished outputs of other stages."""
    parts = spec.model_dump(mode="json")
    return {
        **{name: rundir.fingerprint(parts[name]) for name in sections},
        "seed": spec.seed,
        **{name: rundir.made_from(path) for name, path in upstream.items()},
    }
