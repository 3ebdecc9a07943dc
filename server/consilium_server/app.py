"""The ServerApp that the bundle names: it runs the study named in its run's configuration."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from consilium_common.processes import only_one
from consilium_server.home import HOME_VARIABLE, ServerHome
from consilium_server.lifecycle import SIMULATION, end_run
from consilium_server.registry import Registry
from consilium_server.rounds import StudyRun
from consilium_server.states import State

_log = logging.getLogger(__name__)

#: The scheduler names a run in the registry a moment after Flower has begun it.
_NAMED_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02
#: The executor ends the process of a run that was given up; this is longer.
_ALONE_SECONDS: Final = 60.0

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the study; whatever ends it is written down where people look."""
    home = ServerHome.existing(Path(os.environ[HOME_VARIABLE]))
    registry = Registry(home.database)
    digest = registry.study(str(context.run_config["study"])).digest
    run = _name_of(registry, digest, context.run_id)
    if run is None:
        _log.warning("run %s does no study's rounds: it was replaced or stopped", context.run_id)
        return
    try:
        # A run that was given up may still be at work for a moment: two would write over another.
        with only_one(
            home.study_folder(digest) / "lock",
            "Another process does the rounds of this study.",
            hint="It ends by itself; then the study goes on.",
            wait=_ALONE_SECONDS,
        ):
            StudyRun(home, registry, digest, grid).run()
    except Exception as error:
        # A stopped study ends here too: Flower cuts its calls off.
        end_run(registry, digest, run, error)
        raise


def _name_of(registry: Registry, digest: str, run_id: int) -> str | None:
    """Return the name under which the registry knows this run as the study's; None: it does not."""
    end = time.monotonic() + _NAMED_SECONDS
    while time.monotonic() < end:
        row = registry.study(digest)
        if row.state != State.RUNNING or row.flower_run not in (None, str(run_id), SIMULATION):
            return None
        if row.flower_run is not None:
            return row.flower_run
        time.sleep(_POLL_SECONDS)
    return None
