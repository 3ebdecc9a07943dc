"""`consilium site`: join a consortium, import data, approve studies, train, account for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_client.approval_cli import (
    Which,
    approve,
    decline,
    review,
    studies,
    withdraw,
)
from consilium_client.data.cli import data_app
from consilium_client.doctor.cli import doctor
from consilium_client.egress_cli import egress
from consilium_client.home import SiteHome
from consilium_client.identity_cli import DEFAULT_HOME, Home, join, renew
from consilium_client.segmenting import segment
from consilium_common.console import command, note, result
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    no_args_is_help=True, help="Run a hospital site: data, approval, training, budget."
)
app.add_typer(data_app, name="data")
app.command("join")(join)
app.command("renew")(renew)
for _decision in (studies, review, approve, decline, withdraw):
    app.command(_decision.__name__)(_decision)
app.command("segment")(segment)
app.command("doctor")(doctor)
app.command("egress")(egress)


@app.command()
@command
def start(home: Home = DEFAULT_HOME) -> None:
    """Run the site until Ctrl-C or SIGTERM: connect, train approved studies."""
    import asyncio
    import logging
    import sys

    from consilium_client.budget.policy_record import record_current_policy
    from consilium_client.identity import SiteIdentity
    from consilium_client.supervisor import serve

    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    site = SiteHome.existing(home)
    identity = SiteIdentity.load(site)
    try:
        record_current_policy(site, identity)
    except ConsiliumError as error:
        # A site without a sound policy or ledger stays reachable, and every round is refused.
        note(f"nothing will be trained: {error.message} ({error.code}) {error.hint}")
    asyncio.run(serve(site, note))


@app.command()
@command
def policy(home: Home = DEFAULT_HOME) -> None:
    """Check policy.yaml, show it in words, and record a change of it in the ledger."""
    from consilium_client.budget.policy_record import record_current_policy
    from consilium_client.identity import SiteIdentity

    site = SiteHome.existing(home)
    found = record_current_policy(site, SiteIdentity.load(site))
    result(found.to_dict(), "\n".join(found.lines()))


@app.command()
@command
def budget(
    patient: Annotated[
        str | None,
        typer.Option(help="patient_id of one patient, as in cases.csv; - reads it from stdin."),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="Name or first digits of the digest of a charged study.")
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Show what patients have spent of their privacy budget, and what is left."""
    import sys

    from consilium_client.budget.table import budget_command

    # From stdin an identifier stands neither in the shell's history nor in the process list.
    patient_id = sys.stdin.readline().strip() if patient == "-" else patient
    budget_command(home, patient_id, study)


@app.command()
@command
def results(study: Which, home: Home = DEFAULT_HOME) -> None:
    """Show how the newest model does on this site's own test patients; stays at the site."""
    from consilium_client.results import newest_evaluation

    data = newest_evaluation(SiteHome.existing(home), study)

    def people(console: Console) -> None:
        start = data["start"] if data["rounds_done"] else None
        for title, figures in (("starting model", start), ("", data)):
            if figures is not None:
                _print_figures(console, figures, title)
        console.print(f"report folder: {data['folder']}", markup=False)

    result(data, people)


@app.command()
@command
def evidence(
    folder: Annotated[Path, typer.Argument(help="New folder to write.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Write what the privacy officer needs: ledger, keys, studies, egress; for `audit report`."""
    from consilium_client.evidence import write_evidence
    from consilium_client.identity import SiteIdentity

    site = SiteHome.existing(home)
    data = write_evidence(site, SiteIdentity.load(site), folder)
    result(
        data,
        f"Evidence of {data['site']} up to ledger entry {data['head']}: {data['studies']} studies,"
        f" {data['released']} releases, {data['receipts']} receipts, in {data['folder']}\n"
        f"Next: consilium audit report {data['folder']}",
    )


def _print_figures(console: Console, data: dict[str, Any], title: str) -> None:
    from rich.table import Table

    what = title or f"after {data['rounds_done']} rounds"
    if data.get("model") == "personal":
        what += ", this site's personal model"
    console.print(f"{data['name']}, {what}, {data['cases']} test cases", markup=False)
    if "dice" in data:
        table = Table("class", "Dice", "cases")
        for name, row in data["dice"].items():
            mean = "–" if row["mean"] is None else f"{row['mean']:.3f}"
            table.add_row(name, mean, str(row["count"]))
        console.print(table)
    if "accuracy" in data:
        console.print(f"accuracy {data['accuracy']:.3f}")
