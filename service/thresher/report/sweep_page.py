"""The page of a sweep: for each model accuracy against bytes, as it is and against the uniform model, and its table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from matplotlib.transforms import ScaledTranslation

from thresher.report import colours, numbers, svg, templates
from thresher.report.colours import INK, LINE, MUTED, PAPER, STAND_IN
from thresher.report.figures import Plot, byte_ticks
from thresher.report.intervals import Estimate
from thresher.report.sweep_summary import Line, Summary, smallest_that_held
from thresher.report.sweep_tables import HEADINGS, NOTE, row_cells, seeds_of, with_interval
from thresher.report.verdict import TOLERANCE, label

WIDTH_PX, HEIGHT_PX = 480, 350
LEGEND_COLUMNS = 3


def page(summary: Summary, environment: Mapping[str, str]) -> str:
    """The results of a sweep as HTML."""
    with svg.drawing():
        models = [
            {
                "name": model,
                "id": f"model-{number}",
                "plots": [plot for plot in (accuracy(summary, model, number), change(summary, model, number)) if plot],
                "rows": [_row(summary, line) for line in lines],
            }
            for number, (model, lines) in enumerate(summary.models.items())
        ]
    findings = [finding(model, lines) for model, lines in summary.models.items()]
    spec = summary.spec
    return templates.render(
        "sweep.html.j2",
        name=spec.runtime.run_dir.rstrip("/").rpartition("/")[2],
        findings=findings or ["No cell has finished."],
        models=models,
        headings=HEADINGS,
        note=NOTE,
        failures=summary.failures,
        spec_yaml=yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        environment=environment,
    )


def finding(model: str, lines: Sequence[Line]) -> str:
    """What came out for a model, in a sentence made from the numbers."""
    found = smallest_that_held(lines)
    if found is None:
        return f"{model}: no method kept the validation AUC within {TOLERANCE} of the uniform model’s."
    words = f"{model}: {found.method} at {label(found.budget or '')} keeps the AUC"
    if found.change is not None:
        words += f" ({with_interval(found.change, signed=True)} on test)"
    uniform = next((line for line in lines if line.budget is None), None)
    if uniform is None or uniform.total_bytes < found.total_bytes:
        return f"{words}, in {numbers.size(found.total_bytes)}."
    return f"{words} in {uniform.total_bytes / found.total_bytes:.1f} times fewer bytes."


def accuracy(summary: Summary, model: str, number: int) -> Plot:
    """Test AUC against bytes: a colour and a marker a method, the uniform model as a line, the front underneath."""
    lines = summary.models[model]
    front = "; ".join(
        f"{line.auc.mean:.4f} in {numbers.size(line.total_bytes)}"
        for line in sorted(lines, key=lambda line: line.total_bytes)
        if line.front
    )
    note = (
        "Means over seeds with their 95 % confidence intervals; the dashed line with its band is the uniform model. "
        "Points of nearly the same size stand side by side. Budgets are written at the points of the front."
    )
    values = [(line, line.auc) for line in lines]
    drawn = _drawn(summary, values, f"sweep{number}", f"{model}: test AUC against bytes. Pareto front: {front}.", "")
    return Plot(name=f"sweep{number}", title="Test AUC against bytes", note=note, svg=drawn)


def change(summary: Summary, model: str, number: int) -> Plot | None:
    """The difference to the uniform model against bytes, in the same way; None where there is nothing to compare."""
    lines = summary.models[model]
    uniform = [(line, Estimate(0.0, None, line.auc.n)) for line in lines if line.budget is None]
    values = uniform + [(line, line.change) for line in lines if line.change is not None]
    if len(values) == len(uniform):
        return None
    note = (
        "The same results less those of the uniform model with the same seed. What a seed does to both, above all by "
        "its split of the data, cancels out: these intervals say which methods differ from the uniform model."
    )
    alt = f"{model}: test AUC minus the uniform model’s against bytes; the table below has the numbers."
    drawn = _drawn(summary, values, f"change{number}", alt, " minus the uniform model’s")
    return Plot(name=f"change{number}", title="Against the uniform model, seed by seed", note=note, svg=drawn)


def _drawn(summary: Summary, values: Sequence[tuple[Line, Estimate]], name: str, alt: str, what: str) -> Markup:
    methods = list(dict.fromkeys(line.method for line, _ in values if line.budget is not None))
    legend_rows = math.ceil((len(methods) + 2) / LEGEND_COLUMNS)
    figure = svg.canvas(WIDTH_PX, HEIGHT_PX + 22 * legend_rows)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    front = sorted((line.total_bytes, found.mean) for line, found in values if line.front)
    if front:
        style: dict[str, Any] = {"color": LINE, "linewidth": 9, "solid_capstyle": "round", "zorder": 0}
        axes.plot(*zip(*front, strict=True), label="Pareto front", **style)
    for line, found in values:
        if line.budget is None:
            _draw_uniform(axes, line, found)
    for place, method in enumerate(methods):
        shift_px = (place - (len(methods) - 1) / 2) * min(5.0, 24.0 / len(methods))
        own = [(line, found) for line, found in values if line.budget is not None and line.method == method]
        _draw_method(figure, axes, method, summary.methods.index(method), own, shift_px)
    sizes = [line.total_bytes for line, _ in values]
    byte_ticks(axes, sizes)
    if max(sizes) < 4 * min(sizes):
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)))
    axes.set_ylim(*_limits([found for _, found in values]))
    axes.set_xlabel("bytes in all, log scale")
    axes.set_title(f"test AUC{what}", loc="left")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=LEGEND_COLUMNS, frameon=False,
        handletextpad=0.4, columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip
    return svg.inline(figure, name=name, alt=alt)


def _draw_uniform(axes: Axes, line: Line, found: Estimate) -> None:
    axes.axhline(found.mean, color=MUTED, linewidth=1.2, dashes=(4, 3), zorder=1)
    if found.half_width is not None:
        low, high = found.mean - found.half_width, found.mean + found.half_width
        axes.axhspan(low, high, color=MUTED, alpha=0.12, linewidth=0, zorder=0)
    style: dict[str, Any] = {"color": INK, "markerfacecolor": PAPER, "markeredgewidth": 2, "markersize": 10}
    axes.plot([line.total_bytes], [found.mean], "o", label=f"{line.method}, all", zorder=3, **style)


def _draw_method(
    figure: Figure, axes: Axes, method: str, index: int, values: Sequence[tuple[Line, Estimate]], shift_px: float
) -> None:
    colour = STAND_IN[colours.variable(index)]
    ordered = sorted(values, key=lambda value: value[0].total_bytes)
    sizes, means = [line.total_bytes for line, _ in ordered], [found.mean for _, found in ordered]
    half_widths = [found.half_width or 0.0 for _, found in ordered]
    moved = axes.transData + ScaledTranslation(shift_px / 72, 0, figure.dpi_scale_trans)
    axes.plot(sizes, means, color=colour, linewidth=1, alpha=0.5, zorder=1, transform=moved)
    for size, mean, half_width in zip(sizes, means, half_widths, strict=True):
        ends = [mean - half_width, mean + half_width]
        axes.plot([size, size], ends, color=colour, linewidth=1.5, alpha=0.85, zorder=2, transform=moved)
    style: dict[str, Any] = {"color": colour, "markeredgecolor": PAPER, "markeredgewidth": 1, "markersize": 8}
    axes.plot(sizes, means, colours.marker(index), label=method, zorder=3, transform=moved, **style)
    for line, found in ordered:
        if line.front:
            axes.annotate(
                label(line.budget or ""), (line.total_bytes, found.mean), xytext=(shift_px, 9),
                textcoords="offset points", ha="center", color=INK, zorder=4, fontsize=11.5,
                bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )  # fmt: skip


def _limits(values: Sequence[Estimate]) -> tuple[float, float]:
    """Limits of y around all points and bars, that do not magnify noise. A wide bar of few seeds may be cut."""
    means = [found.mean for found in values]
    spread = max(max(means) - min(means), 0.004)
    ends = [found.mean + sign * (found.half_width or 0) for found in values for sign in (-1, 1)]
    return max(min(ends), min(means) - spread) - 0.06 * spread, min(max(ends), max(means) + spread) + 0.12 * spread


def _row(summary: Summary, line: Line) -> dict[str, Any]:
    colour = None if line.budget is None else colours.variable(summary.methods.index(line.method))
    return {"cells": row_cells(line, seeds_of(summary)), "colour": colour, "front": line.front}
