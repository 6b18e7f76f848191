"""The report's figures: one function each, from a run to a `Plot`, or None where the run has nothing to draw.

Shapes: N rows of a table, D columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from thresher.report import colours, numbers, svg
from thresher.report.colours import INK, LINE, MUTED, PAPER, STAND_IN
from thresher.report.frequency import kept_by_frequency
from thresher.report.parts import PARTS, parts_bytes
from thresher.report.read import BASELINE, MetricsRow, Run, TableScheme
from thresher.report.verdict import label, reported

WIDTH_PX, HEIGHT_PX = 480, 320
MOST_FIELDS = 40  # a figure of all fields shows no more; the table has every one
HEAT = "#3d7ebd"  # seen on light and on dark paper; how opaque it is carries the value


@dataclass(frozen=True)
class Plot:
    """A drawn figure with its words."""

    name: str
    title: str
    note: str
    svg: Markup


def accuracy(run: Run) -> Plot:
    """AUC against bytes."""
    return _against_bytes(run, "auc", "AUC", "accuracy", "Higher is better.")


def loss(run: Run) -> Plot:
    """Log loss against bytes."""
    return _against_bytes(run, "logloss", "log loss", "loss", "Lower is better.")


def kept_by_field(run: Run) -> Plot | None:
    """Share of each field's parameters that stays, a marker a budget."""
    if not run.schemes:
        return None
    fields = _largest_fields(run)
    figure = svg.canvas(WIDTH_PX, 92 + 24 * len(fields))
    axes = figure.add_subplot()
    for index, budget in _budgets(run):
        tables = run.schemes[budget]["tables"]
        dims = [_mean_kept(tables[field]) for field in fields]
        axes.plot(
            dims, range(len(fields)), colours.marker(index), color=_colour(index), markeredgecolor=PAPER, clip_on=False
        )
        axes.plot([], [], colours.marker(index), color=_colour(index), label=label(budget))
    dim = max(_any_scheme(run)[field]["dim"] for field in fields)
    axes.set_xlim(0, dim)
    axes.set_yticks(range(len(fields)), [_short(field) for field in fields])
    axes.set_ylim(len(fields) - 0.5, -0.5)
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(True)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlabel("mean kept columns a row")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, len(run.schemes))
    smallest = run.schemes[_budgets(run)[-1][1]]["tables"]
    most = max(fields, key=lambda field: _mean_kept(smallest[field]) / smallest[field]["dim"])
    least = min(fields, key=lambda field: _mean_kept(smallest[field]) / smallest[field]["dim"])
    words = (
        f"Of {dim} columns. At {label(_budgets(run)[-1][1])}, {most} keeps {_mean_kept(smallest[most]):.1f} columns "
        f"a row and {least} {_mean_kept(smallest[least]):.1f}."
    )
    if len(fields) < len(_any_scheme(run)):
        words += f" The {len(fields)} fields with the most rows; the table below has all."
    return _plot("fields", "Kept columns per field", words, figure)


def kept_by_column(run: Run) -> Plot | None:
    """Share of rows that keep each column, fields down, columns across, a panel a budget."""
    if not run.schemes:
        return None
    fields = _largest_fields(run)
    budgets = _budgets(run)
    dim = max(_any_scheme(run)[field]["dim"] for field in fields)
    panels_down = math.ceil(len(budgets) / 2)
    figure = svg.canvas(WIDTH_PX, 40 + panels_down * (44 + 14 * max(4, len(fields))))
    grid = figure.subplots(panels_down, 2, sharey=True, squeeze=False)
    for axes in grid.flat[len(budgets) :]:
        axes.set_visible(False)
    for axes, (_, budget) in zip(grid.flat, budgets, strict=False):
        tables = run.schemes[budget]["tables"]
        image = np.empty((len(fields), dim, 4))
        image[..., :3] = to_rgb(HEAT)
        image[..., 3] = 0.0
        for row, field in enumerate(fields):
            table = tables[field]
            image[row, : table["dim"], 3] = np.array(table["kept_per_column"]) / table["rows"]
        axes.imshow(image, interpolation="none", aspect="auto", extent=(-0.5, dim - 0.5, len(fields) - 0.5, -0.5))
        axes.grid(visible=False)
        axes.set_title(label(budget), loc="left", color=INK)
        axes.set_yticks(range(len(fields)), [_short(field, 14) for field in fields])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=11)
        axes.set_xticks([0, dim - 1], ["0", str(dim - 1)])
        axes.tick_params(axis="x", length=0)
        for spine in axes.spines.values():
            spine.set_visible(True)
            spine.set_color(LINE)
    figure.supxlabel("column of the table", fontsize=12.5, color=MUTED)
    first = [_any_column_mean(run.schemes[budget]["tables"], 0) for _, budget in budgets]
    return _plot(
        "columns",
        "Which columns stay",
        "Darker: more of the field’s rows keep that column, from none to all. Column 0 is the first-order weight"
        f"; {numbers.percent(first[-1], 2)} of all rows keep it at {label(budgets[-1][1])}.",
        figure,
    )


