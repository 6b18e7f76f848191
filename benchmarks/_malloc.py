"""Keeps freed memory with the process: pooled vectors are fresh pages at every call otherwise, FBGEMM's too.

Such a page costs as much as the lookup itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}


def run_keeping_memory(main: Callable[[], None]) -> None:
    """Call `main` in a process with these settings, which malloc reads when a process starts."""
    if MALLOC.items() <= os.environ.items():
        main()
        return
    module = sys.modules["__main__"].__spec__
    assert module is not None, "start it by `python -m`"
    os.execve(sys.executable, [sys.executable, "-m", module.name, *sys.argv[1:]], os.environ | MALLOC)
