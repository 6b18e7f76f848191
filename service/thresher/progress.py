"""How far a stage is: a bar or plain lines for people, `progress.json` for other processes.

The process that works holds a `Progress`. Another one that waits for it (the pipeline driver, whose stages run in
processes of their own) holds a `Follower`, which reads the file. Both show it through the same `Display`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from thresher.rundir import RunDir

WRITE_EVERY_S = 0.25
LINE_EVERY_S = 5.0
BOARD_EVERY_S = 60.0
RATE_WINDOW_S = 30.0  # the rate is a mean over this, so that a validation between two steps does not upset the ETA


class State(TypedDict):
    """What `progress.json` holds."""

    stage: str
    state: Literal["running", "done", "failed"]
    done: int
    total: int | None
    unit: str  # in the singular: step, row
    rate_per_s: float | None  # units a second, lately; once finished, over all
    eta_s: float | None
    elapsed_s: float
    metrics: dict[str, float | None]  # null stands for NaN and infinities
    updated: float  # Unix time, seconds


class Progress:
    """Counts the work of one stage, shows it and writes it to `<run_dir>/progress.json`.

    A metric whose name ends in `_per_s` is shown as a rate, in place of the rate of units: `samples_per_s=45000.0`
    becomes "45,000 samples/s".

    Example:
        with Progress(run_dir, "train", total=780, unit="step") as progress:
            for step in range(780):
                ...
                progress.update(step + 1, loss=0.54)
    """

    def __init__(
        self,
        run_dir: Path,
        stage: str,
        total: int | None,
        unit: str,
        *,
        start: int = 0,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        """Prepare; nothing is shown or written before the `with` block begins.

        Args:
            run_dir: the run's directory.
            stage: what is being done, for people: "train", "retrain 0.1".
            total: units in all; None where that is not known.
            unit: what is counted, in the singular: "step", "row".
            start: units that an interrupted run has done already; they do not count for the rate.
            enabled: False makes no output at all: for every rank but 0.
            console: where to show it; default: stdout.
        """
        self._path = RunDir(run_dir).progress
        self._stage, self._total, self._unit = stage, total, unit
        self._start = self._done = start
        self._enabled = enabled
        self._display = Display(console)
        self._metrics: dict[str, float] = {}
        self._began_s = self._written_s = 0.0
        self._recent: deque[tuple[float, int]] = deque()  # (seconds, units done) within RATE_WINDOW_S

    def __enter__(self) -> Self:
        """Start the clock and write the first state."""
        self._began_s = time.monotonic()
        self._recent.append((self._began_s, self._start))
        if self._enabled:
            self._publish("running")
        return self

    def update(self, done: int, **metrics: float) -> None:
        """Say that `done` units are done, of all. Cheap: most calls only note the numbers.

        Metrics that are not named again keep their last value.
        """
        self._done = done
        self._metrics.update(metrics)
        if self._enabled and time.monotonic() - self._written_s >= WRITE_EVERY_S:
            self._publish("running")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the last state: done, or failed where an exception ended the block."""
        if self._enabled:
            self._publish("done" if kind is None else "failed")
            self._display.close()

    def _publish(self, state: Literal["running", "done", "failed"]) -> None:
        self._written_s = now_s = time.monotonic()
        self._recent.append((now_s, self._done))
        while self._recent[0][0] < now_s - RATE_WINDOW_S and len(self._recent) > 2:
            self._recent.popleft()
        since_s, since = (self._began_s, self._start) if state != "running" else self._recent[0]
        rate_per_s = (self._done - since) / (now_s - since_s) if now_s > since_s and self._done > since else None
        eta_s = (
            (self._total - self._done) / rate_per_s
            if state == "running" and rate_per_s is not None and self._total is not None
            else None
        )
        progress: State = {
            "stage": self._stage,
            "state": state,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "rate_per_s": rate_per_s,
            "eta_s": eta_s,
            "elapsed_s": now_s - self._began_s,
            "metrics": {name: float(x) if math.isfinite(x) else None for name, x in self._metrics.items()},
            "updated": time.time(),
        }
        self._write(progress)
        self._display.show(progress)

    def _write(self, progress: State) -> None:
        # Whole or not at all, but without rundir's fsync: nobody needs this file after a crash, and several syncs
        # a second would slow the training loop.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(progress, allow_nan=False) + "\n")
        temporary.replace(self._path)


