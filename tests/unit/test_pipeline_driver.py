"""The driver of the pipeline, with stages that take no time: what it runs, skips, shows and leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit import fake_stages
from thresher import pipeline, rundir

STAGES = list(pipeline.STAGES)


@pytest.fixture
def spec(tmp_path, monkeypatch):
    fake_stages.substitute(monkeypatch, ranked=False)
    return fake_stages.write_spec(tmp_path)


def launched(spec: Path) -> list[str]:
    """The stages launched since the last call."""
    path = spec.parent / "launched"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.split()[0] for line in lines]


def states(spec: Path) -> dict[str, str]:
    return {stage: record["state"] for stage, record in rundir.read_json(spec.parent / "run/pipeline.json").items()}


def test_runs_all_stages_once_and_prints_the_results(spec, capsys):
    pipeline.run(spec, [])
    assert launched(spec) == STAGES
    assert states(spec) == dict.fromkeys(STAGES, "succeeded")
    out = capsys.readouterr().out
    assert "0.7500" in out
    assert "3,200" in out
    assert out.count("fm uniform") == 1  # the test split alone
    assert "report.html" in out

    pipeline.run(spec, [])
    assert launched(spec) == []
    assert "report.html" in capsys.readouterr().out


def test_another_spec_runs_all_stages_again(spec):
    pipeline.run(spec, [])
    launched(spec)
    pipeline.run(spec, ["seed=1"])
    assert launched(spec) == STAGES


@pytest.mark.parametrize("harm", ["remove", "replace"])
def test_a_changed_output_runs_its_stage_and_all_after_it(spec, harm):
    pipeline.run(spec, [])
    launched(spec)
    marker = spec.parent / "run/schemes/0.2/stage.json"
    if harm == "remove":
        marker.unlink()
    else:
        marker.write_text('{"inputs": "of another job", "seconds": 0}')
    pipeline.run(spec, [])
    assert launched(spec) == STAGES[STAGES.index("prune") :]


def test_continues_after_a_failure_and_shows_its_cause(spec, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_PRUNE", "raise")
    with pytest.raises(SystemExit) as stopped:
        pipeline.run(spec, [])
    assert stopped.value.code == 1
    err = capfd.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "RuntimeError: table genres: the cause of it all" in err
    assert str(spec.parent / "run/logs/prune") in err
    assert states(spec) == {"prepare": "succeeded", "train": "succeeded", "search": "succeeded", "prune": "failed"}
    launched(spec)

    monkeypatch.delenv("FAKE_PRUNE")
    pipeline.run(spec, [])
    assert launched(spec) == STAGES[STAGES.index("prune") :]


def test_shows_the_traceback_of_the_rank_that_failed(tmp_path, monkeypatch, capfd):
    fake_stages.substitute(monkeypatch, ranked=True)
    monkeypatch.setenv("FAKE_TRAIN", "raise")  # rank 1 raises, rank 0 would sleep on
    with pytest.raises(SystemExit) as stopped:
        pipeline.run(fake_stages.write_spec(tmp_path), [])
    assert stopped.value.code == 1
    err = capfd.readouterr().err
    assert "RuntimeError: table genres: the cause of it all" in err
    assert "ChildFailedError" not in err  # what torchrun has to say about it
    assert err.count("Traceback") == 1


def test_refuses_before_anything_starts(spec, monkeypatch):
    with pytest.raises(ValueError, match=r"scheduler nowhere: expected one of .*local_cwd"):
        pipeline.run(spec, [], "nowhere")
    monkeypatch.setattr(pipeline, "check", lambda _: ["fields.age: no such column", "label: no such column"])
    with pytest.raises(ValueError, match="age: no such column\nlabel"):
        pipeline.run(spec, [])
    assert launched(spec) == []


def test_refuses_a_second_driver(spec):
    with (
        rundir.lease(spec.parent / "run", "thresher pipeline", name="pipeline-lease"),
        pytest.raises(ValueError, match=f"in use by .*process {os.getpid()}"),
    ):
        pipeline.run(spec, [])
    assert launched(spec) == []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_driver_leaves_no_process(tmp_path, number, code):
    spec = fake_stages.write_spec(tmp_path)
    driver = subprocess.Popen(
        [sys.executable, fake_stages.__file__, "drive", spec], env={**os.environ, "FAKE_TRAIN": "hang"}
    )
    try:
        log = spec.parent / "launched"
        deadline_s = time.monotonic() + 30
        while not log.exists() or log.read_text().count("train") < 2:
            assert time.monotonic() < deadline_s, "the ranks did not start"
            assert driver.poll() is None, "the driver has ended"
            time.sleep(0.05)
        ranks = [int(line.split()[2]) for line in log.read_text().splitlines() if line.startswith("train")]
        assert all(map(alive, ranks))
        driver.send_signal(number)
        assert driver.wait(20) == code
    finally:
        driver.kill()
    assert not any(map(alive, ranks))
    assert states(spec)["train"] == "cancelled"
