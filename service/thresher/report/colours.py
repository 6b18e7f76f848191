"""Colours of the report, as CSS variables with one value for light paper and one for dark.

Matplotlib draws with a stand-in for each variable; `svg` replaces the stand-ins by `var(--name)`, so that a figure
follows the reader's colour scheme. The budgets' colours were chosen for contrast (4.5:1 or more against the paper,
since labels are written in them) and to differ for readers with red-, green- and blue-blindness.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "ink": "#14181f",
    "muted": "#565e6b",
    "line": "#d5dae1",
    "budget0": "#263ba8",
    "budget1": "#17808c",
    "budget2": "#b85c00",
    "budget3": "#7a0f45",
    "budget4": "#48560a",
    "budget5": "#9148e6",
}
DARK = {
    "paper": "#14181f",
    "ink": "#e9ecf1",
    "muted": "#a9b1bd",
    "line": "#39414d",
    "budget0": "#8583fa",
    "budget1": "#66e4e0",
    "budget2": "#dba44e",
    "budget3": "#f2558c",
    "budget4": "#cbe25a",
    "budget5": "#c4a8f7",
}
BUDGETS = 6
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")

# The stand-ins: near-black blues that nothing else draws with. Black itself will not do: SVG leaves it unsaid.
STAND_IN = {name: f"#0000{index + 1:02x}" for index, name in enumerate(LIGHT)}
VARIABLE = {stand_in: f"var(--{name})" for name, stand_in in STAND_IN.items()}

INK, MUTED, LINE, PAPER = (STAND_IN[name] for name in ("ink", "muted", "line", "paper"))


def variable(index: int) -> str:
    """Name of the CSS variable of the budget that stands at `index`, the largest being 0."""
    return f"budget{index % BUDGETS}"


def marker(index: int) -> str:
    """Matplotlib marker of the budget at `index`: its second sign, for readers who see no colour."""
    return MARKERS[index % len(MARKERS)]


def declarations(colours: dict[str, str]) -> str:
    """The CSS declarations of a palette."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
