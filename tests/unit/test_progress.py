"""Progress: the file, the lines, the bar, and following another process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from thresher import progress as module
from thresher.progress import Board, Follower, Progress, State, describe


def plain() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=True, _environ={"TERM": "xterm"})


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def state(**changes: object) -> State:
    base: State = {
        "stage": "train",
        "state": "running",
        "done": 120,
        "total": 780,
        "unit": "step",
        "rate_per_s": 55.0,
        "eta_s": 12.0,
        "elapsed_s": 3.0,
        "metrics": {},
        "updated": 0.0,
    }
    return {**base, **changes}  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "step 120/780, 55 steps/s, ETA 12 s"),
        (
            {"metrics": {"samples_per_s": 45000.0, "loss": 0.54321}},
            "step 120/780, 45,000 samples/s, loss 0.543, ETA 12 s",
        ),
        ({"total": None, "eta_s": None, "unit": "row", "done": 1234567}, "row 1,234,567, 55 rows/s"),
        ({"rate_per_s": None, "eta_s": None}, "step 120/780"),
        ({"metrics": {"loss": None}, "eta_s": 3725.0}, "step 120/780, 55 steps/s, loss nan, ETA 1 h 02 min"),
        ({"state": "done", "done": 780, "elapsed_s": 71.6, "eta_s": None}, "step 780/780, 55 steps/s, took 1 min 12 s"),
        ({"state": "failed"}, "failed at step 120/780 after 3.0 s"),
    ],
)
def test_a_line_says_what_is_known(changes: dict[str, object], expected: str) -> None:
    assert describe(state(**changes)) == expected


def test_the_file_holds_the_last_state(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    with Progress(tmp_path, "train", 4, "step", console=plain()) as progress:
        assert json.loads(path.read_text())["done"] == 0
        progress.update(2, loss=0.7, auc=0.6)
        progress.update(4, loss=float("nan"))
    written = json.loads(path.read_text())
    assert written.keys() == State.__annotations__.keys()
    assert (written["stage"], written["done"], written["total"], written["state"]) == ("train", 4, 4, "done")
    assert written["metrics"] == {"loss": None, "auc": 0.6}
    assert written["eta_s"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"], "no temporary file stays"


def test_an_exception_leaves_failed(tmp_path: Path) -> None:
    console = plain()
    progress = Progress(tmp_path, "train", 9, "step", console=console)

    def stage() -> None:
        with progress:
            progress.update(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stage()
    written = json.loads((tmp_path / "progress.json").read_text())
    assert (written["state"], written["done"]) == ("failed", 3)
    assert text(console).startswith("train: failed at step 3/9")


def test_rate_and_eta_count_from_where_a_resumed_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    with Progress(tmp_path, "train", 1000, "step", start=500, console=plain()) as progress:
        now_s = 110.0
        progress.update(600)
        written = json.loads((tmp_path / "progress.json").read_text())
    assert written["rate_per_s"] == pytest.approx(10.0)
    assert written["eta_s"] == pytest.approx(40.0)


def test_the_rate_follows_the_last_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, done = 0.0, 0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    with Progress(tmp_path, "train", 10_000, "step", console=plain()) as progress:
        for second in range(200):
            now_s, done = float(second + 1), done + (1 if second < 100 else 10)
            progress.update(done)
        assert json.loads((tmp_path / "progress.json").read_text())["rate_per_s"] == pytest.approx(10.0)
    assert json.loads((tmp_path / "progress.json").read_text())["rate_per_s"] == pytest.approx(5.5)


def test_updates_are_written_only_now_and_then(tmp_path: Path) -> None:
    writes = 0

    class Counting(Progress):
        def _write(self, progress: State) -> None:
            nonlocal writes
            writes += 1
            super()._write(progress)

    with Counting(tmp_path, "train", 100_000, "step", console=plain()) as progress:
        for step in range(100_000):
            progress.update(step + 1, loss=0.5)
        seconds = time.monotonic() - progress._began_s
    assert writes <= 3 + seconds / module.WRITE_EVERY_S


def test_plain_lines_come_every_few_seconds_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    console = plain()
    with Progress(tmp_path, "train", 120, "step", console=console) as progress:
        for step in range(120):
            now_s += 0.1
            progress.update(step + 1, loss=0.5)
    lines = text(console).splitlines()
    assert len(lines) == 3  # at 5 s, at 10 s, at the end
    assert lines[-1] == "train: step 120/120, 10 steps/s, loss 0.5, took 12 s"


def test_other_ranks_make_no_output(tmp_path: Path) -> None:
    console = plain()
    with Progress(tmp_path, "train", 2, "step", enabled=False, console=console) as progress:
        progress.update(2)
    assert text(console) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_EVERY_S", 0.0)
    console = terminal()
    with Progress(tmp_path, "train", 2, "step", console=console) as progress:
        progress.update(1, loss=0.5)
        progress.update(2)
    assert "━" in text(console)
    assert "step 2/2" in text(console)


def test_a_metric_with_brackets_is_not_markup(tmp_path: Path) -> None:
    for console in (plain(), terminal()):
        with Progress(tmp_path, "[red]", 1, "step", console=console) as progress:
            progress.update(1)
        assert "[red]" in text(console)


def test_follower_shows_another_process_and_not_what_was_there_before(tmp_path: Path) -> None:
    with Progress(tmp_path, "prepare", 5, "row", console=plain()) as progress:
        progress.update(5)
    console = plain()
    with Follower(tmp_path, console=console) as follower:
        assert follower.poll() is None
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from pathlib import Path; from thresher.progress import Progress\n"
                "with Progress(Path(sys.argv[1]), 'train', 3, 'step') as p: p.update(3, loss=0.25)",
                str(tmp_path),
            ],
            check=True,
            capture_output=True,
        )
        last = follower.poll()
        assert last is not None
        assert last["state"] == "done"
    assert "prepare" not in text(console)
    assert text(console).count("train: step 3/3") == 1


def test_follower_waits_for_a_file_that_is_not_there(tmp_path: Path) -> None:
    with Follower(tmp_path / "absent", console=plain()) as follower:
        assert follower.poll() is None


def test_follower_gives_each_stage_its_own_bar(tmp_path: Path) -> None:
    console = terminal()
    with Follower(tmp_path, console=console) as follower:
        for budget in ("0.5", "0.2"):
            with Progress(tmp_path, f"retrain {budget}", 3, "step", console=plain()) as progress:
                progress.update(3)
            follower.poll()
    assert "retrain 0.5" in text(console)
    assert "retrain 0.2" in text(console)


@pytest.mark.parametrize("make", [terminal, plain])
def test_a_board_shows_what_runs(make: Callable[[], Console], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_EVERY_S", 0.0)
    monkeypatch.setattr(module, "BOARD_EVERY_S", 0.0)
    console = make()
    with Board("cells", 4, console) as board:
        board.show(0, 0, {"fm a": None})
        board.show(1, 1, {"fm a": state(stage="search", done=4), "fm b": state(stage="retrain", done=5)})
        board.show(2, 1, {"fm b": state(stage="retrain", done=6)})
    shown = text(console)
    for words in ("1/4 done, 1 failed", "fm a", "search: step 4/780", "retrain: step 6/780", "2/4 done, 1 failed"):
        assert words in shown
