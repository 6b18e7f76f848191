"""Means over few seeds with their confidence, and which of several results no other one beats."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values, and half the width of its confidence interval: None for a single value."""

    mean: float
    half_width: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's confidence interval of independent, roughly normal values; at least one."""
    n = len(values)
    half_width = student_t(CONFIDENCE, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(statistics.fmean(values), half_width, n)


@functools.cache
def student_t(confidence: float, degrees: int) -> float:
    """The t within which Student's distribution with that many degrees of freedom lies with probability `confidence`.

    By bisection over the angle atan(t / sqrt(degrees)), to the precision of a float.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)), exactly (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def pareto_front(points: Sequence[tuple[float, float]], tolerance: float = 0.0) -> list[bool]:
    """Which of the points (cost, gain), cost above 0, no other one beats.

    One beats another that gains less and costs as much or more, or gains the same and costs more. Costs that differ by
    less than the share `tolerance` count as the same, where the gains differ.
    """

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        if one[1] == other[1]:
            return one[0] < other[0]
        return one[1] > other[1] and one[0] <= other[0] * (1 + tolerance)

    return [not any(beats(other, point) for other in points) for point in points]
