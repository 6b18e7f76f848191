"""What came out, in sentences made from the numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from thresher.report import numbers
from thresher.report.numbers import NBSP
from thresher.report.read import BASELINE, MetricsRow, Run

# A budget whose AUC is further below the uniform model's lost accuracy; 0.001 is what papers on click prediction
# call a difference that matters, and runs with other seeds differ by about as much.
TOLERANCE = 0.002


@dataclass(frozen=True)
class Verdict:
    """The finding of a run."""

    sentence: str
    further: list[str]
    lost: list[str]  # budgets that lost accuracy
    headline: str | None  # the budget that the sentence is about


def label(budget: str) -> str:
    """A budget as people read it: `20 %`, `20 K parameters`, `12 MB`, `uniform`."""
    if budget == BASELINE:
        return "uniform"
    if budget.endswith("B"):
        return f"{budget.rstrip('kMGiB')}{NBSP}{budget.lstrip('0123456789.')}"
    if budget.endswith("p"):
        return f"{numbers.count(int(budget[:-1]))}{NBSP}parameters"
    return numbers.percent(float(budget))


def reported(splits: dict[str, MetricsRow]) -> MetricsRow:
    """The row that is reported: of the test split, or of validation where nothing else was scored."""
    return splits.get("test") or next(iter(splits.values()))


def difference(run: Run, budget: str, split: str | None = None) -> float | None:
    """AUC of a budget minus the uniform model's, on the same split; None where either is missing."""
    row = reported(run.rows[budget]) if split is None else run.rows[budget].get(split)
    base = run.baseline.get(row["split"]) if row is not None else None
    if row is None or base is None or row["auc"] is None or base["auc"] is None:
        return None
    return row["auc"] - base["auc"]


def judge(run: Run) -> Verdict:
    """The finding of a run.

    The sentence is about the smallest budget that held the uniform model's AUC on the *validation* split (within
    `TOLERANCE`), so that the test split chooses nothing; where none did, about the one with the best AUC there.
    """
    if not run.budgets:
        row = reported(run.baseline)
        sentence = (
            f"The uniform model's {row['split']} AUC is {numbers.score(row['auc'])} in "
            f"{numbers.size(row['total_bytes'])}; no budget has been scored yet."
        )
        return Verdict(sentence=sentence, further=[], lost=[], headline=None)
    split = "validation" if all("validation" in run.rows[name] for name in run.rows) else None
    differences = {budget: difference(run, budget, split) for budget in run.budgets}
    held = [budget for budget, change in differences.items() if change is not None and change >= -TOLERANCE]
    headline = held[-1] if held else max(run.budgets, key=lambda budget: _auc(run, budget, split))
    lost = [budget for budget in run.budgets if (difference(run, budget) or 0.0) < -TOLERANCE]
    return Verdict(
        sentence=_sentence(run, headline),
        further=_further(run, headline, lost),
        lost=lost,
        headline=headline,
    )


def _auc(run: Run, budget: str, split: str | None) -> float:
    row = reported(run.rows[budget]) if split is None else run.rows[budget][split]
    return -math.inf if row["auc"] is None else row["auc"]


def _share(row: MetricsRow, budget: str) -> str:
    """`20 % of the parameters`, from the parameters that really stayed."""
    if budget.endswith(("p", "B")):
        return f"{numbers.count(row['kept_params'])} of {numbers.count(row['total_params'])} parameters"
    return f"{label(budget)} of the parameters"


def _sentence(run: Run, budget: str) -> str:
    row = reported(run.rows[budget])
    words = f"At {_share(row, budget)} the {row['split']} AUC is {numbers.score(row['auc'])}"
    change = difference(run, budget)
    base = run.baseline.get(row["split"])
    if base is None or change is None:
        return f"{words}, in {numbers.size(row['total_bytes'])}. There is no uniform model to compare it with."
    if numbers.signed(change) == "0.0000":
        words += ", the same as the uniform model’s"
    else:
        words += f", {abs(change):.4f} {'above' if change > 0 else 'below'} the uniform model’s"
    times = base["total_bytes"] / row["total_bytes"]
    if times >= 1:
        return f"{words}, in {times:.1f} times fewer bytes."
    return f"{words}, but it takes {1 / times:.2f} times the bytes."


def _further(run: Run, headline: str, lost: list[str]) -> list[str]:
    if not run.baseline:
        return []
    sentences = []
    if set(lost) == set(run.budgets):
        sentences.append(
            f"Every budget lost accuracy: {_below(run, lost)}."
            if len(lost) > 1
            else f"That budget lost accuracy: more than {TOLERANCE} of AUC."
        )
    elif lost:
        sentences.append(f"Accuracy was lost at {_below(run, lost)}.")
    else:
        sentences.append(f"No budget lost more than {TOLERANCE} of AUC.")
    row, base = reported(run.rows[headline]), reported(run.baseline)
    sentences.append(
        f"The export shrinks from {numbers.size(base['total_bytes'])} to {numbers.size(row['total_bytes'])}, "
        f"its tables from {numbers.size(base['table_bytes'])} to {numbers.size(row['table_bytes'])}."
        if row["total_bytes"] <= base["total_bytes"]
        else f"The export grows from {numbers.size(base['total_bytes'])} to {numbers.size(row['total_bytes'])}."
    )
    return sentences


def _below(run: Run, lost: list[str]) -> str:
    return numbers.listing(
        [f"{label(budget)} ({abs(difference(run, budget) or 0.0):.4f} below the uniform model)" for budget in lost[:1]]
        + [f"{label(budget)} ({abs(difference(run, budget) or 0.0):.4f} below)" for budget in lost[1:]]
    )


def auc_standard_error(auc: float, positives: float, negatives: float) -> float:
    """Standard error of an AUC over that many samples (Hanley and McNeil, Radiology 143, 1982, equation 1)."""
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc * auc) + (negatives - 1) * (q2 - auc * auc)
    return math.sqrt(variance / (positives * negatives))
