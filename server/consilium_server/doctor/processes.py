"""The step of `server doctor` that reads what the supervisor had to do lately."""

from __future__ import annotations

import json
from typing import Final

from consilium_common.diagnosis.steps import Found
from consilium_common.report.wording import plural
from consilium_server.home import ServerHome
from consilium_server.tables import seconds_since

#: Within so long a process that ends again and again is worth a look.
_RECENT_SECONDS: Final = 3600.0
#: One restart happens to anybody.
_MANY: Final = 3


def processes(home: ServerHome) -> Found:
    """Say how often a process of the aggregator had to be started again in the last hour."""
    try:
        kept = json.loads((home.path / "run" / "supervisor.json").read_text(encoding="utf-8"))
        recent = [str(row["what"]) for row in kept if seconds_since(row["at"]) < _RECENT_SECONDS]
    except (OSError, ValueError, TypeError, KeyError):
        return Found("nothing is known of it yet")
    restarts = [what for what in recent if "starting it again" in what]
    orphans = [what for what in recent if "left from before" in what]
    said = f"{plural(len(restarts), 'restart')} in the last hour"
    if orphans:
        said += f"; {plural(len(orphans), 'orphan')} of a killed aggregator ended"
    if len(restarts) < _MANY:
        return Found(said, facts={"restarts": restarts, "orphans": orphans})
    return Found.warning(
        f"{said}; the last: {restarts[-1]}",
        f"Read the process's log in {home.path / 'logs'}.",
        restarts=restarts,
        orphans=orphans,
    )
