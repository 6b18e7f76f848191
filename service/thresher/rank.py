"""One rank of a stage: torchrun starts `python -m thresher.rank STAGE --spec FILE key=value …` for each.

An exception that ends a rank is recorded as torchelastic wants it. So whoever waits for the job learns which rank
failed first, and sees its own traceback, not that of a rank that only lost its peer.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from thresher.launch import RANKED
from thresher.specfile import load_spec


@record
def main() -> None:
    """Run the stage that the command line names."""
    parser = argparse.ArgumentParser(prog="thresher.rank")
    parser.add_argument("stage", choices=sorted(RANKED))
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()  # plain parsing finds no overrides behind the option
    importlib.import_module(f"thresher.stages.{arguments.stage}").run(load_spec(arguments.spec, arguments.overrides))


if __name__ == "__main__":
    main()
    # The stage is published. Gloo's threads may still hold tensors whose release asks for the interpreter's lock, and
    # while the interpreter takes itself down that now and then aborts a process whose work is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
