"""report.html: one file with everything in it, that needs neither a network nor a script."""

from __future__ import annotations

import html
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from localsteer.evaluate.report import plots
from localsteer.evaluate.report.document import Picture, document, slug, spans

if TYPE_CHECKING:
    from jinja2 import Environment


def render(results: Any) -> str:
    """The page. Text from results.json is escaped; plots are left out without matplotlib.

    Raises LocalsteerError for results that are broken or of a newer format.
    """
    page = document(results)
    has_plots = plots.available()
    template = _environment(has_plots).from_string(_template())
    return template.render(document=page, has_plots=has_plots, install=plots.INSTALL)


def _template() -> str:
    return (files(__package__) / "template.html").read_text(encoding="utf-8")


def _environment(has_plots: bool) -> Environment:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["slug"] = slug
    environment.filters["prose"] = lambda text: Markup(_prose(text))
    environment.filters["picture"] = lambda picture: Markup(_picture(picture)) if has_plots else ""
    return environment


def _prose(text: str) -> str:
    return "".join(
        f"<code>{html.escape(piece)}</code>" if is_name else html.escape(piece)
        for piece, is_name in spans(text)
    )


def _picture(picture: Picture) -> str:
    """matplotlib escapes the texts inside; the label is ours."""
    drawn = plots.svg(picture.plot, salt=picture.name)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{html.escape(picture.title)}"', 1)