def kept_by_id_frequency(run: Run) -> Plot | None:
    """Mean kept columns a row against how often training saw the id."""
    found = kept_by_frequency(run)
    if found is None:
        return None
    figure = svg.canvas(WIDTH_PX, 360)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    x = np.arange(len(found.rows))
    ends = []
    for index, budget in _budgets(run):
        if budget in found.mean_kept:
            mean = found.mean_kept[budget]
            drawn = np.isfinite(mean)
            axes.plot(x[drawn], mean[drawn], marker=colours.marker(index), color=_colour(index), markersize=5)
            ends.append((float(mean[drawn][-1]), label(budget), _colour(index)))
    axes.set_ylim(bottom=0)
    axes.set_title("mean kept columns a row", loc="left")
    _end_labels(axes, ends, x=float(x[-1]), height_px=190)
    below.bar(x, found.rows, color=MUTED, width=0.7)
    below.set_title("rows in the bin", loc="left")
    below.grid(visible=False)
    below.yaxis.set_major_locator(FixedLocator([0, float(found.rows.max())]))
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.count(value)))
    labels = found.labels()
    every = math.ceil(len(labels) / 4)  # the last ones are long: 16.4K–32.8K
    below.set_xticks(x[::every], [text.replace("\N{NO-BREAK SPACE}", "") for text in labels[::every]])
    below.set_xlabel("occurrences of the id in training")
    budgets_kept = list(found.mean_kept.values())
    largest, smallest = budgets_kept[0], budgets_kept[-1]
    return _plot(
        "frequency",
        "Kept columns by frequency of the id",
        f"{numbers.count(found.rows[0] + found.rows[1])} of {numbers.count(found.rows.sum())} rows were seen at most "
        f"once in training. The most frequent ids keep {smallest[np.isfinite(smallest)][-1]:.1f} columns under the "
        f"smallest budget and {largest[np.isfinite(largest)][-1]:.1f} under the largest.",
        figure,
    )


def rows_by_kept(run: Run) -> Plot | None:
    """Share of rows that keep at least k columns."""
    if not run.schemes:
        return None
    figure = svg.canvas(WIDTH_PX, HEIGHT_PX)
    axes = figure.add_subplot()
    starts, empty = [], []
    for index, budget in _budgets(run):
        by_kept = _rows_by_kept(run.schemes[budget]["tables"])
        at_least = np.cumsum(by_kept[::-1])[::-1] / by_kept.sum()
        x = np.arange(1, len(at_least))
        axes.plot(x, at_least[1:], color=_colour(index), marker=colours.marker(index), markersize=5)
        starts.append((float(at_least[1]), label(budget), _colour(index)))
        empty.append(f"{numbers.percent(1 - at_least[1], 2)} at {label(budget)}")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.percent(value)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("k")
    axes.yaxis.tick_right()  # on the left stand the names of the curves
    axes.set_title("share of rows that keep at least k columns", loc="left")
    _start_labels(axes, starts, x=1.0, height_px=220)
    return _plot(
        "rows",
        "How many columns a row keeps",
        f"Rows that keep nothing: {numbers.listing(empty)}.",
        figure,
    )


