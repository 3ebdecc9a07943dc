"""`consilium site`: join a consortium, import data, approve studies, train, account for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_client.data.cli import data_app
from consilium_client.data.doctor.cli import doctor
from consilium_client.home import HOME_VARIABLE, SiteHome
from consilium_client.segmenting import segment
from consilium_common.console import command, note, result
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from rich.console import Console

    from consilium_client.reviewing import Review

app = typer.Typer(
    no_args_is_help=True, help="Run a hospital site: data, approval, training, budget."
)
app.add_typer(data_app, name="data")
app.command("segment")(segment)
app.command("doctor")(doctor)

Home = Annotated[
    Path, typer.Option("--home", envvar=HOME_VARIABLE, help="The site's state folder.")
]
DEFAULT_HOME = Path("site")
Which = Annotated[str, typer.Argument(help="Name of the study, or first digits of its digest.")]
Cohort = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Cohort size to declare in public (default: training patients, rounded down).",
    ),
]
Tested = Annotated[
    int | None,
    typer.Option(
        "--evaluation-size",
        min=1,
        help="Test patients to declare in public, where noised evaluation figures leave "
        "(default: to the nearest five).",
    ),
]


@app.command()
@command
def join(
    invitation: Annotated[Path, typer.Argument(help="The file the aggregator operator sent.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Join a consortium: make this site's keys here and have them certified."""
    from consilium_client.budget.policy import write_default_policy
    from consilium_client.identity import join as join_consortium

    site = SiteHome.create(home)
    config = join_consortium(site, invitation)
    policy = write_default_policy(site)
    result(
        {"site": config.name, "address": config.address, "home": str(site.path)},
        f"This site is {config.name} of {config.consortium!r}; its keys are in {site.identity}.\n"
        f"Read and adapt its policy: {policy}\n"
        "Next: consilium site data import FOLDER, then consilium site start",
    )


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
def studies(home: Home = DEFAULT_HOME) -> None:
    """List proposed studies and this site's decisions."""
    from consilium_client.identity import SiteIdentity
    from consilium_client.reviewing import proposals

    rows = [
        {
            "digest": p.study.digest,
            "name": p.study.name,
            "privacy": p.study.privacy.mode,
            "proposed_by": p.proposed_by,
            "proposed_at": p.proposed_at,
            "state": p.state,
            "decision": p.decision,
        }
        for p in proposals(SiteIdentity.load(SiteHome.existing(home)))
    ]

    def people(console: Console) -> None:
        from rich.table import Table

        table = Table("study", "digest", "privacy", "proposed by", "state", "our decision")
        for row in rows:
            table.add_row(
                row["name"],
                str(row["digest"])[:12],
                row["privacy"],
                row["proposed_by"],
                row["state"],
                row["decision"] or "open",
            )
        console.print(table if rows else "No study was proposed yet.")

    result({"studies": rows}, people)


@app.command()
@command
def review(
    study: Which,
    cohort_size: Cohort = None,
    evaluation_size: Tested = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Show in words what a study would do here, what would leave, and what it costs."""
    found = _review(home, study, cohort_size, evaluation_size)
    result(_review_data(found), "\n".join(_review_lines(found)))


@app.command()
@command
def approve(
    study: Which,
    cohort_size: Cohort = None,
    evaluation_size: Tested = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Approve a study: sign its digest. Nothing else may ever run under this approval.

    Patients whose privacy budget the study would overrun are left out of it from here on.
    """
    from consilium_client.identity import SiteIdentity
    from consilium_client.reviewing import approve as approve_study

    found = _review(home, study, cohort_size, evaluation_size)
    if not yes:
        note("\n".join(_review_lines(found)))
        typer.confirm("Approve?", abort=True, err=True)
    site = SiteHome.existing(home)
    answer = approve_study(site, SiteIdentity.load(site), found)
    tested = f" and {found.evaluation_size} test patients" if found.evaluation_size else ""
    result(
        {**_review_data(found), **answer},
        f"Approved {found.proposal.study.name} ({found.proposal.study.digest[:12]}), declaring"
        f" {found.cohort_size} patients{tested}. {found.price.sentences()[0]}",
    )


@app.command()
@command
def decline(
    study: Which,
    why: Annotated[str, typer.Option(help="Shown to the aggregator operator.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Decline a study; one that was approved stops training here."""
    from consilium_client.identity import SiteIdentity
    from consilium_client.reviewing import decline as decline_study

    site = SiteHome.existing(home)
    answer = decline_study(site, SiteIdentity.load(site), study, why)
    result(answer, f"Declined {answer['digest'][:12]}.")


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
def egress(
    study: Annotated[str, typer.Argument(help="First digits of a digest; all if empty.")] = "",
    home: Home = DEFAULT_HOME,
) -> None:
    """List all that was stored to leave this site: study, purpose, round, bytes, SHA-256."""
    from consilium_client.evidence import egress_rows

    rows = egress_rows(SiteHome.existing(home), study)

    def people(console: Console) -> None:
        from rich.table import Table

        table = Table("study", "what", "bytes", "SHA-256", "stored (UTC)")
        for row in rows:
            number = row["round"]
            what = {
                "training": f"update of round {number + 1}",
                "evaluation": f"figures after round {number}",
                "statistics": "noised statistics",
            }
            table.add_row(
                row["study"][:12],
                what[row["purpose"]],
                str(row["bytes"]),
                row["sha256"][:12],
                row["stored_at"][:16].replace("T", " "),
            )
        console.print(table if rows else "Nothing was stored yet: nothing has left this site.")

    result({"updates": rows}, people)


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
        f" {data['released']} releases, in {data['folder']}\n"
        f"Next: consilium audit report {data['folder']}",
    )


def _print_figures(console: Console, data: dict[str, Any], title: str) -> None:
    from rich.table import Table

    what = title or f"after {data['rounds_done']} rounds"
    console.print(f"{data['name']}, {what}, {data['cases']} test cases", markup=False)
    if "dice" in data:
        table = Table("class", "Dice", "cases")
        for name, row in data["dice"].items():
            mean = "–" if row["mean"] is None else f"{row['mean']:.3f}"
            table.add_row(name, mean, str(row["count"]))
        console.print(table)
    if "accuracy" in data:
        console.print(f"accuracy {data['accuracy']:.3f}")


def _review(home: Path, study: str, cohort_size: int | None, evaluation_size: int | None) -> Review:
    from consilium_client.identity import SiteIdentity
    from consilium_client.reviewing import review as review_study

    site = SiteHome.existing(home)
    identity = SiteIdentity.load(site)
    return review_study(site, identity, study, cohort_size, evaluation_size, say=note)


def _review_data(found: Review) -> dict[str, Any]:
    return {
        "digest": found.proposal.study.digest,
        "name": found.proposal.study.name,
        "patients": found.patients,
        "evaluated": found.evaluated,
        "cohort_size": found.cohort_size,
        "evaluation_size": found.evaluation_size,
        "price": found.price.to_dict(),
    }


def _review_lines(found: Review) -> list[str]:
    from consilium_common.study.plan import describe

    here = f"Here: {found.patients} training patients; {found.cohort_size} would be declared."
    if found.evaluation_size:
        here += (
            f" {found.evaluated} test patients; {found.evaluation_size} would be declared. Scores"
            " are centred before they are summed, so rounding this number moves the mean little."
        )
    lines = [*describe(found.proposal.study), "", here, *found.price.sentences()]
    if not found.price.allowed:
        lines += [f"This site refuses it: {found.price.reason}", found.price.hint]
    return lines
