"""The pages' templates and the CSS that they share."""

from __future__ import annotations

import jinja2
from markupsafe import Markup

from thresher.report import colours


def render(template: str, **values: object) -> str:
    """A page made from one of this folder's templates, which finds the CSS of all pages as `css`.

    Raises:
        jinja2.UndefinedError: if the template uses a value that is not given.
    """
    loader = jinja2.PackageLoader("thresher.report", ".")
    templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    css, _, _ = loader.get_source(templates, "page.css")
    own = Markup(_palette() + css)  # our own file: nothing of a run's is in it
    return templates.get_template(template).render(css=own, **values)


def _palette() -> str:
    """The CSS of the colours, for light paper and for dark."""
    light, dark = colours.declarations(colours.LIGHT), colours.declarations(colours.DARK)
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"  # paper stays white in print
    )
