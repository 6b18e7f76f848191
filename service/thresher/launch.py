"""What TorchX starts for each stage: one process, or torchrun with a process for every rank.

The files in `components/` and the pipeline driver both build their jobs here, so that a stage is the same job
however it was started, and from wherever the package is installed.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torchx.specs import AppDef, Resource, Role, macros

from thresher import trust
from thresher.specfile import load_spec

# The version that the package asks for, and a name that virtual environments, systems and images all have.
PYTHON = "python3.11"
RANKED = frozenset({"train", "search", "retrain", "export", "evaluate"})  # the stages with a process for every rank
RENDEZVOUS_PORT = 29500  # between nodes; on one node the system chooses a free one

ENV = {
    "OMP_NUM_THREADS": "1",  # a rank is a core's work: more threads made the lookups slower
    # Seconds that torchrun waits for its workers to end. TorchX kills torchrun after 10; the workers would stay.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
}


def app(
    stage: str,
    spec: str,
    overrides: Sequence[str],
    *,
    options: Sequence[str] = (),
    j: str | None = None,
    image: str = "thresher:latest",
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 4096,
    env: Mapping[str, str] | None = None,
    trust_model_code: bool = False,
) -> AppDef:
    """The TorchX job of one stage.

    Args:
        stage: name of the stage, or `pipeline`, or `sweep`.
        spec: path of the spec, where the job runs and here.
        overrides: `key=value`, as in the spec.
        options: further command line options of the stage.
        j: NODESxPROCESSES of a stage with ranks; default: the spec's `runtime.ranks` on one node.
        image: container image; `local_cwd` runs the installed package and ignores it.
        cpu: cores a node.
        gpu: GPUs a node.
        memory_mb: main memory a node, MB.
        env: environment variables, in addition to `ENV`.
        trust_model_code: import what `model.factory` names; also if this process may.

    Raises:
        ValueError: if the spec has errors, or names code that is not trusted, or `j` is no NODESxPROCESSES or not the
            spec's number of ranks.
    """
    trusted = {trust.VARIABLE: "1"} if trust_model_code or trust.is_trusted() else {}
    job_env = {**ENV, **trusted, **(env or {})}
    _put_python_on_path()
    arguments = [stage, "--spec", spec, *options, *overrides]
    if stage in RANKED:
        resolved = load_spec(Path(spec), overrides)
        trust.check_trust(resolved.model, job_env)
        nodes, processes = _topology(j, resolved.runtime.ranks)
        entrypoint, args = _torchrun(nodes, processes, ["-m", "thresher.rank", *arguments])
    else:
        nodes, entrypoint, args = 1, PYTHON, ["-m", "thresher.cli", *_literal(arguments)]
    role = Role(
        name=stage,
        image=image,
        entrypoint=entrypoint,
        args=args,
        env=job_env,
        num_replicas=nodes,
        resource=Resource(cpu=cpu, gpu=gpu, memMB=memory_mb),
        port_map={"c10d": RENDEZVOUS_PORT} if nodes > 1 else {},
    )
    return AppDef(name=f"thresher-{stage}", roles=[role])


def server(
    model: str,
    options: Sequence[str],
    *,
    image: str = "thresher:latest",
    cpu: int = 1,
    memory_mb: int = 2048,
    env: Mapping[str, str] | None = None,
    port: int = 8080,
) -> AppDef:
    """The TorchX job of a server.

    Args:
        model: folder of published models, where the job runs.
        options: further command line options of `thresher serve`.
        image: container image; `local_cwd` runs the installed package and ignores it.
        cpu: cores.
        memory_mb: main memory, MB.
        env: environment variables, in addition to `ENV`.
        port: that it listens on.
    """
    _put_python_on_path()
    role = Role(
        name="serve",
        image=image,
        entrypoint=PYTHON,
        args=["-m", "thresher.cli", *_literal(["serve", "--model", model, "--port", str(port), *options])],
        env={**ENV, **(env or {})},
        num_replicas=1,
        resource=Resource(cpu=cpu, gpu=0, memMB=memory_mb),
        port_map={"http": port},
    )
    return AppDef(name="thresher-serve", roles=[role])


def _put_python_on_path() -> None:
    """Let `local_cwd` jobs, which inherit our environment, find this interpreter as `PYTHON`.

    Its path does not stand in the job itself, which may run in a container.
    """
    folder = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != folder:
        os.environ["PATH"] = os.pathsep.join([folder, path])


def _topology(j: str | None, ranks: int) -> tuple[int, int]:
    """Nodes, and processes a node, that make up `ranks`."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", j or f"1x{ranks}")
    if match is None:
        raise ValueError(f"-j {j}: expected NODESxPROCESSES, such as 1x{ranks}")
    nodes, processes = int(match[1]), int(match[2])
    if nodes * processes != ranks:
        raise ValueError(
            f"-j {j} starts {nodes * processes} processes, but the spec says runtime.ranks {ranks}; "
            f"add runtime.ranks={nodes * processes}, or leave -j out"
        )
    return nodes, processes


def _torchrun(nodes: int, processes: int, command: list[str]) -> tuple[str, list[str]]:
    """Entrypoint and arguments of torchrun. It never restarts workers: with gloo, most restarts within hang."""
    options = [f"--nnodes={nodes}", f"--nproc-per-node={processes}", "--max-restarts=0", "--rdzv-backend=c10d"]
    torchrun = ["-m", "torch.distributed.run", *options]
    if nodes == 1:
        return PYTHON, [*torchrun, "--rdzv-endpoint=localhost:0", "--local-addr=localhost", *_literal(command)]
    # Only a shell in the job can read the variable in which the scheduler puts the first node's address.
    endpoint = f'--rdzv-endpoint="$${{{macros.rank0_env}:=localhost}}:{RENDEZVOUS_PORT}"'
    rendezvous = f"{endpoint} --rdzv-id={macros.app_id}"
    words = " ".join(_literal([shlex.quote(word) for word in command]))
    return "bash", ["-c", f"exec {PYTHON} {shlex.join(torchrun)} {rendezvous} {words}"]


def _literal(arguments: Sequence[str]) -> list[str]:
    """Arguments in which TorchX sees no macros."""
    return [argument.replace("$", "$$") for argument in arguments]
