"""How every HTML page of ours is made: escaped, strict, self-contained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment

_SHARED: Final = Path(__file__).parent / "templates"


def page_environment(*folders: Path, filters: Iterable[Callable[..., Any]]) -> Environment:
    """Return where pages are rendered: all text is escaped, and a name nobody gave is an error.

    Parameters
    ----------
    folders : Path
        Templates of one's own, before the shared ones.
    filters : iterable of callable
        Known to the templates by their names.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([*folders, _SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def styles(path: Path | None = None) -> Markup:
    """Return a style sheet of our own as it is (default: the shared one): never foreign text."""
    sheet = _SHARED / "report.css" if path is None else path
    return Markup(sheet.read_text(encoding="utf-8"))  # noqa: S704
