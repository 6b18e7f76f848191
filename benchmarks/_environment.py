"""What a benchmark's numbers hold for: commit, machine and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment(repeats: int, *measured: str) -> dict[str, Any]:
    """Describe where and on what was measured.

    Args:
        repeats: how often each case ran.
        measured: files and folders whose uncommitted changes would make the commit a lie.
    """
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    status = [*git, "status", "--porcelain", "--", *measured]
    changed = subprocess.run(status, capture_output=True, text=True, check=False).stdout != ""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    packages = ("torch", "torchrec", "numpy", "pyarrow")
    return {
        "commit": commit + ("+changes" if changed else ""),
        "cpu": cpu.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "repeats": repeats,
    }
