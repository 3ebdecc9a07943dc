"""``consilium audit``: commands for the privacy officer.

Nothing here needs a network or a site; with --connect, and only then, the aggregator is asked.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import click
import typer
from typer.core import TyperGroup

from consilium_common.console import command, note, result
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from rich.console import Console

    from consilium_common.audit.evidence import Evidence

#: Tools that live on a side and are found by name: listed without importing them.
TOOLS: Final = {
    "attack": "Attack the training code as installed here, and say what ε that refutes.",
}


class _WithTools(TyperGroup):
    """Lists the tools of the entry-point group ``consilium.audit``; imports one when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *(name for name in TOOLS if _tool(name))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in TOOLS:
            return super().get_command(ctx, cmd_name)
        found = _tool(cmd_name)
        if found is None:
            return None
        if ctx.resilient_parsing or ctx.params.get("_listing"):
            return click.Command(cmd_name, help=TOOLS[cmd_name])
        alone = typer.Typer(add_completion=False)
        alone.command(cmd_name)(command(found.load()))
        return typer.main.get_command(alone)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Click asks every command for its short help: those of the tools stand in the table.
        ctx.params["_listing"] = True
        super().format_help(ctx, formatter)


app = typer.Typer(
    cls=_WithTools,
    no_args_is_help=True,
    add_completion=False,
    help="Verify ledgers and privacy, offline.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

WitnessOption = Annotated[
    Path | None,
    typer.Option(
        metavar="WITNESS.pem",
        help="The aggregator's witness key or certificate (default: the folder's own).",
    ),
]
AuthorityOption = Annotated[
    Path | None,
    typer.Option(
        metavar="AUTHORITY.pem",
        help="The consortium's authority, known to you: evidence of any other is refused.",
    ),
]
DeltaOption = Annotated[
    float | None,
    typer.Option(help="δ for the worst patient (default: that of the site's policy)."),
]
#: Unlike elsewhere no variable sets it: an audit leaves this computer only when it is told to.
ConnectOption = Annotated[
    Path | None,
    typer.Option(
        "--connect",
        metavar="FOLDER",
        help="Folder of your identity: ask the aggregator itself, over the network.",
    ),
]


@app.command()
@command
def verify(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE...",
            help="Evidence folder, exported .jsonl, a site's ledger.db, or the aggregator's audit"
            " log (.json).",
        ),
    ] = None,
    *,
    key: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PUBLIC.pem",
            help="The site's public ledger key. Once for all, or once per file in order; an "
            "evidence folder brings its own, and must agree with the one given.",
        ),
    ] = None,
    witness: WitnessOption = None,
    authority: AuthorityOption = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SEQUENCE:HASH",
            help="A head noted earlier, once per file in order: finds entries cut off at the end.",
        ),
    ] = None,
    delta: DeltaOption = None,
    connect: ConnectOption = None,
) -> None:
    """Verify every link, signature and witness, and recompute ε by PLD, PRV and RDP.

    Of an aggregator's audit log every entry and the chain; with --connect its log as it is now.
    """
    from consilium_common.audit.acts import is_log
    from consilium_common.audit.evidence import open_evidence
    from consilium_common.audit.ledger_report import ledger_report
    from consilium_common.ledger.entries import Head

    files = files or []
    if connect is not None or any(is_log(file) for file in files):
        if len(files) + (connect is not None) > 1:
            raise ConsiliumError(
                "usage.log",
                "An audit log is verified by itself.",
                hint="Verify ledgers and other logs in commands of their own.",
            )
        _verify_log(files[0] if files else None, connect, authority, head or [])
        return
    if not files:
        raise ConsiliumError(
            "usage.arguments",
            "There is nothing to verify.",
            hint="Give an evidence folder, a ledger or an audit log, or --connect FOLDER.",
        )
    keys: list[Path | None] = [*key] if key else [None]
    if len(keys) == 1:
        keys = keys * len(files)
    if len(keys) != len(files):
        raise ConsiliumError(
            "usage.keys",
            f"There are {len(files)} files and {len(keys)} keys.",
            hint="Give one --key for all files, or one per file in the same order.",
        )
    heads = [Head.parse(text) for text in head or []]
    if heads and len(heads) != len(files):
        raise ConsiliumError(
            "usage.heads",
            f"There are {len(files)} files and {len(heads)} heads.",
            hint="Give one --head per file in the same order, or none.",
        )
    expected: list[Head | None] = list(heads) if heads else [None] * len(files)
    evidence = [
        open_evidence(path, key=one, witness=witness, authority=authority)
        for path, one in zip(files, keys, strict=True)
    ]
    reports = []
    broken: list[ConsiliumError] = []
    for one, expected_head in zip(evidence, expected, strict=True):
        try:
            reports.append(ledger_report(one, expected_head=expected_head, delta=delta))
        except ConsiliumError as error:
            broken.append(error)
    if broken:
        # One envelope, one error: the first. The other files' outcomes are diagnostics.
        for report in reports:
            note(f"{report.file}: verified, {report.entries} entries, head {report.head}")
        for other in broken[1:]:
            note(str(other))
        raise broken[0]

    def people(console: Console) -> None:
        for report in reports:
            report.print_to(console)

    result({"ledgers": [report.to_dict() for report in reports]}, people)


