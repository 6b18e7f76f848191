"""A folder of published models: immutable versions, and which of them is current.

```
<folder>/
  current.json     {"version": "<name of the folder to serve>"}
  <version>/       manifest.json, tables/, vocabulary/, dense.safetensors, dense.onnx, golden.json, model_card.md
```

A version is named by its content: the SHA-256 of what `sha256sum` prints of its files in the order of their paths. It
is written under a hidden name and renamed when all of it is on disk; then `current.json` is replaced at once. A reader
that goes by `current.json` sees whole versions alone, whatever happens to the writer.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from thresher.rundir import fsync_dir, lease, write_json
from thresher.tables import Tables, load, strict_json
from thresher.tables.format import MANIFEST
from thresher.tables.golden import GOLDEN, check_golden

CURRENT = "current.json"
CARD = "model_card.md"
_VERSION = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 4096  # of current.json
_WORK, _GONE = ".publishing", ".removing"  # hidden: no reader follows them


def publish(tables: Path, card: str, to: Path, keep: int) -> str:
    """Publish exported tables as the current version. The same content again is the same version.

    Args:
        tables: the folder of a finished export, with golden requests.
        card: text of the model card.
        to: the folder of published models; made if it is not there.
        keep: versions before the current one that stay; older ones are removed.

    Returns:
        The version.

    Raises:
        ValueError: if the export is not whole or does not score as the trained model, or another process publishes.
    """
    loaded = load(tables)
    check_golden(loaded)
    with lease(to, "publish"):
        work = to / _WORK
        for left in (work, to / _GONE):  # of a writer that was killed
            shutil.rmtree(left, ignore_errors=True)
        for left in to.glob(f".{CURRENT}.*"):
            left.unlink()
        _copy(loaded, card, work)
        version = content_hash(work)
        if (to / version).is_dir():
            shutil.rmtree(work)
        else:
            work.rename(to / version)
        os.utime(to / version)  # one that is published again is as new as one that was just written
        fsync_dir(to)
        write_json(to / CURRENT, {"version": version})
        _remove_old(to, version, keep)
    return version


def current(folder: Path) -> Path:
    """The folder of the version to serve: what `current.json` names, or the folder itself where it is an export.

    Raises:
        ValueError: if it is neither, or `current.json` names no version that is there.
    """
    path = folder / CURRENT
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError as error:
        if (folder / MANIFEST).is_file():
            return folder
        raise ValueError(
            f"{folder}: neither {CURRENT} nor {MANIFEST} is there ({error.strerror}); give a folder that `thresher "
            "publish` wrote, or exported tables"
        ) from None
    value = strict_json.loads(data, str(path))
    version = value.get("version") if isinstance(value, dict) else None
    if not isinstance(version, str) or not _VERSION.fullmatch(version) or not (folder / version).is_dir():
        raise ValueError(f"{path}: version {str(version)[:80]!r} is not there; publish a model again")
    return folder / version


def content_hash(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the lines `<SHA-256 of the file>  <path>` of all files, by path."""
    lines = hashlib.sha256()
    for path in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()):
        with (folder / path).open("rb") as file:
            lines.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path}\n".encode())
    return lines.hexdigest()


def _copy(tables: Tables, card: str, work: Path) -> None:
    """Copy what the manifest lists, and no more, and see that it is on disk."""
    files = [*(entry.path for entry in tables.manifest.files()), MANIFEST, GOLDEN]
    for name in files:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tables.folder / name, work / name)
    (work / CARD).write_text(card)
    for path in [*work.rglob("*"), work]:
        if path.is_dir():
            fsync_dir(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _remove_old(to: Path, version: str, keep: int) -> None:
    """Remove the oldest versions, first by name, so that none is seen half removed."""
    old = [path for path in to.iterdir() if _VERSION.fullmatch(path.name) and path.name != version]
    for path in sorted(old, key=lambda path: path.stat().st_mtime_ns, reverse=True)[keep:]:
        path.rename(to / _GONE)
        shutil.rmtree(to / _GONE)