def sparsity(run: Run) -> Plot | None:
    """Kept share of the parameters over the search, with its target and the budgets' crossings."""
    if not run.search:
        return None
    figure = svg.canvas(WIDTH_PX, HEIGHT_PX)
    axes = figure.add_subplot()
    steps = [point["step"] for point in run.search]
    kept = [point["kept_fraction"] for point in run.search]
    target = [(point["step"], value) for point in run.search if (value := point["target_fraction"]) is not None]
    if target:
        axes.plot(*zip(*target, strict=True), color=MUTED, linewidth=1.5, dashes=(4, 3))
    axes.plot(steps, kept, color=INK)
    stalled, crossed = [], []
    low = min([value for value in kept if value > 0] + [_share(run, budget) for budget in run.budgets])
    axes.set_yscale("log")
    axes.set_ylim(low / 1.35, 1.15)
    shares = []
    for index, budget in _budgets(run):
        share = _share(run, budget)
        shares.append(share)
        step = crossing(run, budget)
        axes.axhline(share, color=_colour(index), linewidth=1, alpha=0.45)
        if step is None:
            stalled.append(label(budget))
            continue
        crossed.append(f"{label(budget)} at step {step:,}")
        axes.plot([step], [share], colours.marker(index), color=_colour(index), markeredgecolor=PAPER, markersize=9)
    _end_labels(
        axes,
        [(_share(run, budget), label(budget), _colour(index)) for index, budget in _budgets(run)],
        x=float(steps[-1]),
        height_px=230,
    )
    axes.yaxis.set_major_locator(FixedLocator([1.0, *([0.1] if low < 0.1 else []), *([0.01] if low < 0.01 else [])]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.percent(value)))
    axes.set_title("parameters kept" + (", and its target (dashed)" if target else ""), loc="left")
    _steps_axis(axes)
    words = f"Budgets are met at their crossing: {numbers.listing(crossed)}." if crossed else ""
    if stalled:
        words += f" The search ended above {numbers.listing(stalled)}: taken by ranking the margins that were left."
    return _plot("sparsity", "Parameters kept over the search", words.strip(), figure)


def thresholds(run: Run) -> Plot | None:
    """Quantiles of the threshold over the search."""
    if not run.search:
        return None
    figure = svg.canvas(WIDTH_PX, HEIGHT_PX)
    axes = figure.add_subplot()
    steps = [point["step"] for point in run.search]
    quantiles = np.array([point["threshold_quantiles"] for point in run.search], dtype=float).T
    axes.fill_between(steps, quantiles[0], quantiles[4], color=STAND_IN["budget1"], alpha=0.18, linewidth=0)
    axes.fill_between(steps, quantiles[1], quantiles[3], color=STAND_IN["budget1"], alpha=0.35, linewidth=0)
    axes.plot(steps, quantiles[2], color=STAND_IN["budget1"])
    axes.set_yscale("log")
    _threshold_ticks(axes, quantiles)
    _mark_crossings(axes, run)
    axes.set_title("threshold g", loc="left")
    _steps_axis(axes)
    return _plot(
        "thresholds",
        "Thresholds over the search",
        "Median of g over sampled rows, with the middle half (dark band) and the middle nine tenths (light band); "
        f"it ends at {quantiles[2][-1]:.3g}. A parameter goes when its size falls below g.",
        figure,
    )


def pressure(run: Run) -> Plot | None:
    """The pressure over the search."""
    if not run.search:
        return None
    figure = svg.canvas(WIDTH_PX, HEIGHT_PX)
    axes = figure.add_subplot()
    axes.plot([point["step"] for point in run.search], [point["pressure"] for point in run.search], color=INK)
    _mark_crossings(axes, run)
    axes.set_title("pressure u", loc="left")
    _steps_axis(axes)
    return _plot(
        "pressure",
        "Pressure over the search",
        f"The threshold is sigmoid(s + u): s is learned, u is the same for every row. It ends at "
        f"{numbers.MINUS if run.search[-1]['pressure'] < 0 else ''}{abs(run.search[-1]['pressure']):.2f}.",
        figure,
    )


