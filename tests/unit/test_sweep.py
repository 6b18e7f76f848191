"""The driver of a sweep, with stages that take no time: what it runs, shares, survives and leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.unit import fake_cells
from thresher import rundir, sweep

CELLS = ["fm/a/1", "fm/a/2", "fm/b/1", "fm/b/2"]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake_cells.substitute(monkeypatch)
    return fake_cells.write_spec(tmp_path)


def ran(spec: Path) -> Counter[str]:
    """What ran since the last call: each cell once for its search, and shared work."""
    path = spec.parent / "run" / "ran"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return Counter(line.split()[0] for line in lines if line.split()[1] in ("prepare", "train", "search"))


def results(spec: Path) -> dict:
    return rundir.read_json(spec.parent / "run" / "sweep.json")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(what: str, condition: object) -> None:
    until_s = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until_s, what
        time.sleep(0.02)


def test_shared_work_is_done_once_and_cells_all(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.run(spec, [])
    assert ran(spec) == {"data": 2, "baseline": 2, **dict.fromkeys(CELLS, 1)}
    out = capsys.readouterr().out
    assert "fm a seed 1: done in" in out
    assert "test AUC: uniform 0.7510, 0.5 0.7510, 0.2 0.7450" in out
    assert results(spec)["cells"] == {f"fm {method} seed {seed}": "done" for method in "ab" for seed in (1, 2)}
    assert len(results(spec)["rows"]) == 4 * 3 * 2
    for name in ("sweep.md", "sweep.html"):
        assert (spec.parent / "run" / name).stat().st_size > 500

    sweep.run(spec, [])
    assert ran(spec) == {}
    assert "4 of 4 cells: done before" in capsys.readouterr().out


def test_cells_read_the_shared_folders(spec: Path) -> None:
    sweep.run(spec, [])
    run = spec.parent / "run"
    for name in ("data", "baseline"):
        folders = {cell: (run / "cells" / cell / name).resolve() for cell in CELLS}
        assert folders["fm/a/1"] == folders["fm/b/1"] != folders["fm/a/2"] == folders["fm/b/2"]
        assert all(folder.is_relative_to((run / "shared").resolve()) for folder in folders.values())


def test_only_what_changed_runs_again(spec: Path) -> None:
    sweep.run(spec, [])
    ran(spec)
    (spec.parent / "run/cells/fm/a/2/metrics.json").write_text("[]")
    sweep.run(spec, [])
    assert ran(spec) == {"fm/a/2": 1}
    sweep.run(spec, ["sweep.methods.b.search.granularity=feature"])
    assert ran(spec) == {"fm/b/1": 1, "fm/b/2": 1}
    sweep.run(spec, ["sweep.methods.b.search.granularity=feature", "sweep.seeds=[2, 3]"])
    assert ran(spec) == {"data": 1, "baseline": 1, "fm/a/3": 1, "fm/b/3": 1}
    sweep.run(spec, ["sweep.methods.b.search.granularity=feature", "sweep.methods.a.train.epochs=3"])
    assert ran(spec) == {"baseline": 2, "fm/a/1": 1, "fm/a/2": 1}  # another uniform model; the data stay


def test_shared_folders_may_be_removed_when_all_is_done(spec: Path) -> None:
    sweep.run(spec, [])
    ran(spec)
    shutil.rmtree(spec.parent / "run/shared")
    sweep.run(spec, [])
    assert ran(spec) == {}
    (spec.parent / "run/cells/fm/a/2/metrics.json").unlink()
    sweep.run(spec, [])
    assert ran(spec) == {"data": 1, "baseline": 1, "fm/a/2": 1}


@pytest.mark.parametrize(
    ("do", "error"),
    [
        ("raise", "RuntimeError: table genres: the cause of it all\nand more of it"),
        ("exit", "exit code 3"),
        ("kill", "killed by SIGKILL (out of memory?)"),
    ],
)
def test_a_failed_cell_is_marked_and_the_rest_goes_on(
    spec: Path, do: str, error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_CELLS", json.dumps({"fm/a/2": do}))
    with pytest.raises(SystemExit) as stopped:
        sweep.run(spec, [])
    assert stopped.value.code == 1
    assert f"fm a seed 2: failed: {error.splitlines()[0]}" in capsys.readouterr().out
    found = results(spec)
    assert found["failures"] == {"fm a seed 2": error}
    assert Counter(found["cells"].values()) == {"done": 3, "failed": 1}
    run = spec.parent / "run"
    assert rundir.read_json(run / "cells/fm/a/2/job.json")["error"] == error
    assert error.splitlines()[0] in (run / "sweep.html").read_text()
    assert error.splitlines()[0] in (run / "sweep.md").read_text()
    assert [(r["method"], r["auc"]["n"]) for r in found["results"] if r["budget"] == "0.5"] == [("a", 1), ("b", 2)]
    ran(spec)

    monkeypatch.delenv("FAKE_CELLS")
    sweep.run(spec, [])
    assert ran(spec) == {"fm/a/2": 1}
    assert results(spec)["failures"] == {}


def test_where_shared_work_fails_its_cells_say_so(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CELLS", json.dumps({"baseline": "raise"}))
    with pytest.raises(SystemExit):
        sweep.run(spec, [])
    assert ran(spec) == {"data": 2, "baseline": 2}
    assert set(results(spec)["cells"].values()) == {"failed"}
    why = results(spec)["failures"]["fm b seed 2"]
    assert why.startswith("fm uniform seed 2 failed: RuntimeError: table genres: the cause of it all")
    assert "No cell has finished" in (spec.parent / "run/sweep.html").read_text()


@pytest.mark.parametrize("parallel", [1, 3])
def test_no_more_run_at_once_than_allowed(parallel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cells.substitute(monkeypatch)
    spec = fake_cells.write_spec(tmp_path, parallel=parallel)
    sweep.run(spec, [])
    spans: dict[str, list[float]] = {}
    for line in (tmp_path / "run/ran").read_text().splitlines():
        _, _, pid, at = line.split()
        spans.setdefault(pid, []).append(float(at))
    most = max(sum(min(s) <= start <= max(s) for s in spans.values()) for start in map(min, spans.values()))
    assert most <= parallel
    if parallel == 3:
        assert most > 1


def start(spec: Path, **do: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, fake_cells.__file__, "drive", spec],
        env={**os.environ, "FAKE_CELLS": json.dumps({cell.replace("_", "/"): what for cell, what in do.items()})},
        stdout=subprocess.DEVNULL,
    )


def pids(spec: Path, cell: str) -> list[int]:
    path = spec.parent / "run" / "ran"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split()[2]) for line in lines if line.split()[0] == cell]


def test_a_killed_sweep_continues(spec: Path) -> None:
    driver = start(spec, fm_a_2="hang")
    try:
        finished = spec.parent / "run/cells/fm/b/2/metrics.json"
        wait_for("the other cells to finish", lambda: finished.exists() and pids(spec, "fm/a/2"))
        wait_for("them to be noted", lambda: rundir.read_json(finished.with_name("job.json"))["state"] == "done")
        (hanging,) = pids(spec, "fm/a/2")
        assert alive(hanging)
    finally:
        driver.kill()
        driver.wait()
    assert ran(spec) == {"data": 2, "baseline": 2, **dict.fromkeys(CELLS, 1)}

    sweep.run(spec, [])  # at once: the killed sweep's worker may still be ending
    assert not alive(hanging)
    assert ran(spec) == {"fm/a/2": 1}
    assert set(results(spec)["cells"].values()) == {"done"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_sweep_leaves_no_process_and_what_it_has(spec: Path, number: int, code: int) -> None:
    driver = start(spec, fm_a_2="hang", fm_b_1="hang")
    try:
        wait_for("both to hang", lambda: pids(spec, "fm/a/2") and pids(spec, "fm/b/1"))
        workers = pids(spec, "fm/a/2") + pids(spec, "fm/b/1")
        driver.send_signal(number)
        assert driver.wait(20) == code
    finally:
        driver.kill()
    assert not any(map(alive, workers))
    assert results(spec)["cells"]["fm a seed 1"] == "done"
    assert results(spec)["cells"]["fm a seed 2"] == "missing"
    ran(spec)

    sweep.run(spec, [])
    assert ran(spec) == {"fm/a/2": 1, "fm/b/1": 1, "fm/b/2": 1}


def test_refuses_before_anything_starts(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        rundir.lease(spec.parent / "run", "thresher sweep", name="sweep-lease"),
        pytest.raises(ValueError, match=f"in use by .*process {os.getpid()}"),
    ):
        sweep.run(spec, [])
    with pytest.raises(ValueError, match="sweep: this section is missing"):
        sweep.run(spec, ["sweep=null"])
    with pytest.raises(ValueError, match=r"scheduler nowhere: expected one of none, .*local_cwd"):
        sweep.run(spec, [], "nowhere")
    monkeypatch.setattr(sweep, "check", lambda _: ["fields.age: no such column"])
    with pytest.raises(ValueError, match="age: no such column"):
        sweep.run(spec, [])
    assert ran(spec) == {}


def test_a_link_replaces_whatever_stood_there(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "shared" / name).mkdir(parents=True)
    link = tmp_path / "cell"
    (link / "inside").mkdir(parents=True)
    for name in ("one", "one", "two"):
        sweep._link(link, tmp_path / "shared" / name)
        assert link.resolve() == (tmp_path / "shared" / name).resolve()


def test_publishing_over_a_link_leaves_what_it_led_to(tmp_path: Path) -> None:
    shared, output = tmp_path / "shared", tmp_path / "cell" / "data"
    shared.mkdir()
    (shared / "theirs").touch()
    output.parent.mkdir()
    sweep._link(output, shared)
    for number in (1, 2):
        (rundir.start(output, {"of": number}) / "own").touch()
        rundir.publish(output, {"of": number}, 0.0)
    assert (shared / "theirs").exists()
    assert not output.is_symlink()
    assert rundir.is_complete(output, {"of": 2})
