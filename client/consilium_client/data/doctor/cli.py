"""`consilium site doctor`: is everything at this site as it should be?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from consilium_client.data.terminal import HERE, FitsStudy, Fix, Home, progress_shown
from consilium_client.home import SiteHome
from consilium_common.console import command, err, note, result
from consilium_common.errors import WARNINGS_ONLY

if TYPE_CHECKING:
    from rich.console import Console

    from consilium_client.data.doctor.site import Part


@command
def doctor(
    home: Home = HERE,
    *,
    study: FitsStudy = None,
    fix: Fix = False,
) -> None:
    """Look at the whole site: rights, disk, cache, and its data as `site data check` does.

    Exit status: 0 nothing found, 10 warnings only, 4 errors among the data.
    """
    from consilium_client.data.doctor.outcome import visit
    from consilium_client.data.findings import findings_table

    opened = SiteHome.existing(home)
    with progress_shown() as (progress, _):
        found = visit(opened, study=study, fix=fix, progress=progress)
    if len(found.findings) > 1 or (found.error is None and found.findings):
        err().print(findings_table(found.findings))
    if found.error is not None:
        for part in found.parts:
            note(_line(part))
        raise found.error

    def people(console: Console) -> None:
        for line in (*found.fixed, *map(_line, found.parts)):
            console.print(line, markup=False)

    result(_data(found.parts, found.fixed), people)
    if found.findings:
        raise typer.Exit(WARNINGS_ONLY)


def _line(part: Part) -> str:
    mark = "✗" if any(one.severity == "error" for one in part.findings) else "!"
    return f"{mark if part.findings else '✓'} {part.name}: {part.said}"


def _data(parts: tuple[Part, ...], fixed: tuple[str, ...]) -> dict[str, Any]:
    return {
        "fixed": list(fixed),
        "parts": {
            part.name: {
                "said": part.said,
                "findings": [finding.to_dict() for finding in part.findings],
            }
            for part in parts
        },
    }
