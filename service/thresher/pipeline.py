"""The driver: runs the stages of a job one after the other, each as a TorchX job.

It keeps `<run_dir>/pipeline.json`: for each stage its state, job and times, what it was asked to do and the hashes of
what it left. A stage is skipped if it succeeded with the same spec and its output is still what it left; from the
first one that is not, all are launched, and each finds out for itself whether it has anything to do.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torchx.runner import Runner, get_runner
from torchx.runner.config import apply
from torchx.schedulers.api import Stream
from torchx.specs import AppState, AppStatus

from thresher import launch, rundir, signals, trust
from thresher.budget import budget_name
from thresher.data.check import check
from thresher.progress import Follower
from thresher.rundir import MARKER, RunDir
from thresher.spec import Spec
from thresher.specfile import load_spec

STAGES = ("prepare", "train", "search", "prune", "retrain", "export", "evaluate", "report")
LOG_LINES = 80  # of a job that failed without saying why
TABLE_WIDTH = 110  # columns, where there is no terminal


def run(spec_path: Path, overrides: list[str], scheduler: str = "local_cwd", stages: Sequence[str] = STAGES) -> None:
    """Run all stages that have something to do, and print what came out.

    Args:
        spec_path: the job's spec.
        overrides: `key=value` in place of the spec's.
        scheduler: where TorchX runs the stages.
        stages: those to run, in order, from the first one.

    Raises:
        ValueError: if the spec has errors, names code that is not trusted or does not fit the data, or another driver
            works in the run directory. Nothing was started then.
        SystemExit: if a stage failed (1), or the driver was told to stop (128 + signal); its job is gone then.
    """
    spec = load_spec(spec_path, overrides)
    trust.check_trust(spec.model)
    if differences := check(spec):
        raise ValueError("\n".join(["the spec does not fit the data:", *differences]))
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    run_dir = RunDir(Path(spec.runtime.run_dir))
    with rundir.lease(run_dir.path, "thresher pipeline", name="pipeline-lease"), get_runner() as runner:
        if scheduler not in runner.scheduler_backends():
            raise ValueError(f"scheduler {scheduler}: expected one of {', '.join(runner.scheduler_backends())}")
        driver = _Driver(spec, spec_path, overrides, run_dir, runner, scheduler, stages, console)
        driver.run_stages()
        if stages == STAGES:
            _print_results(console, run_dir, driver.seconds())


@dataclass
class _Driver:
    spec: Spec
    spec_path: Path
    overrides: list[str]
    run_dir: RunDir
    runner: Runner
    scheduler: str
    stages: Sequence[str]
    console: Console

    def __post_init__(self) -> None:
        self._path = self.run_dir.path / "pipeline.json"
        self._state: dict[str, dict[str, Any]] = rundir.read_json(self._path) if self._path.is_file() else {}
        self._asked = rundir.fingerprint(self.spec.model_dump(mode="json"))

    def run_stages(self) -> None:
        """Run the stages, from the first one that is not done."""
        done = True
        config: dict[str, Any] = {}

        def make_schedulers() -> None:  # which set handlers of their own
            apply(self.scheduler, config)  # `config` gets what .torchxconfig says
            self.runner.scheduler_run_opts(self.scheduler)

        with signals.noted(make_schedulers) as stopped:
            for stage in self.stages:
                done = done and self._is_done(stage)
                if done:
                    self.console.print(f"{stage}: done before", highlight=False)
                else:
                    self._run_stage(stage, config, stopped)

    def seconds(self) -> dict[str, float]:
        """Wall time of each stage when it last ran, with its start, seconds."""
        return {stage: self._state[stage]["seconds"] for stage in STAGES}

    def _is_done(self, stage: str) -> bool:
        record = self._state.get(stage, {})
        return (
            record.get("state") == "succeeded"
            and record["asked"] == self._asked
            and record["outputs"] == _hashes(self.run_dir, stage, self.spec)
        )

    def _run_stage(self, stage: str, config: dict[str, Any], stopped: list[int]) -> None:
        app = launch.app(
            stage,
            str(self.spec_path),
            self.overrides,
            gpu=self.spec.runtime.ranks if self.spec.runtime.device == "cuda" and stage in launch.RANKED else 0,
        )
        if self.scheduler == "local_cwd":
            config = config | {"log_dir": str((self.run_dir.path / "logs" / stage).absolute())}
        began_s = time.time()
        record: dict[str, Any] = {"asked": self._asked, "began": began_s}
        with Follower(self.run_dir.path, console=self.console) as follower:
            handle = self.runner.run(app, self.scheduler, config)
            self._save(stage, record | {"state": "submitted", "app": handle})
            status = self._wait(handle, follower, stopped)
        record |= {"app": handle, "seconds": round(time.time() - began_s, 3)}
        if stopped:
            self._save(stage, record | {"state": "cancelled"})
            self.console.print(f"{stage}: stopped; the same command continues it", highlight=False)
            raise SystemExit(128 + stopped[0])
        if status is None or status.state != AppState.SUCCEEDED:
            self._save(stage, record | {"state": "failed"})
            self._show_failure(stage, handle, status)
            raise SystemExit(1)
        self._save(stage, record | {"state": "succeeded", "outputs": _hashes(self.run_dir, stage, self.spec)})
        self.console.print(f"{stage}: done in {record['seconds']:.1f} s", highlight=False)

    def _wait(self, handle: str, follower: Follower, stopped: list[int]) -> AppStatus | None:
        """Follow a job to its end; its last status, None if the scheduler has lost it."""
        poll_s = 0.1 if self.scheduler == "local_cwd" else 2.0
        try:
            while True:
                status = self.runner.status(handle)
                if stopped or status is None or status.is_terminal():
                    return status
                follower.poll()
                time.sleep(poll_s)
        finally:
            self.runner.cancel(handle)  # does nothing to a job that has ended

    def _save(self, stage: str, record: dict[str, Any]) -> None:
        self._state[stage] = record
        rundir.write_json(self._path, self._state)

    def _show_failure(self, stage: str, handle: str, status: AppStatus | None) -> None:
        """Write to stderr what ended the job: the traceback of the rank that failed first, else the end of the log."""
        reason = _recorded_traceback(status) or self._end_of_log(stage, handle)
        where = f"\nlogs: {status.ui_url.removeprefix('file://')}" if status is not None and status.ui_url else ""
        print(f"\n{reason.rstrip()}\n\n{stage} failed ({handle}){where}", file=sys.stderr)  # noqa: T201 the program's

    def _end_of_log(self, stage: str, handle: str) -> str:
        lines = deque(self.runner.log_lines(handle, stage, streams=Stream.STDERR), maxlen=LOG_LINES)
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def _hashes(run_dir: RunDir, stage: str, spec: Spec) -> dict[str, str | None]:
    """SHA-256 of the files that stand for a stage's output; None for one that is missing."""
    budgets = [budget_name(budget) for budget in spec.prune.budgets]
    files = {
        "prepare": [run_dir.data / MARKER],
        "train": [run_dir.baseline / MARKER],
        "search": [run_dir.search / MARKER],
        "prune": [run_dir.scheme(budget) / MARKER for budget in budgets],
        "retrain": [run_dir.model(budget) / MARKER for budget in budgets],
        "export": [run_dir.tables(budget) / MARKER for budget in ["baseline", *budgets]],
        "evaluate": [run_dir.metrics],
        "report": [run_dir.report],
    }[stage]
    return {str(file.relative_to(run_dir.path)): rundir.file_sha256(file) if file.is_file() else None for file in files}


