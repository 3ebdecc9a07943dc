"""The findings as one HTML page that needs nothing else, with pictures; it stays at the site."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from consilium_client.data.findings import Finding
from consilium_client.data.ingest.cache import Ingested
from consilium_client.data.rules import Severity
from consilium_client.data.thumbnail import picture_png
from consilium_common.report import wording
from consilium_common.report.pages import page_environment, styles
from consilium_common.report.study_report import Tile

_TEMPLATES: Final = Path(__file__).parent / "templates"
#: Findings of one rule, and pictures, that a page shows: it must open in a second.
_ROWS: Final = 100
_PICTURES: Final = 120
_GLANCE: Final = 12
_PIXELS: Final = 160


@dataclass(frozen=True)
class Subject:
    """What was checked.

    Parameters
    ----------
    site : str
        Name of the site.
    study : str
        Title of the study that the cases were held against; empty for none.
    cases, patients : int
        All that cases.csv lists.
    entries : mapping
        The good cases in the cache, for their pictures.
    """

    site: str
    study: str
    cases: int
    patients: int
    entries: Mapping[str, Ingested]


@dataclass(frozen=True)
class _Row:
    finding: Finding
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class _Group:
    """The findings of one rule."""

    code: str
    severity: Severity
    why: str
    #: What to do, where it is the same for all.
    hint: str
    rows: tuple[_Row, ...]
    count: int

    @property
    def more(self) -> int:
        return self.count - len(self.rows)

    @property
    def has_cases(self) -> bool:
        return any(row.finding.case for row in self.rows)

    @property
    def has_pictures(self) -> bool:
        return any(row.pictures for row in self.rows)


def render_page(subject: Subject, findings: Sequence[Finding], *, fixed: Sequence[str] = ()) -> str:
    """Return the page, with its styles and pictures inside; all text is escaped.

    Parameters
    ----------
    findings : sequence of Finding
        In the order to show; one rule's findings stand together.
    fixed : sequence of str
        What `--fix` has mended, one line each.
    """
    environment = page_environment(_TEMPLATES, filters=(wording.plural, wording.moment))
    return environment.get_template("data_check.html").render(
        subject=subject,
        groups=_groups(findings, subject.entries),
        fixed=fixed,
        tiles=_tiles(subject, findings),
        glance=_glance(subject.entries),
        written_at=datetime.now(UTC),
        css=styles(),
        more_css=styles(_TEMPLATES / "data_check.css"),
    )


def _tiles(subject: Subject, findings: Sequence[Finding]) -> list[Tile]:
    bad = [finding for finding in findings if finding.severity == "error"]
    errors, warnings = len(bad), len(findings) - len(bad)
    tiles = [
        Tile("Cases", str(subject.cases), f"of {wording.plural(subject.patients, 'patient')}"),
        Tile("Readable", str(len(subject.entries)), "in the cache, ready to prepare"),
        Tile("Errors", str(errors), "must be mended" if errors else "none"),
        Tile("Warnings", str(warnings), "want a look" if warnings else "none"),
    ]
    return tiles


def _groups(findings: Sequence[Finding], entries: Mapping[str, Ingested]) -> list[_Group]:
    by_code: dict[str, list[Finding]] = {}
    for finding in findings:
        by_code.setdefault(finding.code, []).append(finding)
    left = _PICTURES
    groups = []
    for code, together in by_code.items():
        rows = []
        for finding in together[:_ROWS]:
            pictures = _pictures(finding, entries)[:left]
            left -= len(pictures)
            rows.append(_Row(finding, pictures))
        hints = {finding.hint for finding in together}
        first = together[0]
        hint = first.hint if len(hints) == 1 else ""
        groups.append(_Group(code, first.severity, first.why, hint, tuple(rows), len(together)))
    return groups


def _pictures(finding: Finding, entries: Mapping[str, Ingested]) -> tuple[str, ...]:
    if finding.pictures:
        return tuple(_uri(picture) for picture in finding.pictures)
    entry = entries.get(finding.case)
    return tuple(_uri(picture) for picture in ([_thumbnail(entry)] if entry else []) if picture)


def _glance(entries: Mapping[str, Ingested]) -> list[tuple[str, str]]:
    """Return a few cases of the whole cohort, evenly spread: name and picture."""
    names = list(entries)
    count = min(len(names), _GLANCE)
    chosen = [names[place * len(names) // count] for place in range(count)]
    shown = ((name, _thumbnail(entries[name])) for name in chosen)
    return [(name, _uri(picture)) for name, picture in shown if picture]


def _thumbnail(entry: Ingested) -> bytes:
    """Return the picture of a case's first channel; nothing where the cache is damaged."""
    try:
        return picture_png(entry.image(entry.channels[0]), _PIXELS)
    except (OSError, ValueError):
        return b""


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
