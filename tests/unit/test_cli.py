"""The command line: what each command hands on, and how mistakes are told."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from thresher.cli import STAGES, app
from thresher.spec import Spec
from thresher.specdoc import spec_markdown
from thresher.tables import Writer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text("data: {format: synthetic}\ntrain:\n  epochs: 2\n")
    return path


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    """Put a module with these functions in the place of another one."""
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gets_the_resolved_spec(stage: str, spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Spec] = []
    stub(monkeypatch, f"thresher.stages.{stage}", run=ran.append)
    result = CliRunner().invoke(app, [stage, "--spec", str(spec_file), "seed=7", "prune.budgets=[0.5, 100]"])
    assert result.exit_code == 0, result.output
    (spec,) = ran
    assert (spec.seed, spec.train.epochs, spec.prune.budgets) == (7, 2, [0.5, 100])


def test_a_mistake_is_one_message_without_a_traceback(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(spec: Spec) -> None:
        del spec
        raise ValueError("data.path: no such folder; give one that is there")

    monkeypatch.setitem(run.__globals__, "__package__", "thresher.stages")
    stub(monkeypatch, "thresher.stages.prepare", run=run)
    result = CliRunner().invoke(app, ["prepare", "--spec", str(spec_file)])
    assert result.exit_code == 2
    assert result.stderr == "error: data.path: no such folder; give one that is there\n"
    assert result.stdout == ""


@pytest.mark.parametrize("bug", [lambda _: json.loads("{"), lambda _: [][0]])
def test_a_bug_keeps_its_traceback(bug: object, spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "thresher.stages.prepare", run=bug)
    result = CliRunner().invoke(app, ["prepare", "--spec", str(spec_file)])
    assert result.exit_code == 1
    assert result.exception is not None
    assert result.stderr == ""


def test_pipeline_gets_what_the_user_gave(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[object, ...]] = []
    stub(monkeypatch, "thresher.pipeline", run=lambda *arguments: ran.append(arguments))
    arguments = ["pipeline", "--spec", str(spec_file)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "--scheduler", "kubernetes", "seed=3", "train.epochs=1"]).exit_code == 0
    assert ran == [(spec_file, [], "local_cwd"), (spec_file, ["seed=3", "train.epochs=1"], "kubernetes")]


def test_validate_says_ok_in_one_line(spec_file: Path) -> None:
    result = CliRunner().invoke(app, ["validate", "--spec", str(spec_file), "prune.budgets=[0.5, 2000]"])
    assert result.exit_code == 0
    assert result.stdout.startswith(
        f"OK: {spec_file}: synthetic data, deepfm of dimension 16, pep to budgets 0.5, 2000p"
    )
    assert result.stdout.count("\n") == 1


def test_validate_lists_all_errors(spec_file: Path) -> None:
    spec_file.write_text("data: {format: synthetic}\ntrain: {epochs: 0}\ntrian: {}\n")
    result = CliRunner().invoke(app, ["validate", "--spec", str(spec_file), "seed=x"])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[0] == "error: 3 errors in the spec"
    assert [line.partition(": ")[0] for line in lines[1:]] == [
        f"{spec_file}:2:9",
        f"{spec_file}:3:1",
        "override seed=x",
    ]


def test_validate_data_lists_all_differences(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    differences: list[str] = []
    stub(monkeypatch, "thresher.data.prepare", check=lambda _: differences)
    arguments = ["validate", "--data", "--spec", str(spec_file)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    differences += ["data.fields.a: no column a", "data.label.column: no column y"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    for difference in differences:
        assert f"{spec_file}: {difference}" in result.stderr.splitlines()


def test_usage_mistakes_are_told() -> None:
    for arguments in (["trane"], ["train"], ["train", "--spec"], ["--no-such-option"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2


def test_schema_is_json_schema_of_the_spec() -> None:
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == Spec.model_json_schema()


def test_committed_reference_is_what_the_schema_makes() -> None:
    result = CliRunner().invoke(app, ["schema", "--markdown"])
    assert result.stdout == (ROOT / "docs" / "spec.md").read_text(), "run: thresher schema --markdown > docs/spec.md"


def test_reference_names_every_key() -> None:
    reference = spec_markdown()
    for definition in [Spec.model_json_schema(), *Spec.model_json_schema()["$defs"].values()]:
        for key in definition["properties"]:
            assert f"| `{key}` | " in reference


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"thresher": "1.2.3"}[name])
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "1.2.3\n")


def test_as_a_process_without_torch(spec_file: Path) -> None:
    """What a shell sees: exit codes, stderr; and that reading a spec loads no torch."""
    code = "import sys; sys.modules['torch'] = None; from thresher.cli import main; main()"
    run = [sys.executable, "-c", code]
    good = subprocess.run([*run, "validate", "--spec", spec_file], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    bad = subprocess.run(
        [sys.executable, "-m", "thresher.cli", "validate", "--spec", f"{spec_file}.not"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert bad.returncode == 2
    assert bad.stderr.startswith(f"error: {spec_file}.not: no such file;")
    assert bad.stderr.count("\n") == 1


def test_tables_are_inspected_and_verified(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    writer = Writer(folder, model="deepfm", seed=0, budget=0.5, spec_fingerprint="0" * 64)
    with writer.table("users", dim=4, rows_by_kept=[0, 0, 0, 0, 3], dtype="fp16") as table:
        table.write(np.ones((3, 4), np.float32))
    writer.field("user", table="users", kind="categorical", encoding="vocabulary", keys=["a", "b"])
    writer.finish()
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0
    assert all(word in shown.output for word in ("deepfm", "users", "dense", "fp16", "100.00%", "user"))
    verified = CliRunner().invoke(app, ["verify", str(folder)])
    assert (verified.exit_code, verified.output[:4]) == (0, "OK: ")
    path = folder / "tables" / "users.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    damaged = CliRunner().invoke(app, ["verify", str(folder)])
    assert damaged.exit_code == 2
    assert "users.safetensors: does not have the SHA-256 of the manifest" in damaged.output
    assert "manifest.json: not there" in CliRunner().invoke(app, ["inspect", str(tmp_path)]).output
