"""`consilium site data show` and `stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consilium_client.data.terminal import HERE, Home, progress_shown
from consilium_client.home import SiteHome
from consilium_common.console import command, note, result


@command
def show_(
    case: Annotated[str, typer.Argument(help="Name of the case, as `site data list` shows it.")],
    *,
    out: Annotated[Path | None, typer.Option(help="PNG to write (default: in reports/).")] = None,
    home: Home = HERE,
) -> None:
    """Draw a case: slices of every channel, with the contours of its label."""
    from consilium_client.data.looking.show import show_case

    path = show_case(SiteHome.existing(home), case, out)
    note("The picture shows a patient: it stays at this site.")
    result({"picture": str(path)}, f"The picture is {path}.")


@command
def stats_(
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page of plots (default: reports/).")
    ] = None,
    home: Home = HERE,
) -> None:
    """Describe the cohort: sizes, intensities, classes, scanners; a table and a page of plots."""
    from consilium_client.data.looking.stats import cohort_statistics
    from consilium_client.data.looking.stats_page import statistics_table, write_plots

    opened = SiteHome.existing(home)
    with progress_shown() as (progress, say):
        found = cohort_statistics(opened, progress=progress, say=say)
    path = write_plots(found, (out or opened.reports) / "data-stats.png")
    note("These figures describe patients: they stay at this site.")
    result(
        {**found.to_dict(), "plots": str(path)}, lambda console: statistics_table(console, found)
    )
    note(f"The plots are {path}.")
