"""Reading the evaluation that this site wrote of a finished study."""

from __future__ import annotations

import json
from typing import Any

from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError


def final_evaluation(home: SiteHome, which: str) -> dict[str, Any]:
    """Return the final evaluation of the study of that name or beginning of its digest.

    Raises
    ------
    ConsiliumError
        ``study.no-results`` when no finished study fits, ``study.ambiguous`` when several do.
    """
    found = []
    for path in sorted(home.reports.glob("*/evaluation.json")):
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["name"] == which or (which and data["study"].startswith(which)):
            found.append({**data, "folder": str(path.parent)})
    if len(found) != 1:
        raise ConsiliumError(
            "study.no-results" if not found else "study.ambiguous",
            f"{len(found) or 'No'} finished studies fit {which!r} here.",
            where=str(home.reports),
            hint="Give more digits of the digest; see `consilium site studies`.",
        )
    return found[0]