def validation_auc(run: Run) -> Plot | None:
    """Validation AUC of every training."""
    best = {
        name: max(values)
        for name, points in run.histories.items()
        if (values := [value for point in points if (value := point["validation_auc"]) is not None])
    }
    words = numbers.listing([f"{label(name)} {value:.4f}" for name, value in best.items()])
    return _training(run, "validation_auc", "Validation AUC in training", "validation AUC", f"Best: {words}.")


def validation_loss(run: Run) -> Plot | None:
    """Validation log loss of every training."""
    return _training(
        run, "validation_logloss", "Validation log loss in training", "validation log loss", "Lower is better."
    )


def training_loss(run: Run) -> Plot | None:
    """Training loss of every training."""
    return _training(
        run,
        "train_loss",
        "Training loss",
        "training log loss",
        "Where it goes on falling while the validation loss rises, the model learns by heart.",
    )


def where_bytes_are(run: Run) -> Plot | None:
    """Bytes of the exported files by purpose, a bar a model."""
    if not run.manifests:
        return None
    models = list(run.manifests)
    sizes = {name: parts_bytes(run.manifests[name]) for name in models}
    figure = svg.canvas(WIDTH_PX, 96 + 34 * len(models))
    axes = figure.add_subplot()
    widest = max(sum(parts.values()) for parts in sizes.values())
    # Shades of one colour, darkest where compression works: not the budgets' colours, which mean something else.
    shades = (1.0, 0.72, 0.45, 0.25, 0.12)
    left = np.zeros(len(models))
    for part, shade in zip(PARTS, shades, strict=True):
        width = np.array([sizes[name][part] for name in models], dtype=float)
        axes.barh(range(len(models)), width, left=left, color=INK, alpha=shade, height=0.62, label=part, linewidth=0)
        left += width
    for row, name in enumerate(models):
        total = sum(sizes[name].values())
        axes.text(total + widest * 0.015, row, numbers.size(total), va="center", color=INK)
    axes.set_xlim(0, widest * 1.17)
    axes.set_yticks(range(len(models)), [label(name) for name in models])
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.tick_params(axis="y", labelcolor=INK)
    figure.legend(
        loc="outside upper left", ncols=3, frameon=False, handlelength=1, columnspacing=1.2, handletextpad=0.5
    )
    last = models[-1]
    first_part = max(PARTS, key=lambda part: sizes[last][part])
    return _plot(
        "bytes",
        "Where the bytes are",
        f"At {label(last)}, {numbers.percent(sizes[last][first_part] / sum(sizes[last].values()), 2)} "
        f"of the bytes are {first_part}.",
        figure,
    )


FIGURES: dict[str, Callable[[Run], Plot | None]] = {
    "accuracy": accuracy,
    "loss": loss,
    "fields": kept_by_field,
    "columns": kept_by_column,
    "frequency": kept_by_id_frequency,
    "rows": rows_by_kept,
    "sparsity": sparsity,
    "thresholds": thresholds,
    "pressure": pressure,
    "validation_auc": validation_auc,
    "validation_logloss": validation_loss,
    "train_loss": training_loss,
    "bytes": where_bytes_are,
}


def crossing(run: Run, budget: str) -> int | None:
    """Step at which the search first kept no more than a budget; None where it never did."""
    share = _share(run, budget)
    for point in run.search:
        left = point["kept_fraction"] if point["target_fraction"] is None else point["target_fraction"]
        if left <= share * (1 + 1e-9):
            return int(point["step"])
    return None