@app.command()
@command
def report(
    evidence: Annotated[
        Path,
        typer.Argument(
            metavar="EVIDENCE", help="Evidence folder, exported .jsonl, or a site's ledger.db."
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="REPORT.html", help="The file to write.")],
    key: Annotated[
        Path | None,
        typer.Option(metavar="PUBLIC.pem", help="The site's public ledger key, known to you."),
    ] = None,
    witness: WitnessOption = None,
    authority: AuthorityOption = None,
    records: Annotated[
        Path | None,
        typer.Option(metavar="RECORDS.json", help="The aggregator's records of this site."),
    ] = None,
    study: Annotated[
        list[Path] | None,
        typer.Option(metavar="STUDY", help="A study's document, for its name; repeatable."),
    ] = None,
    delta: DeltaOption = None,
    json_out: Annotated[
        Path | None, typer.Option(metavar="REPORT.json", help="Write the same as JSON, too.")
    ] = None,
    connect: ConnectOption = None,
) -> None:
    """Write one HTML file with everything that can be recomputed about a site's privacy.

    With --connect the aggregator's records of the site are fetched from it.
    """
    from consilium_common.audit.evidence import open_evidence
    from consilium_common.audit.fetch import records_for
    from consilium_common.audit.privacy_report import audit_report
    from consilium_common.audit.report_page import write_report

    opened = open_evidence(
        evidence, key=key, witness=witness, authority=authority, studies=study or ()
    )
    said = records_for(opened, records, connect, authority)
    found = audit_report(opened, records=said, delta=delta)
    write_report(found, out, json_out)
    result(found.to_dict(), found.summary(out))


@app.command()
@command
def plan(
    *,
    patients: Annotated[
        list[int], typer.Option(metavar="N", help="Patients a site trains on; repeat to compare.")
    ],
    study: Annotated[
        Path | None, typer.Option(metavar="STUDY.yaml", help="Plan this study as it is written.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Target ε of the whole training.")] = None,
    delta: Annotated[float | None, typer.Option(help="δ (default: 1/(10 N)).")] = None,
    steps: Annotated[int | None, typer.Option(help="Local steps over all rounds.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that the steps are cut into.")] = 20,
    rate: Annotated[
        float | None, typer.Option(help="Sampling rate q: chance of a patient in a step.")
    ] = None,
    per_step: Annotated[
        int | None, typer.Option(help="Instead of --rate: patients in a step, on average.")
    ] = None,
    clip: Annotated[float, typer.Option(help="Clip norm C of one patient's gradient.")] = 1.0,
    values: Annotated[
        int | None, typer.Option(help="Trained values of the network, for noise against signal.")
    ] = None,
    sites: Annotated[int, typer.Option(help="Sites of that size whose updates are averaged.")] = 1,
    budget: Annotated[float, typer.Option(help="ε that one patient may ever spend.")] = 10.0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|svg", help="Draw it as well.")
    ] = None,
) -> None:
    """Say before anybody spends budget: σ, ε, rounds left, and whether noise drowns the signal."""
    from consilium_common.audit.planning import plan_for, plan_study

    if plot is not None:
        from consilium_common.audit.drawings import check_plot

        check_plot(plot)  # before minutes of computing
    if study is not None:
        if (epsilon, delta, steps, rate, per_step, values) != (None,) * 6:
            raise ConsiliumError(
                "usage.plan",
                "A study says its own ε, δ, steps, rate and values.",
                where=str(study),
                hint="Leave those options out, or leave out --study.",
            )
        from consilium_common.models.registry import trained_count
        from consilium_common.study.load import load_study

        read = load_study(study)
        found = plan_study(read, patients, values=trained_count(read), budget=budget, sites=sites)
    else:
        if epsilon is None or steps is None:
            raise ConsiliumError(
                "usage.plan",
                "A plan needs --epsilon and --steps, or a --study.",
                hint="For example: consilium audit plan --patients 50 --patients 500 "
                "--epsilon 3 --steps 160 --per-step 10",
            )
        found = plan_for(
            patients,
            epsilon=epsilon,
            delta=delta,
            steps=steps,
            rounds=rounds,
            rate=rate,
            per_step=per_step,
            clip_norm=clip,
            values=values,
            budget=budget,
            sites=sites,
        )
    if plot is not None:
        from consilium_common.audit.drawings import draw_plan

        draw_plan(found, plot)
    result(found.to_dict(), found.print_to)


