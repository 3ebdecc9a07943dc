"""Reading the evaluations that this site wrote of a study: they stay at the site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError

_FINAL: Final = "evaluation.json"
_START: Final = "round-00000.json"


def newest_evaluation(home: SiteHome, which: str) -> dict[str, Any]:
    """Return the newest evaluation of the study of that name or beginning of its digest.

    Of a finished study that is the final one. ``start`` is the evaluation of the starting model,
    None where there was none: what the study had before anybody spent anything on training.

    Raises
    ------
    ConsiliumError
        ``study.no-results`` when no evaluated study fits, ``study.ambiguous`` when several do;
        ``state.report`` when a report is damaged.
    """
    found = []
    for folder in sorted(path for path in home.reports.glob("*") if path.is_dir()):
        rounds = sorted(folder.glob("round-*.json"))
        final = folder / _FINAL
        if not rounds and not final.exists():
            continue
        data = _read(final if final.exists() else rounds[-1])
        if data["name"] == which or (which and data["study"].startswith(which)):
            start = folder / _START
            found.append(
                {
                    **data,
                    "finished": final.exists(),
                    "start": _read(start) if start.exists() else None,
                    "folder": str(folder),
                }
            )
    if len(found) != 1:
        raise ConsiliumError(
            "study.no-results" if not found else "study.ambiguous",
            f"{len(found) or 'No'} evaluated studies fit {which!r} here.",
            where=str(home.reports),
            hint="Give more digits of the digest; see `consilium site studies`.",
        )
    return found[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not {"name", "study", "rounds_done"} <= set(data):
            raise ValueError("it is no evaluation")
    except (OSError, ValueError, TypeError) as error:
        raise ConsiliumError(
            "state.report",
            "An evaluation that this site wrote is damaged.",
            where=str(path),
            hint="Restore it from your backup, or remove its folder.",
        ) from error
    return dict(data)
