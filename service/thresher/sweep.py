"""A sweep: every cell of methods × models × seeds as a run of its own, several at once, then one table and one page.

Cells of the same data share the prepared data, and those of the same model and seed the uniform model too: folders
below `<run_dir>/shared/`, named by what they are made from, to which a cell's `data` and `baseline` are links. Making
one is a job of its own, and the cells that need it wait. Each job is a process (`worker.py`), so that one that dies
harms no other; its output goes to `log.txt` in its folder. `job.json` there says how a cell ended: it is done if it
ended well with the same spec on the same raw data, and its metrics are still what it left.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torchx.runner import get_runner

from thresher import launch, rundir, signals
from thresher.budget import budget_name
from thresher.cells import Cell, expand
from thresher.data.check import check
from thresher.progress import Board, State
from thresher.report import environment
from thresher.report.numbers import score
from thresher.report.sweep_summary import Summary, summarize
from thresher.rundir import MARKER, RunDir
from thresher.spec import Spec
from thresher.specfile import load_spec
from thresher.stages import prepare

# Without the report, which can take longer than a training; `thresher report --spec CELL/spec.json` makes a cell's.
CELL_STAGES = ("prepare", "train", "search", "prune", "retrain", "export", "evaluate")
POLL_S = 0.1
STOP_S = 20.0  # that a worker told to stop may take; with ranks it first waits for its own job
ERROR_LINES = 6
TABLE_WIDTH = 140  # columns, where there is no terminal


@dataclass(frozen=True)
class Job:
    """Work that one process does in a run directory."""

    name: str
    path: Path
    spec: Spec
    stages: tuple[str, ...]
    made_from: str  # fingerprint
    needs: tuple[Job, ...] = ()
    cell: Cell | None = None  # None: shared work

    @cached_property
    def output(self) -> Path:
        """The file that stands for what the job makes."""
        run = RunDir(self.path)
        return run.metrics if self.cell else (run.baseline if "train" in self.stages else run.data) / MARKER

    def is_done(self) -> bool:
        """Whether its output is there and made from what it should be made from."""
        if not self.output.is_file():
            return False
        record = self.record()  # shared work needs none: the name of its folder says what it was made from
        return self.cell is None or (
            record.get("state") == "done"
            and record["made_from"] == self.made_from
            and record["metrics"] == rundir.file_sha256(self.output)
        )

    def record(self) -> dict[str, Any]:
        """How it ended when it last ran."""
        path = self.path / "job.json"
        return rundir.read_json(path) if path.is_file() else {}


def run(spec_path: Path, overrides: list[str], scheduler: str = "none") -> None:
    """Run all cells that are not done, and write `sweep.json`, `sweep.md` and `sweep.html`.

    Args:
        spec_path: a spec with a section `sweep`.
        overrides: `key=value` in place of the spec's.
        scheduler: a TorchX scheduler that runs the stages of each cell; `none`: this machine.

    Raises:
        ValueError: if the spec has errors or no sweep, does not fit the data, or another sweep works in the run
            directory. Nothing was started then.
        SystemExit: if a cell failed (1), or the sweep was told to stop (128 + signal); no process is left then.
    """
    spec = load_spec(spec_path, overrides)
    if spec.sweep is None:
        raise ValueError(f"{spec_path}: sweep: this section is missing; say which methods, models and seeds to compare")
    if scheduler != "none":
        with get_runner() as runner:
            if scheduler not in (known := runner.scheduler_backends()):
                raise ValueError(f"scheduler {scheduler}: expected one of none, {', '.join(known)}")
    cells = expand(spec)
    different = {rundir.fingerprint(cell.spec.data.model_dump(mode="json")): cell.spec for cell in cells}
    if differences := [line for one in different.values() for line in check(one)]:
        raise ValueError("\n".join(["the spec does not fit the data:", *differences]))
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    run_dir = Path(spec.runtime.run_dir)
    with rundir.lease(run_dir, "thresher sweep", name="sweep-lease"), signals.noted() as stopped:
        sweep = _Sweep(spec, plan(run_dir, cells), scheduler, console, stopped)
        sweep.run_jobs()
        failures = sweep.write_results()
    if failures:
        raise SystemExit(1)


def plan(run_dir: Path, cells: Sequence[Cell]) -> list[Job]:
    """The jobs of a sweep, each after those that it needs; shared ones are named by what they are made from."""
    data: dict[str, Job] = {}
    baselines: dict[str, Job] = {}
    jobs = []
    for cell in cells:
        raw = prepare.inputs(cell.spec)
        parts = cell.spec.model_dump(mode="json")
        made = rundir.fingerprint(raw)
        if made not in data:
            name = f"data of seed {cell.seed}"
            data[made] = _shared(run_dir, "data", name, cell.spec, ("prepare",), made, ())
        prepared = data[made]
        made = rundir.fingerprint([raw, parts["model"], parts["train"]])
        if made not in baselines:
            name = f"{cell.model} uniform seed {cell.seed}"
            if name in {job.name for job in baselines.values()}:  # a method that changes how models are trained
                name = f"{cell.model} uniform of {cell.method} seed {cell.seed}"
            baselines[made] = _shared(run_dir, "baseline", name, cell.spec, ("train",), made, (prepared,))
        trained = baselines[made]
        del parts["runtime"]["run_dir"]
        path = Path(cell.spec.runtime.run_dir)
        made = rundir.fingerprint([raw, parts])
        jobs.append(Job(cell.name, path, cell.spec, CELL_STAGES, made, (prepared, trained), cell))
    return [*data.values(), *baselines.values(), *jobs]


def _shared(
    run_dir: Path, what: str, name: str, spec: Spec, stages: tuple[str, ...], made_from: str, needs: tuple[Job, ...]
) -> Job:
    path = run_dir / "shared" / f"{what}-{made_from[:16]}"
    runtime = spec.runtime.model_copy(update={"run_dir": str(path)})
    return Job(name, path, spec.model_copy(update={"runtime": runtime}), stages, made_from, needs)


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    began_s: float

    def progress(self) -> State | None:
        path = RunDir(self.job.path).progress
        try:
            state: State = rundir.read_json(path)
        except (FileNotFoundError, ValueError):
            return None
        return state if state["updated"] >= self.began_s else None  # else an earlier process wrote it


@dataclass
class _Sweep:
    spec: Spec
    jobs: list[Job]
    scheduler: str
    console: Console
    stopped: list[int]

    def __post_init__(self) -> None:
        self._cells = [job for job in self.jobs if job.cell is not None]
        self._done = {job.path for job in self.jobs if job.is_done()}
        self._failed: dict[Path, str] = {}  # and why
        self._running: list[_Running] = []
        self._rows: dict[Path, list[dict[str, Any]]] = {}  # of the cells that are done
        self._environment = dict(environment.describe())

    def run_jobs(self) -> None:
        """Run the cells that are not done, and before them what they need.

        Raises:
            SystemExit: if it was told to stop.
        """
        before = sum(job.path in self._done for job in self._cells)
        if before:
            self._say(f"{before} of {len(self._cells)} cells: done before")
        wanted = {job.path for job in self._cells} - self._done
        wanted |= {need.path for job in self._cells if job.path in wanted for need in job.needs} - self._done
        waiting = [job for job in self.jobs if job.path in wanted]
        with Board("cells", len(self._cells), self.console) as board:
            try:
                while (waiting or self._running) and not self.stopped:
                    self._start_ready(waiting)
                    time.sleep(POLL_S)
                    for running in [r for r in self._running if r.process.poll() is not None]:
                        self._running.remove(running)
                        self._finish(running)
                    finished = sum(job.path in self._done for job in self._cells)
                    failed = sum(job.path in self._failed for job in self._cells)
                    board.show(finished, failed, {r.job.name: r.progress() for r in self._running})
            finally:
                self._stop_all()
        if self.stopped:
            self._write_json(self._summary())
            self._say("stopped; the same command continues it")
            raise SystemExit(128 + self.stopped[0])

    def write_results(self) -> int:
        """Print the tables, write the files; the number of cells that failed."""
        # Here, because matplotlib takes seconds to import.
        from thresher.report.sweep_page import page
        from thresher.report.sweep_tables import markdown, tables

        summary = self._summary()
        run_dir = Path(self.spec.runtime.run_dir)
        self._write_json(summary)
        rundir.write_bytes(run_dir / "sweep.md", markdown(summary, self._environment).encode())
        rundir.write_bytes(run_dir / "sweep.html", page(summary, self._environment).encode())
        for table in tables(summary):
            self.console.print(table)
        for name, error in summary.failures:
            self._say(f"{name}: failed: {error.splitlines()[0]}")
        self._say(f"results: {run_dir / 'sweep.html'}")
        return len(summary.failures)

    def _start_ready(self, waiting: list[Job]) -> None:
        for job in list(waiting):
            lost = [need for need in job.needs if need.path in self._failed]
            if lost:
                waiting.remove(job)
                self._fail(job, f"{lost[0].name} failed: {self._failed[lost[0].path]}", 0.0)
            elif len(self._running) < self.spec.runtime.parallel and all(need.path in self._done for need in job.needs):
                waiting.remove(job)
                self._start(job)

    def _start(self, job: Job) -> None:
        job.path.mkdir(parents=True, exist_ok=True)
        for need in job.needs:
            folder = need.output.parent
            _link(job.path / folder.name, folder)
        rundir.write_json(job.path / "spec.json", job.spec.model_dump(mode="json"))
        rundir.write_json(job.path / "job.json", {"state": "running", "made_from": job.made_from})
        with (job.path / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                command(job, self.scheduler),
                stdin=subprocess.PIPE,  # never written to: it closes when this process ends, however it does
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **launch.ENV},
                start_new_session=True,  # Ctrl-C is for this process, which then stops the others
            )
        self._running.append(_Running(job, process, time.time()))

    def _finish(self, running: _Running) -> None:
        job, seconds = running.job, time.time() - running.began_s
        assert running.process.stdin is not None
        running.process.stdin.close()
        code = running.process.returncode
        # Shared work counts by what it left: `prepare` may refuse a budget, but that is the cell's business.
        if not job.output.is_file() or (job.cell is not None and code != 0):
            progress = running.progress()
            where = "" if progress is None or progress["state"] == "done" else f"{progress['stage']}: "
            self._fail(job, where + _why(code, job.path / "log.txt"), seconds)
            return
        self._done.add(job.path)
        record = {"state": "done", "made_from": job.made_from, "seconds": round(seconds, 3)}
        if job.cell is not None:
            record["metrics"] = rundir.file_sha256(job.output)
        rundir.write_json(job.path / "job.json", record)
        self._say(f"{job.name}: done in {seconds:.1f} s{_scores(job)}")
        self._write_json(self._summary())

    def _fail(self, job: Job, error: str, seconds: float) -> None:
        self._failed[job.path] = error
        record = {"state": "failed", "made_from": job.made_from, "seconds": round(seconds, 3), "error": error}
        rundir.write_json(job.path / "job.json", record)
        self._say(f"{job.name}: failed after {seconds:.1f} s: {error.splitlines()[0]}")
        if (log := job.path / "log.txt").is_file():
            self._say(f"  log: {log}")

    def _stop_all(self) -> None:
        for running in self._running:
            running.process.terminate()
        until_s = time.monotonic() + STOP_S
        for running in self._running:
            try:
                running.process.wait(max(until_s - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                os.killpg(running.process.pid, signal.SIGKILL)
            running.process.communicate()  # closes its input

    def _summary(self) -> Summary:
        rows = []
        for job in self._cells:
            if job.path in self._done and job.cell is not None:
                # Cells of one model may differ in their uniform model, where a method changes how it is trained.
                baseline = rundir.fingerprint(job.spec.model_dump(mode="json", include={"data", "model", "train"}))[:16]
                own = {"sweep_model": job.cell.model, "sweep_method": job.cell.method, "baseline": baseline}
                if job.path not in self._rows:
                    self._rows[job.path] = [{**own, **row} for row in rundir.read_json(job.output)]
                rows += self._rows[job.path]
        failures = [(job.name, self._failed[job.path]) for job in self._cells if job.path in self._failed]
        return summarize(self.spec, rows, failures)

    def _write_json(self, summary: Summary) -> None:
        states = {
            job.name: "done" if job.path in self._done else "failed" if job.path in self._failed else "missing"
            for job in self._cells
        }
        rundir.write_json(
            Path(self.spec.runtime.run_dir) / "sweep.json",
            {
                "spec": self.spec.model_dump(mode="json"),
                "environment": self._environment,
                "cells": states,
                "failures": dict(summary.failures),
                "results": summary.as_json(),
                "rows": summary.rows,
            },
        )

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def command(job: Job, scheduler: str) -> list[str]:
    """What starts a job's process."""
    spec = str(job.path / "spec.json")
    return [sys.executable, "-m", "thresher.worker", "--spec", spec, "--scheduler", scheduler, *job.stages]


def _link(link: Path, target: Path) -> None:
    """Let `link` lead to the folder `target`, whatever stood there."""
    relative = os.path.relpath(target, link.parent)
    if link.is_symlink():
        if str(link.readlink()) == relative:
            return
        link.unlink()
    elif link.exists():  # a cell's own, from when the shared one did not fit it
        shutil.rmtree(link)
    link.symlink_to(relative, target_is_directory=True)


def _why(code: int, log: Path) -> str:
    """What ended a process, in a few lines: the exception at the end of its log, else the log's last lines."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    if starts:
        after = lines[starts[-1] + 1 :]
        message = [number for number, line in enumerate(after) if not line.startswith(" ")]
        if message:
            return "\n".join(after[message[0] :][:ERROR_LINES])
    return "\n".join([f"exit code {code}", *lines[-ERROR_LINES:]])


def _scores(job: Job) -> str:
    """`; test AUC: uniform 0.7886, 0.5 0.7869`."""
    if job.cell is None:
        return ""
    words = [
        f"{'uniform' if row['budget'] is None else budget_name(row['budget'])} {score(row['auc'])}"
        for row in rundir.read_json(job.output)
        if row["split"] == "test"
    ]
    return f"; test AUC: {', '.join(words)}"
