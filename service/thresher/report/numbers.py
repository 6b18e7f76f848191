"""Numbers as people read them: 12.4 KB, 1.2 M, 20 %, 1 min 12 s.

A no-break space stands before each unit, a true minus sign before each negative difference. KB is 1,000 bytes.
"""

from __future__ import annotations

import math

NBSP = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"


def _scaled(x: float, units: tuple[str, ...]) -> str:
    """Three significant digits and the unit, in steps of 1,000; whole numbers below 1,000 as they are."""
    power = 0
    while abs(x) >= 999.5 and power < len(units) - 1:
        x /= 1000
        power += 1
    digits = 0 if power == 0 or abs(x) >= 99.95 else 1 if abs(x) >= 9.995 else 2
    text = f"{x:,.{digits}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"{text}{NBSP}{units[power]}".rstrip()


def count(x: float) -> str:
    """A count: in full below 10,000, then `12.4 K`, `1.2 M`."""
    return f"{x:,.0f}" if abs(x) < 10_000 else _scaled(x, ("", "K", "M", "G", "T"))


def size(n_bytes: float) -> str:
    """A size in bytes: `812 B`, `12.4 KB`."""
    return _scaled(n_bytes, ("B", "KB", "MB", "GB", "TB", "PB"))


def percent(share: float, digits: int = 3) -> str:
    """A share as a percentage of at most `digits` significant digits: `20 %`, `0.5 %`."""
    if 0 < abs(share) < 1e-5:
        return f"<{NBSP}0.001{NBSP}%"
    return f"{float(f'{100 * share:.{digits}g}'):g}{NBSP}%"


def duration(seconds: float) -> str:
    """A time: `0.42 s`, `8.4 s`, `1 min 12 s`, `2 h 05 min`."""
    if seconds < 0.995:
        return f"{seconds:.2f}{NBSP}s"
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest_s:02}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60:02}{NBSP}min"


def score(x: float | None) -> str:
    """An AUC or log loss: four decimals."""
    return MISSING if x is None or not math.isfinite(x) else f"{x:.4f}"


def signed(x: float | None) -> str:
    """A difference of scores with its sign: `+0.0003`, `−0.0102`; `0.0000` has none."""
    if x is None or not math.isfinite(x):
        return MISSING
    text = f"{abs(x):.4f}"
    return text if float(text) == 0 else ("+" if x > 0 else MINUS) + text


def listing(words: list[str]) -> str:
    """Words as a sentence lists them: `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
