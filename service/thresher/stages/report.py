"""Stage `report`: a finished run as one page for people, `report.html`."""

from __future__ import annotations

from pathlib import Path

from thresher.progress import Progress
from thresher.rundir import RunDir, write_bytes
from thresher.spec import Spec


def run(spec: Spec) -> None:
    """Write `report.html` into the run directory.

    It is made anew each time: it takes seconds, and anything in the run directory may have changed what it says.

    Raises:
        ValueError: if `metrics.json` is missing, or a file does not hold what it should.
    """
    # Here, because matplotlib takes seconds to import and no other stage needs it.
    from thresher.report.figures import FIGURES
    from thresher.report.page import render
    from thresher.report.read import read
    from thresher.report.svg import drawing

    run_dir = Path(spec.runtime.run_dir)
    finished = read(run_dir, spec)
    plots = {}
    with Progress(run_dir, "report", total=len(FIGURES), unit="figure") as progress, drawing():
        for done, (name, draw) in enumerate(FIGURES.items(), start=1):
            plots[name] = draw(finished)
            progress.update(done)
    write_bytes(RunDir(run_dir).report, render(finished, plots).encode())