def _recorded_traceback(status: AppStatus | None) -> str | None:
    """The traceback that torchelastic recorded for the rank that failed first, if there is one."""
    if status is None:
        return None
    try:
        message = json.loads(status.structured_error_msg)["message"]
        return str(message["extraInfo"]["py_callstack"])
    except (ValueError, KeyError, TypeError):
        return None  # nothing was recorded: not a rank, or killed


def _print_results(console: Console, run_dir: RunDir, seconds: dict[str, float]) -> None:
    table = Table(title="On the test split")
    for heading in ("", "AUC", "log loss", "kept parameters", "bytes of tables", "bytes in total", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rundir.read_json(run_dir.metrics):
        if row["split"] == "test":
            name = row["method"] if row["budget"] is None else f"{row['method']} {row['budget']}"
            table.add_row(
                f"{row['model']} {name}",
                f"{row['auc']:.4f}",
                f"{row['logloss']:.4f}",
                f"{row['kept_params']:,}",
                f"{row['table_bytes']:,}",
                f"{row['total_bytes']:,}",
                f"{row['seconds']:.1f}",
            )
    console.print(table)
    stages = ", ".join(f"{stage} {took:.1f}" for stage, took in seconds.items())
    console.print(f"seconds: {stages}; in all {sum(seconds.values()):.1f}", highlight=False, soft_wrap=True)
    console.print(f"report: {run_dir.report}", highlight=False, soft_wrap=True)
