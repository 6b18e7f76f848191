"""The user's own model: imported if the user says so, and only then; and what can be wrong with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedTensor
from typer.testing import CliRunner

from thresher import cli, launch, pipeline, trust
from thresher.embedding.table_plan import FieldTable, TablePlan
from thresher.models.fields import Fields
from thresher.spec import ModelSpec
from thresher.train.build import create_model

CODE = """
from pathlib import Path

from torch import nn

Path(__file__).with_name("imported").touch()


class Sum(nn.Module):
    def __init__(self, fields, numeric, spec):
        super().__init__()
        self.fields, self.dims, self.given = fields, fields.dims, (numeric, spec)

    def forward(self, sparse, dense):
        return sum(vector.sum(1) for vector in self.fields(sparse))


def create(fields, numeric, spec):
    return Sum(fields, numeric, spec)


def uneven(fields, numeric, spec):
    return Sum(fields, numeric, spec)


uneven.equal_dims = False
number = 3


def text(fields, numeric, spec):
    return "a model"


def empty(fields, numeric, spec):
    return nn.Linear(1, 1)
"""
DIMS = {"user": 4, "item": 2}
PLAN = TablePlan(4, {name: FieldTable(dim) for name, dim in DIMS.items()})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On the Python path: a module with factories, and one that imports what is not there. Nothing is trusted."""
    (tmp_path / "own_towers.py").write_text(CODE)
    (tmp_path / "own_broken.py").write_text("import own_towers.no_such\n")
    (tmp_path / "spec.yaml").write_text(
        f"data: {{format: synthetic}}\nmodel: {{factory: own_towers:create}}\nruntime: {{run_dir: {tmp_path}/run}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(trust.VARIABLE, "")  # so that what a test sets is undone
    for module in ("own_towers", "own_broken"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield tmp_path
    for module in ("own_towers", "own_broken"):
        sys.modules.pop(module, None)


class Given(nn.Module):
    def forward(self, sparse: torch.Tensor) -> KeyedTensor:
        return KeyedTensor(list(DIMS), list(DIMS.values()), sparse)


def create(factory: str) -> nn.Module:
    return create_model(
        ModelSpec(factory=factory, name="fm", dim=4),
        Given(),
        PLAN,
        2,
    )


def test_a_factory_gets_fields_numeric_inputs_and_spec(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.VARIABLE, "1")
    model = create("own_towers:create")
    assert isinstance(model.fields, Fields)
    assert model.dims == [4, 4]  # equally wide, if it does not say otherwise
    assert model.given == (2, ModelSpec(factory="own_towers:create", name="fm", dim=4))
    assert create("own_towers:Sum").dims == [4, 4]  # a class is a function too
    assert create("own_towers:uneven").dims == [4, 2]
    vectors = torch.ones(3, sum(DIMS.values()))
    assert create("own_towers:uneven")(vectors, torch.empty(3, 0)).tolist() == [6, 6, 6]
    assert (folder / "imported").exists()


@pytest.mark.parametrize("value", ["", "0", "true", "yes"])
def test_code_that_is_not_trusted_is_never_imported(folder: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.VARIABLE, value)
    words = (
        "model.factory own_towers:create: the spec names Python code to run; if you trust it, add --trust-model-code"
    )
    with pytest.raises(ValueError, match=words):
        create("own_towers:create")
    for stage in [*sorted(cli.MODEL_STAGES), "pipeline"]:
        result = CliRunner().invoke(cli.app, [stage, "--spec", str(folder / "spec.yaml")])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {words}")
    with pytest.raises(ValueError, match=words):
        pipeline.run(folder / "spec.yaml", [])
    for stage in launch.RANKED:
        with pytest.raises(ValueError, match=words):
            launch.app(stage, str(folder / "spec.yaml"), [])
    assert CliRunner().invoke(cli.app, ["validate", "--spec", str(folder / "spec.yaml")]).exit_code == 0
    assert "own_towers" not in sys.modules
    assert not (folder / "imported").exists()
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_towers:create", "no module no_towers on the Python path; install it, or put its folder on PYTHONPATH"),
        ("own_towers.two:create", "no module own_towers.two on the Python path"),
        ("own_towers:creat", r"own_towers\.py has no creat; name a function in it"),
        ("own_towers:number", r"number is of type int; name a function \(fields, numeric, spec\)"),
        ("own_towers:text", r"returned an object of type str; return a torch\.nn\.Module"),
        ("own_towers:empty", r"returned a module without the tables; keep the fields .*: self\.fields = fields"),
    ],
)
def test_what_is_wrong_with_a_factory_is_told(
    folder: Path, factory: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del folder
    monkeypatch.setenv(trust.VARIABLE, "1")
    with pytest.raises(ValueError, match=f"^model.factory {factory}: .*{message}"):
        create(factory)


def test_a_module_that_misses_another_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del folder
    monkeypatch.setenv(trust.VARIABLE, "1")
    with pytest.raises(ModuleNotFoundError, match="own_towers"):
        create("own_broken:create")


def test_the_flag_reaches_the_stages_of_a_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("thresher.stages.train.run", lambda _: seen.append(trust.is_trusted()))
    result = CliRunner().invoke(cli.app, ["train", "--trust-model-code", "--spec", str(folder / "spec.yaml")])
    assert (result.exit_code, seen) == (0, [True])


def test_the_flag_of_the_driver_reaches_its_jobs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = str(folder / "spec.yaml")
    assert launch.app("train", spec, [], trust_model_code=True).roles[0].env[trust.VARIABLE] == "1"
    assert launch.app("train", spec, [], env={trust.VARIABLE: "1"}).roles[0].env[trust.VARIABLE] == "1"
    assert trust.VARIABLE not in launch.app("train", spec, ["model.factory=null"]).roles[0].env
    jobs: list[dict[str, str]] = []
    monkeypatch.setattr(pipeline, "run", lambda *_: jobs.append(launch.app("train", spec, []).roles[0].env))
    result = CliRunner().invoke(cli.app, ["pipeline", "--spec", spec, "--trust-model-code"])
    assert result.exit_code == 0, result.output
    assert jobs[0][trust.VARIABLE] == "1"


def test_commands_of_stages_without_a_model_have_no_such_flag(folder: Path) -> None:
    assert cli.MODEL_STAGES == launch.RANKED
    for stage in set(cli.STAGES) - cli.MODEL_STAGES:
        command = [stage, "--trust-model-code", "--spec", str(folder / "spec.yaml")]
        assert CliRunner().invoke(cli.app, command).exit_code == 2
