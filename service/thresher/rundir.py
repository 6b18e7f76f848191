"""A run's directory: where each file is, how files are written whole or not at all, and who may write.

```
<run_dir>/
  spec.json        the resolved spec of the last stage that ran
  data/            prepare: columnar shards, vocabulary, meta.json
  baseline/        train: the uniform model
  search/          search: thresholds, history.json, a mask per budget
  schemes/<budget>/   prune: scheme.json and masks.safetensors
  models/<budget>/    retrain
  tables/<budget>/    export; tables/baseline/ holds the uniform tables
  metrics.json     evaluate     report.html   report
  progress.json    what the running stage has done so far
```

A sweep's directory holds run directories: one for each cell, and those of the work that cells share. In a cell's,
`data` and `baseline` are links to the shared ones.

```
<run_dir>/
  cells/<model>/<method>/<seed>/
  shared/data-<of what>/   shared/baseline-<of what>/
  sweep.json   sweep.md   sweep.html
```

A folder that a stage finished holds `stage.json`: what it was made from, and the seconds it took. A stage works in a
hidden folder beside its output and renames it when all is there, so that a failed run never harms what was complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKER = "stage.json"


@dataclass(frozen=True)
class RunDir:
    """Names of a run's files."""

    path: Path

    @property
    def data(self) -> Path:
        """Prepared samples and vocabulary."""
        return self.path / "data"

    @property
    def baseline(self) -> Path:
        """The uniform model."""
        return self.path / "baseline"

    @property
    def search(self) -> Path:
        """The finished search."""
        return self.path / "search"

    @property
    def metrics(self) -> Path:
        """The list of results."""
        return self.path / "metrics.json"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / "report.html"

    @property
    def progress(self) -> Path:
        """What the running stage has done so far."""
        return self.path / "progress.json"

    def scheme(self, budget: str) -> Path:
        """What stays under `budget`."""
        return self.path / "schemes" / budget

    def model(self, budget: str) -> Path:
        """The model retrained under `budget`."""
        return self.path / "models" / budget

    def tables(self, budget: str) -> Path:
        """The exported tables under `budget`, or of the `baseline`."""
        return self.path / "tables" / budget


def fingerprint(value: Any) -> str:
    """SHA-256 of `value` as canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file by `data` at once: a reader sees the old bytes or the new, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by `value` as JSON, at once."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON value in a file."""
    return json.loads(path.read_text())


def is_complete(output: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether `output` was finished by a stage that was given the same `inputs`."""
    marker = output / MARKER
    return marker.is_file() and read_json(marker)["inputs"] == dict(inputs)


def made_from(output: Path) -> str:
    """Fingerprint of a finished stage's marker, for the stages that read its output.

    Raises:
        ValueError: if the stage has not finished.
    """
    marker = output / MARKER
    if not marker.is_file():
        raise ValueError(f"{output}: not there or not complete; run the stage that makes it first")
    return fingerprint(read_json(marker)["inputs"])


def working_folder(output: Path, inputs: Mapping[str, Any]) -> Path:
    """The hidden folder in which `output` is made; the same inputs find it again after an interruption."""
    return output.with_name(f".{output.name}.{fingerprint(dict(inputs))[:12]}")


def start(output: Path, inputs: Mapping[str, Any]) -> Path:
    """Make the working folder of `output`, and remove those left by other inputs."""
    work = working_folder(output, inputs)
    if output.parent.is_dir():
        for left in output.parent.glob(f".{output.name}.*"):
            if left.is_dir() and left != work:
                shutil.rmtree(left)
    work.mkdir(parents=True, exist_ok=True)
    return work


def publish(output: Path, inputs: Mapping[str, Any], seconds: float) -> None:
    """Give the finished working folder its name, in place of an older output."""
    work = working_folder(output, inputs)
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            fsync_dir(path)
    write_json(work / MARKER, {"inputs": dict(inputs), "seconds": round(seconds, 3)})
    old = output.with_name(f".{output.name}.replaced")
    if output.exists() or output.is_symlink():
        output.rename(old)
    work.rename(output)
    fsync_dir(output.parent)
    if old.is_symlink():  # a sweep's cell takes this from a shared folder, which others may still read
        old.unlink()
    elif old.exists():
        shutil.rmtree(old)


@contextlib.contextmanager
def lease(run_dir: Path, what: str, name: str = "lease") -> Iterator[None]:
    """Hold the only right to write in a run directory; the system takes it back when the process dies.

    Raises:
        ValueError: if another process holds it; names that process.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / f".{name}").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{run_dir}: in use by {holder}; wait for it, stop it, or choose another runtime.run_dir"
            ) from None
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"`{what}` on {socket.gethostname()}, process {os.getpid()}, since {now}")
        file.flush()
        yield
