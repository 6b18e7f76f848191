"""A matplotlib figure as SVG to stand inside an HTML page.

The same figure gives the same bytes: no date, and ids from a fixed salt. Lengths are CSS pixels (72 dots an inch, and
one point a pixel), so that a font size here is the font size on the page where the figure has its full width.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from thresher.report.colours import INK, LINE, MUTED, PAPER, VARIABLE

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font, a tenth of the bytes
    "svg.hashsalt": "thresher",
    "figure.dpi": 72,
    "savefig.dpi": 72,
    "font.size": 12.5,
    "axes.titlesize": 12.5,
    "axes.labelsize": 12.5,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.titlecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "patch.edgecolor": PAPER,
    "grid.color": LINE,
    "grid.linewidth": 1.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 4.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "lines.linewidth": 2.0,
    "lines.markersize": 7.0,
    "axes.unicode_minus": True,
    "axes.titlepad": 10.0,
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw in the report's style, whatever the user's matplotlib settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)  # type: ignore[arg-type] # the keys are strings, where it names each
        yield


def canvas(width_px: int, height_px: int) -> Figure:
    """An empty figure; axes are laid out so that no label is cut off."""
    figure = Figure(figsize=(width_px / 72, height_px / 72), layout="constrained")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(w_pad=2 / 72, h_pad=3 / 72)
    return figure


def inline(figure: Figure, *, name: str, alt: str) -> Markup:
    """The SVG element of a figure, for a page that holds several.

    Args:
        figure: drawn within `drawing()`.
        name: prefix of the element's ids, unique on the page.
        alt: what the figure shows, in words.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in [child for child in parent if child.tag.endswith("}metadata")]:
            parent.remove(child)
    referenced = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", buffer.getvalue().decode()))
    for element in root.iter():
        # An HTML parser knows SVG's elements without their namespaces.
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: _coloured(value) for key, value in element.attrib.items()}
        if attributes.get("id") in referenced:
            attributes["id"] = f"{name}-{attributes['id']}"
        else:
            attributes.pop("id", None)
        for key, value in attributes.items():
            if key == "href" and value.startswith("#"):
                attributes[key] = f"#{name}-{value[1:]}"
            attributes[key] = attributes[key].replace("url(#", f"url(#{name}-")
        element.attrib.clear()
        element.attrib.update(attributes)
        element.text = element.text and element.text.strip()
        element.tail = None
    width_px = float(root.attrib["viewBox"].split()[2])
    inner = "".join(ElementTree.tostring(child, encoding="unicode", short_empty_elements=False) for child in root)
    return Markup(
        f'<svg viewBox="{root.attrib["viewBox"]}" style="max-width: {width_px:.0f}px" role="img" '
        f'aria-label="{escape(alt)}">{inner}</svg>'
    )


def _coloured(text: str) -> str:
    return re.sub(r"#0000[0-9a-f]{2}\b", lambda found: VARIABLE.get(found[0], found[0]), text)
