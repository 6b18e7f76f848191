"""What made a report: versions of Python and the libraries, the machine, and the commit of this code if it is known."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("thresher", "torch", "torchrec", "fbgemm-gpu", "torchx", "numpy", "pyarrow", "safetensors")


def describe() -> list[tuple[str, str]]:
    """Name and value of each, in the order to show them; packages that are not installed are left out."""
    found = [("Commit", commit() or "not known"), ("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return [
        *found,
        ("System", f"{platform.system()} {platform.machine()}"),
        ("CPU", _cpu()),
        ("Cores", str(os.cpu_count())),
    ]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "not known"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "not known")


def commit() -> str | None:
    """The commit of the checkout that holds this package, and whether it was changed since; None outside of one."""
    package = Path(__file__).parents[1]
    if _git(package, "ls-files", "rundir.py") is None:  # a package installed inside somebody else's checkout
        return None
    head = _git(package, "rev-parse", "--short=12", "HEAD")
    return f"{head}, with changes" if head and _git(package, "status", "--porcelain", "--", ".") else head


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it prints nothing, fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