def _against_bytes(run: Run, key: str, axis: str, name: str, note: str) -> Plot:
    figure = svg.canvas(WIDTH_PX, HEIGHT_PX)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    rows = {model: reported(splits) for model, splits in run.rows.items()}
    scored = {model: value for model, row in rows.items() if (value := _score(row, key)) is not None}
    points = [(float(rows[model]["total_bytes"]), value) for model, value in scored.items()]
    axes.plot(*zip(*sorted(points), strict=True) if points else ([], []), color=LINE, linewidth=2, zorder=1)
    if BASELINE in scored:
        axes.axhline(scored[BASELINE], color=MUTED, linewidth=1.2, dashes=(4, 3), zorder=1)
    for (model, value), (total_bytes, _) in zip(scored.items(), points, strict=True):
        if model == BASELINE:
            style, colour, size = "o", INK, 10.0
        else:
            index = run.budgets.index(model)
            style, colour, size = colours.marker(index), _colour(index), 9.0
        axes.plot(
            [total_bytes],
            [value],
            style,
            color=colour,
            markerfacecolor=PAPER if model == BASELINE else colour,
            markeredgecolor=colour if model == BASELINE else PAPER,
            markeredgewidth=2 if model == BASELINE else 1,
            markersize=size,
        )
        axes.annotate(
            label(model),
            (total_bytes, value),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=colour,
        )
    byte_ticks(axes, [rows[model]["total_bytes"] for model in scored])
    axes.margins(y=0.2)
    _room(axes, [value for _, value in points])
    axes.set_xlabel("bytes in all, log scale")
    split = reported(next(iter(run.rows.values())))["split"]
    axes.set_title(f"{split} {axis}", loc="left")
    words = numbers.listing(
        [
            f"{label(model)}: {value:.4f} in {numbers.size(rows[model]['total_bytes'])}"
            for model, value in scored.items()
        ]
    )
    return _plot(name, f"{split.capitalize()} {axis} against bytes", f"{note} {words}.", figure)


Curve = Literal["train_loss", "validation_auc", "validation_logloss"]


