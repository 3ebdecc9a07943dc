"""The ServerApp that the bundle names: it runs the study named in its run's configuration."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from consilium_common.errors import ConsiliumError
from consilium_server.home import HOME_VARIABLE, ServerHome
from consilium_server.registry import Registry
from consilium_server.rounds import StudyRun

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the study; whatever ends it is written down where people look."""
    home = ServerHome.existing(Path(os.environ[HOME_VARIABLE]))
    registry = Registry(home.database)
    digest = registry.study(str(context.run_config["study"])).digest
    try:
        StudyRun(home, registry, digest, grid).run()
    except ConsiliumError as error:
        registry.fail_running(digest, str(error))
        raise
    except Exception as error:
        # A stopped study ends here too: Flower cuts its calls off.
        registry.fail_running(digest, f"internal error: {type(error).__name__}")
        raise