class Follower:
    """Shows the progress of a stage that runs in another process. Make it before that process is started.

    Example:
        with Follower(run_dir) as follower:
            while job_runs():
                follower.poll()
                time.sleep(0.5)
    """

    def __init__(self, run_dir: Path, *, console: Console | None = None) -> None:
        """Remember what the file holds now: it belongs to an earlier stage and is not shown."""
        self._path = RunDir(run_dir).progress
        self._display = Display(console)
        self._seen = self._read()

    def __enter__(self) -> Self:
        """Nothing to do yet."""
        return self

    def poll(self) -> State | None:
        """Show what is new, if anything is; returns the state last read, None before the stage wrote one."""
        text = self._read()
        if text is None or text == self._seen:
            return self._display.last
        self._seen = text
        progress: State = json.loads(text)
        self._display.show(progress)
        return progress

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show the last state."""
        self.poll()
        self._display.close()

    def _read(self) -> str | None:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return None


class Display:
    """Shows states: as a bar where the console is a terminal, else as a plain line now and then and at the end."""

    def __init__(self, console: Console | None = None) -> None:
        """Show on `console`; default: stdout."""
        self._console = console if console is not None else Console()
        self._is_terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar: RichProgress | None = None
        self._line_s = time.monotonic()
        self.last: State | None = None

    def show(self, progress: State) -> None:
        """Show one state; another stage than the last one gets a bar of its own."""
        if self.last is not None and self.last["stage"] != progress["stage"]:
            self.close()
        self.last = progress
        if self._is_terminal:
            self._show_bar(progress)
        elif progress["state"] != "running" or time.monotonic() - self._line_s >= LINE_EVERY_S:
            self._line_s = time.monotonic()
            line = f"{progress['stage']}: {describe(progress)}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the bar; it stays on the screen as it was last shown."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_bar(self, progress: State) -> None:
        if self._bar is None:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                auto_refresh=False,  # drawn when there is news; no thread beside the training loop
            )
            self._bar.add_task("", total=None, text="")
            self._bar.start()
        self._bar.update(
            self._bar.task_ids[0],
            description=progress["stage"],
            total=progress["total"],
            completed=progress["done"],
            text=describe(progress),
        )
        self._bar.refresh()


class Board:
    """Shows a sweep: a bar of what is done and a line for each job that runs; off a terminal a line now and then."""

    def __init__(self, unit: str, total: int, console: Console) -> None:
        """Show on `console` how many of `total` units, in the plural, are done."""
        self._unit, self._total, self._console = unit, total, console
        self._is_terminal = console.is_terminal and not console.is_dumb_terminal
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            auto_refresh=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._shown_s = time.monotonic()

    def __enter__(self) -> Self:
        """Begin to draw, on a terminal."""
        if self._is_terminal:
            self._tasks[""] = self._bars.add_task(self._unit, total=self._total, text="")
            self._bars.start()
        return self

    def show(self, done: int, failed: int, running: Mapping[str, State | None]) -> None:
        """Show how far everything is; `running` has the name of each job and the state of its stage."""
        every_s = WRITE_EVERY_S if self._is_terminal else BOARD_EVERY_S
        if time.monotonic() - self._shown_s < every_s:
            return
        self._shown_s = time.monotonic()
        text = f"{done:,}/{self._total:,} done" + (f", {failed:,} failed" if failed else "")
        jobs = {name: "starting" if s is None else f"{s['stage']}: {describe(s)}" for name, s in running.items()}
        if not self._is_terminal:
            words = "; ".join([text, *(f"{name}: {how}" for name, how in jobs.items())])
            self._console.print(f"{self._unit}: {words}", markup=False, highlight=False, soft_wrap=True)
            return
        for name in [name for name in self._tasks if name and name not in jobs]:
            self._bars.remove_task(self._tasks.pop(name))
        self._bars.update(self._tasks[""], completed=done + failed, text=text)
        for name, how in jobs.items():
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=None, text="")
            state = running[name]
            if state is not None:
                self._bars.update(self._tasks[name], total=state["total"], completed=state["done"], text=how)
        self._bars.refresh()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the bars."""
        if self._is_terminal:
            for name in [name for name in self._tasks if name]:
                self._bars.remove_task(self._tasks.pop(name))
            self._bars.stop()


def describe(progress: State) -> str:
    """One line on a state: `step 120/780, 45,000 samples/s, loss 0.543, ETA 12 s`."""
    total = "" if progress["total"] is None else f"/{progress['total']:,}"
    parts = [f"{progress['unit']} {progress['done']:,}{total}"]
    if progress["state"] == "failed":
        return f"failed at {parts[0]} after {_duration(progress['elapsed_s'])}"
    rates, metrics = _split_rates(progress["metrics"])
    if not rates and progress["rate_per_s"] is not None:
        rates = {f"{progress['unit']}s": progress["rate_per_s"]}
    parts += [f"{_number(x)} {name}/s" for name, x in rates.items()]
    parts += [f"{name} {_number(x)}" for name, x in metrics.items()]
    if progress["state"] == "done":
        parts.append(f"took {_duration(progress['elapsed_s'])}")
    elif progress["eta_s"] is not None:
        parts.append(f"ETA {_duration(progress['eta_s'])}")
    return ", ".join(parts)


def _split_rates(metrics: Mapping[str, float | None]) -> tuple[dict[str, Any], dict[str, Any]]:
    rates = {name.removesuffix("_per_s"): x for name, x in metrics.items() if name.endswith("_per_s")}
    return rates, {name: x for name, x in metrics.items() if not name.endswith("_per_s")}


def _number(x: float | None) -> str:
    if x is None:
        return "nan"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{whole} s"
    if minutes < 60:
        return f"{minutes} min {whole:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
