"""Options that the aggregator's commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consilium_server.home import HOME_VARIABLE

DEFAULT_HOME = Path("aggregator")

Home = Annotated[
    Path,
    typer.Option("--home", envvar=HOME_VARIABLE, help="The aggregator's state folder."),
]