def _training(run: Run, key: Curve, title: str, axis: str, note: str) -> Plot | None:
    curves = {
        name: [(point["step"], value) for point in run.histories[name] if (value := point[key]) is not None]
        for name in run.rows
        if name in run.histories
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    figure = svg.canvas(WIDTH_PX, HEIGHT_PX)
    axes = figure.add_subplot()
    ends = []
    for name, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        if name == BASELINE:
            axes.plot(steps, values, color=INK, marker="o", markersize=4, markerfacecolor=PAPER)
            ends.append((float(values[-1]), label(name), INK))
        else:
            index = run.budgets.index(name)
            axes.plot(steps, values, color=_colour(index), marker=colours.marker(index), markersize=4)
            ends.append((float(values[-1]), label(name), _colour(index)))
    _room(axes, [value for curve in curves.values() for _, value in curve])
    axes.set_title(axis, loc="left")
    _end_labels(axes, ends, x=float(max(curve[-1][0] for curve in curves.values())), height_px=230)
    _steps_axis(axes)
    return _plot(key, title, note, figure)


def _plot(name: str, title: str, note: str, figure: Figure) -> Plot:
    return Plot(name=name, title=title, note=note, svg=svg.inline(figure, name=name, alt=f"{title}. {note}"))


def _score(row: MetricsRow, key: str) -> float | None:
    value = row["auc"] if key == "auc" else row["logloss"]
    return None if value is None or not math.isfinite(value) else value


def _budgets(run: Run) -> list[tuple[int, str]]:
    """Budgets with a scheme where there are schemes, each with the index of its colour."""
    return [(index, name) for index, name in enumerate(run.budgets) if name in run.schemes or not run.schemes]


def _colour(index: int) -> str:
    return STAND_IN[colours.variable(index)]


def _share(run: Run, budget: str) -> float:
    row = reported(run.rows[budget])
    return row["kept_params"] / row["total_params"]


def _any_scheme(run: Run) -> dict[str, TableScheme]:
    return next(iter(run.schemes.values()))["tables"]


def _largest_fields(run: Run) -> list[str]:
    """The fields with the most rows, at most `MOST_FIELDS`, in the model's order."""
    tables = _any_scheme(run)
    largest = set(sorted(tables, key=lambda field: -tables[field]["rows"])[:MOST_FIELDS])
    return [field for field in tables if field in largest]


def _mean_kept(table: TableScheme) -> float:
    return table["kept"] / table["rows"]


def _any_column_mean(tables: dict[str, TableScheme], column: int) -> float:
    """Share of all rows that keep a column."""
    return sum(t["kept_per_column"][column] for t in tables.values()) / sum(t["rows"] for t in tables.values())


def _rows_by_kept(tables: dict[str, TableScheme]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows of all tables that keep 0, 1, … columns."""
    total = np.zeros(max(table["dim"] for table in tables.values()) + 1, np.int64)
    for table in tables.values():
        total[: table["dim"] + 1] += table["rows_by_kept"]
    return total


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _legend(figure: Figure, entries: int) -> None:
    figure.legend(
        loc="outside upper left",
        ncols=min(entries, 4),
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.2,
        handlelength=1.2,
    )


def _room(axes: Axes, values: Sequence[float | None]) -> None:
    """Limits of y that do not magnify noise: at least 0.004 high."""
    present = [value for value in values if value is not None]
    if present:
        low, high = min(present), max(present)
        pad = max(0.15 * (high - low), 0.002)
        axes.set_ylim(low - pad, high + pad * 1.3)


def _steps_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.count(value)))
    axes.grid(axis="x", visible=False)


def byte_ticks(axes: Axes, sizes: Sequence[float]) -> None:
    """A logarithmic axis of bytes, with round numbers, around these sizes."""
    low, high = min(sizes) / 1.25, max(sizes) * 1.25
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.size(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", visible=False)


def _threshold_ticks(axes: Axes, quantiles: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    decades = math.log10(max(quantiles.max(), 1e-30) / max(quantiles[quantiles > 0].min(initial=1.0), 1e-30))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _mark_crossings(axes: Axes, run: Run) -> None:
    """A thin upright line where the search crosses each budget, named at its top."""
    for index, budget in _budgets(run):
        step = crossing(run, budget)
        if step is not None:
            axes.axvline(step, color=_colour(index), linewidth=1, alpha=0.6)
            axes.annotate(
                label(budget),
                (step, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-3, -2),
                textcoords="offset points",
                ha="right",
                va="top",
                rotation=90,
                color=_colour(index),
                fontsize=11,
            )


def _end_labels(axes: Axes, ends: list[tuple[float, str, str]], *, x: float, height_px: float) -> None:
    """Names right of the lines' last points, moved apart where they would overlap."""
    _labels(axes, ends, x=x, height_px=height_px, offset_px=9, align="left")


def _start_labels(axes: Axes, starts: list[tuple[float, str, str]], *, x: float, height_px: float) -> None:
    """Names left of the lines' first points."""
    _labels(axes, starts, x=x, height_px=height_px, offset_px=-9, align="right")


def _labels(
    axes: Axes, places: list[tuple[float, str, str]], *, x: float, height_px: float, offset_px: float, align: str
) -> None:
    # In fractions of the axes' height, which the layout does not change later.
    to_axes = axes.transData + axes.transAxes.inverted()
    ordered = sorted(places)
    wanted = [float(to_axes.transform((x, value))[1]) for value, _, _ in ordered]
    for at, (_, text, colour) in zip(spread(wanted, 15.0 / height_px), ordered, strict=True):
        axes.annotate(
            text,
            (x, at),
            xycoords=("data", "axes fraction"),
            xytext=(offset_px, 0),
            textcoords="offset points",
            ha=align,
            va="center",
            color=colour,
        )


def spread(wanted: list[float], gap: float) -> list[float]:
    """Places as near to the wanted ones as may be, in the same order and at least `gap` apart.

    Neighbours that are too close become a group about their common mean (pool adjacent violators).
    """
    groups: list[list[float]] = []  # each: sum of (wanted - offset in the group), members
    for index, place in enumerate(wanted):
        groups.append([place - index * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += members
    means = [total / members for total, members in groups for _ in range(int(members))]
    return [mean + index * gap for index, mean in enumerate(means)]
