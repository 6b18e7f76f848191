"""Every TorchX component, as far as a dry run goes: what would be started, on one machine and on Kubernetes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torchx.runner import get_runner

from thresher import launch, trust
from thresher.cli import STAGES
from thresher.specfile import SpecError

REPOSITORY = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (REPOSITORY / "components").glob("*.py"))
COMPONENTS = [name for name in FILES if name != "serve"]  # those that take a spec
KUBERNETES = {"queue": "default", "validate_spec": False}  # False: do not ask a server


@pytest.fixture
def runner():
    with get_runner() as runner:
        yield runner


@pytest.fixture
def spec(tmp_path) -> str:
    path = tmp_path / "spec.yaml"
    path.write_text(f"data: {{format: synthetic}}\nruntime: {{run_dir: {tmp_path}/run, ranks: 2}}\n")
    return str(path)


def component(name: str) -> str:
    return f"{REPOSITORY}/components/{name}.py:{name}"


def dry_run(runner, name: str, *args: str):
    """The role, and what local_cwd would start for it."""
    info = runner.dryrun_component(component(name), list(args), "local_cwd")
    return info.app.roles[0], info.request.role_params[name][0]


def kubernetes_tasks(runner, name: str, *args: str) -> list:
    info = runner.dryrun_component(component(name), list(args), "kubernetes", cfg=KUBERNETES)
    return info.request.resource["spec"]["tasks"]


def test_there_is_a_component_for_every_stage_the_driver_a_sweep_and_a_server():
    assert set(FILES) == {*STAGES, "pipeline", "sweep", "serve"}


@pytest.mark.parametrize("name", COMPONENTS)
def test_local_command(runner, spec, name):
    role, process = dry_run(runner, name, "--spec", spec, "train.epochs=3", "prune.budgets=[0.5, 0.1]")
    assert role.name == name
    assert process.args[0] == "python3.11"
    options = {"pipeline": ["--scheduler", "local_cwd"], "sweep": ["--scheduler", "none"]}.get(name, [])
    stage = [name, "--spec", spec, *options, "train.epochs=3", "prune.budgets=[0.5, 0.1]"]
    module, torchrun = process.args[-len(stage) - 2 : -len(stage)], process.args[1 : -len(stage) - 2]
    assert process.args[-len(stage) :] == stage
    if name in {"train", "search", "retrain", "export", "evaluate"}:
        assert module == ["-m", "thresher.rank"]
        assert torchrun[:2] == ["-m", "torch.distributed.run"]
        assert {"--nproc-per-node=2", "--max-restarts=0", "--rdzv-endpoint=localhost:0"} < set(torchrun)
    else:
        assert module == ["-m", "thresher.cli"]
        assert torchrun == []
    assert process.env["OMP_NUM_THREADS"] == "1"
    assert process.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "5"


@pytest.mark.parametrize("name", COMPONENTS)
def test_kubernetes_job(runner, spec, name):
    args = ["--spec", spec, "--image", "registry/thresher:1", "--cpu", "4", "--memMB", "8000", "--env", "A=b"]
    (task,) = kubernetes_tasks(runner, name, *args)
    (container,) = task["template"].spec.containers
    assert container.image == "registry/thresher:1"
    assert container.command[0] == "python3.11"
    assert container.resources.limits == {"cpu": "4000m", "memory": "8000M"}
    assert {"A": "b", "OMP_NUM_THREADS": "1"}.items() <= {e.name: e.value for e in container.env}.items()


def test_local_jobs_run_this_python(runner, spec):
    role, process = dry_run(runner, "prepare", "--spec", spec)
    assert sys.executable not in str(role)  # it may run in a container
    path = os.pathsep.join([process.env["PATH"], os.environ["PATH"]])  # as the scheduler joins them
    assert Path(shutil.which("python3.11", path=path)).samefile(sys.executable)


def test_nodes_meet_at_the_first_one(runner, spec):
    role, process = dry_run(runner, "train", "--spec", spec, "-j", "2x1", "model.dim=8")
    assert role.num_replicas == 2
    assert process.args[:2] == ["bash", "-c"]
    command = process.args[2]
    assert '--rdzv-endpoint="${TORCHX_RANK0_HOST:=localhost}:29500"' in command
    assert "--nnodes=2 --nproc-per-node=1" in command
    assert command.endswith(f"-m thresher.rank train --spec {spec} model.dim=8")
    assert len(kubernetes_tasks(runner, "train", "--spec", spec, "-j", "2x1")) == 2


def test_the_shell_and_torchx_leave_arguments_as_they_are(runner, spec):
    path = Path(spec).rename(Path(spec).with_name("a $HOME ${app_id} 'spec'.yaml"))
    _, process = dry_run(runner, "prepare", "--spec", str(path))
    assert process.args[-1] == str(path)
    _, process = dry_run(runner, "train", "--spec", str(path), "-j", "2x1")
    words = process.args[2].partition(" thresher.rank ")[2]
    assert subprocess.check_output(["bash", "-c", f"printf %s\\\\n {words}"], text=True).splitlines()[-1] == str(path)


@pytest.mark.parametrize(
    ("j", "message"),
    [("1x4", "-j 1x4 starts 4 processes, but the spec says runtime.ranks 2; add runtime.ranks=4"), ("4", "NODESx")],
)
def test_refuses_processes_that_are_not_the_specs_ranks(runner, spec, j, message):
    with pytest.raises(ValueError, match=message):
        dry_run(runner, "train", "--spec", spec, "-j", j)


def test_j_and_the_spec_may_agree_on_other_ranks(runner, spec):
    _, process = dry_run(runner, "train", "--spec", spec, "-j", "1x4", "runtime.ranks=4")
    assert "--nproc-per-node=4" in process.args


def test_refuses_a_wrong_spec_before_any_worker_starts(runner, spec):
    with pytest.raises(SpecError, match=r"train\.epochs"):
        dry_run(runner, "train", "--spec", spec, "train.epochs=0")


def test_torchx_runs_a_component_as_the_readme_writes_it(spec):
    command = ["run", "-s", "local_cwd", "--dryrun", "components/search.py:search", "--spec", spec]
    program = "import sys; from torchx.cli.main import main; main(sys.argv[1:])"
    shown = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "torch.distributed.run" in shown.stdout


MODEL_COMPONENTS = ["evaluate", "export", "pipeline", "retrain", "search", "train"]


@pytest.mark.parametrize("name", MODEL_COMPONENTS)
def test_code_of_a_spec_runs_if_the_component_is_told_so(runner, spec, name):
    command = [name, "--spec", spec, "model.factory=towers:create"]
    assert trust.VARIABLE not in dry_run(runner, name, "--spec", spec)[0].env
    if name != "pipeline":  # the driver itself refuses
        with pytest.raises(ValueError, match=r"model\.factory towers:create: .* --trust_model_code true"):
            dry_run(runner, *command)
    role, process = dry_run(runner, name, "--trust_model_code", "true", *command[1:])
    assert role.env[trust.VARIABLE] == process.env[trust.VARIABLE] == "1"
    (task,) = kubernetes_tasks(runner, name, "--trust_model_code", "true", *command[1:])
    (container,) = task["template"].spec.containers
    assert {e.name: e.value for e in container.env}[trust.VARIABLE] == "1"


def test_env_in_a_component_adds_to_ours():
    app = launch.app("prune", "spec.yaml", [], env={"OMP_NUM_THREADS": "2", "B": "c"})
    assert app.roles[0].env == {"OMP_NUM_THREADS": "2", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", "B": "c"}


def test_a_server_is_a_job(runner):
    command = ["--model", "published/", "--port", "9000", "--memMB", "500", "--", "--host=0.0.0.0", "--name=a $b"]
    _, process = dry_run(runner, "serve", *command)
    assert process.args[1:] == [
        "-m", "thresher.cli", "serve", "--model", "published/", "--port", "9000", "--host=0.0.0.0", "--name=a $b",
    ]  # fmt: skip
    (task,) = kubernetes_tasks(runner, "serve", *command)
    (container,) = task["template"].spec.containers
    assert container.resources.limits == {"cpu": "1000m", "memory": "500M"}
    assert [port.container_port for port in container.ports] == [9000]
