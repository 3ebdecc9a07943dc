"""`consilium demo`: three hospitals and an aggregator on this machine, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consilium_common.console import command, result

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(help="Three hospitals and an aggregator on this machine, end to end.")


@app.callback(invoke_without_command=True)
@command
def demo(
    study: Annotated[
        Path | None, typer.Option(help="A study of your own (default: the demo's).")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Your own images: MSD folder, CSV, or a folder of images per class."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for everything the demo makes; replaced by the next demo.")
    ] = Path("demo-state"),
) -> None:
    """Train a segmentation study with patient-level differential privacy over mutual TLS."""
    from consilium_common.demo.federation import run_demo
    from consilium_common.demo.outcome import conclude, outcome_data, print_outcome

    outcome = conclude(run_demo(out.expanduser().resolve(), study_file=study, data=data))

    def people(console: Console) -> None:
        print_outcome(outcome, console)

    result(outcome_data(outcome), people)
