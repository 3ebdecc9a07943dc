"""`consilium study simulate`: a study on one machine, over the folders of its sites."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consilium_common.console import command, result

if TYPE_CHECKING:
    from rich.console import Console


@command
def simulate(
    file: Annotated[Path, typer.Argument(help="The study's YAML file.", metavar="FILE")],
    sites: Annotated[
        Path,
        typer.Option(help="Folder with a folder for each site, as `site data import` fills it."),
    ],
    out: Annotated[Path, typer.Option(help="New folder for all that is made.")] = Path(
        "simulation"
    ),
    start: Annotated[
        Path | None, typer.Option(help="Public weights that the study begins with.")
    ] = None,
    together: Annotated[
        int, typer.Option(min=0, help="Sites that train at a time (default: one a processor).")
    ] = 0,
) -> None:
    """Run a study on this machine alone, on Flower's simulation engine (extra `simulation`).

    Sites, ledgers and certificates are made for it and good for nothing else: no site is asked, no
    budget of a real site is spent, and nothing leaves. The model is that of the same study over
    the network, bit for bit, where no privacy noise is drawn, every site answers every round, and
    all train on alike CPUs.
    """
    from consilium_common.study.load import load_study
    from consilium_server.simulating import simulate as simulate_study
    from consilium_server.starts import read_start

    study = load_study(file)
    weights = read_start(study, start)
    done = simulate_study(study, sites.resolve(), out.resolve(), start=weights, together=together)
    with done.model.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()

    def people(console: Console) -> None:
        from consilium_server.watching import study_view

        console.print(study_view(done.shown))
        console.print(f"Model: {done.model}", markup=False)
        console.print(
            "Each site's own evaluation: consilium site results "
            f"{study.digest[:12]} --home {out / 'sites'}/SITE",
            markup=False,
        )

    result({**done.shown, "model": str(done.model), "sha256": sha256}, people)