@app.command()
@command
def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="Evidence folder, exported .jsonl or ledger.db.")
    ],
    b: Annotated[
        Path | None,
        typer.Argument(
            metavar="B",
            help="The same, or the aggregator's records (.json); with --connect these are fetched.",
        ),
    ] = None,
    *,
    key: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PUBLIC.pem",
            help="The site's public ledger key: once for both, or once for A and once for B.",
        ),
    ] = None,
    witness: WitnessOption = None,
    authority: AuthorityOption = None,
    connect: ConnectOption = None,
) -> None:
    """Compare two ledgers of a site, or a ledger with the aggregator's records; 6 if they differ.

    Like `diff`: each difference is a line on stdout. Those marked ! never come from honest records.
    """
    from consilium_common.audit.compare import compare_ledgers, compare_records
    from consilium_common.audit.documents import read_records
    from consilium_common.audit.evidence import open_evidence
    from consilium_common.audit.fetch import records_for

    if (b is None) is (connect is None):
        raise ConsiliumError(
            "usage.compare",
            "A ledger is compared with one thing.",
            hint="Give another ledger or the aggregator's records as B, or --connect FOLDER.",
        )
    keys: list[Path | None] = [*key] if key else [None]
    if len(keys) > 2:
        raise ConsiliumError("usage.keys", f"There are two ledgers and {len(keys)} keys.")

    def opened(path: Path, which: Path | None) -> Evidence:
        return open_evidence(path, key=which, witness=witness, authority=authority)

    if b is None:
        mine = opened(a, keys[0])
        fetched = records_for(mine, None, connect, authority)
        assert fetched is not None
        found = compare_records(mine, fetched)
    elif b.suffix == ".json":
        found = compare_records(opened(a, keys[0]), read_records(b, trusted=authority))
    elif a.suffix == ".json":
        found = compare_records(opened(b, keys[0]), read_records(a, trusted=authority))
    else:
        found = compare_ledgers(opened(a, keys[0]), opened(b, keys[-1]))
    result(found.to_dict(), found.print_to)
    if not found.same:
        raise typer.Exit(6)


@app.command()
@command
def export(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER.db", help="A site's ledger.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to write.")],
) -> None:
    """Write a ledger as one line of canonical JSON per entry, to hand to an auditor."""
    from consilium_common.files import require_new
    from consilium_common.ledger.store import Ledger

    if out.suffix != ".jsonl":
        raise ConsiliumError(
            "usage.export", "An export ends in .jsonl.", where=str(out), hint="Rename the output."
        )
    require_new(out)
    with Ledger.open(ledger) as opened:
        head = opened.export_jsonl(out)
        site = opened.site
    result(
        {"file": str(out), "site": site, "entries": head.sequence + 1, "head": str(head)},
        f"Wrote {head.sequence + 1} entries of {site} to {out}.\n"
        f"Head {head}: note it where the site cannot change it, and give it to "
        "`consilium audit verify --head` later.",
    )


def _tool(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group="consilium.audit", name=name)), None)


def _verify_log(
    file: Path | None, connect: Path | None, authority: Path | None, heads: list[str]
) -> None:
    """Verify the aggregator's audit log, from a file or from the aggregator."""
    from consilium_common.audit.acts import read_log
    from consilium_common.ledger.entries import Head

    if len(heads) > 1:
        raise ConsiliumError("usage.heads", f"There is one log and {len(heads)} heads.")
    if file is not None:
        content, where = file.read_bytes(), str(file)
    else:
        from consilium_common.audit.fetch import fetch_log
        from consilium_common.identity.personal import person

        who = person(connect)
        authority = authority or who.folder / "authority.pem"
        with who.caller() as caller:
            content, where = fetch_log(caller), who.settings.address
    head = Head.parse(heads[0]) if heads else None
    report = read_log(content, where=where, trusted=authority, head=head)
    result({"log": report.to_dict()}, report.print_to)
