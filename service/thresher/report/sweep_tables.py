"""A sweep's results as tables: on the terminal, in Markdown, and the cells of those on its page."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from thresher.report import numbers
from thresher.report.intervals import Estimate
from thresher.report.sweep_summary import Line, Summary
from thresher.report.verdict import label

HEADINGS = (
    "Method",
    "Budget",
    "Seeds",
    "Test AUC",
    "Against uniform",
    "Kept parameters",
    "Table bytes",
    "Bytes in all",
    "Front",
)
FRONT = "◆"
NOTE = (
    "Means over seeds ± half the width of the 95 % confidence interval (Student’s t). Against uniform: difference of "
    f"test AUC to the full model of the same seed. Front ({FRONT}): none that is as small, within 1 %, is better."
)


def row_cells(line: Line, seeds: int) -> list[str]:
    """A line's cells, under `HEADINGS`."""
    return [
        line.method,
        "all" if line.budget is None else label(line.budget),
        str(line.auc.n) if line.auc.n == seeds else f"{line.auc.n} of {seeds}",
        with_interval(line.auc),
        "" if line.change is None else with_interval(line.change, signed=True),
        numbers.count(line.kept_params),
        numbers.size(line.table_bytes),
        numbers.size(line.total_bytes),
        FRONT if line.front else "",
    ]


def with_interval(found: Estimate, *, signed: bool = False) -> str:
    """`0.7898 ± 0.0041`; the mean alone where one seed gives no interval."""
    words = numbers.signed(found.mean) if signed else numbers.score(found.mean)
    return words if found.half_width is None else f"{words} ± {found.half_width:.4f}"


def seeds_of(summary: Summary) -> int:
    """Seeds that every line should have."""
    return len(summary.spec.sweep.seeds) if summary.spec.sweep else 1


def tables(summary: Summary) -> list[Table]:
    """One table a model, for a terminal."""
    found = []
    for model, lines in summary.models.items():
        table = Table(title=model)
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number in (0, 1, 3, 4))
        method = None
        for line in lines:
            cells = row_cells(line, seeds_of(summary))
            if method not in (None, line.method):
                table.add_section()
            method = line.method
            table.add_row(*cells)
        found.append(table)
    return found


def markdown(summary: Summary, environment: Mapping[str, str]) -> str:
    """One table a model, the failures, and what made the numbers."""
    parts = [f"# Sweep\n\n{NOTE}\n"]
    for model, lines in summary.models.items():
        rows = [list(HEADINGS), ["---", *["---:"] * (len(HEADINGS) - 1)]]
        rows += [[cell.replace("|", "\\|") for cell in row_cells(line, seeds_of(summary))] for line in lines]
        body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"## {model}\n\n{body}\n")
    if summary.failures:
        listed = "\n".join(f"- {name}: {error.splitlines()[0]}" for name, error in summary.failures)
        parts.append(f"## Failed\n\n{listed}\n")
    parts.append(", ".join(f"{what} {value}" for what, value in environment.items()) + "\n")
    return "\n".join(parts)
