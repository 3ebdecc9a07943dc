"""`consilium study`: check, propose, run and watch studies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_common.console import command, result
from consilium_common.identity.cli import Connect
from consilium_common.wire import methods
from consilium_server import running_cli
from consilium_server.options import DEFAULT_HOME, Home
from consilium_server.running_cli import Which, ask, ask_study
from consilium_server.signing_cli import sign
from consilium_server.simulating_cli import simulate

if TYPE_CHECKING:
    from rich.console import Console


app = typer.Typer(no_args_is_help=True, help="Propose, run and watch studies.")
app.command("sign")(sign)
app.command("simulate")(simulate)
app.add_typer(running_cli.app)

File = Annotated[Path, typer.Argument(help="The study's YAML file.", metavar="FILE")]


@app.command()
@command
def check(
    file: File,
    patients: Annotated[
        int | None,
        typer.Option(min=1, help="Say what the noise leaves of the signal with so many patients."),
    ] = None,
) -> None:
    """Check a study file and say in words what it does, what leaves a site and what it costs."""
    from consilium_common.study.check import check as check_file

    checked = check_file(file, patients=patients)
    result(checked.data, "\n".join(checked.lines))


@app.command()
@command
def examples(
    out: Annotated[Path | None, typer.Option(help="Folder to copy them to.")] = None,
) -> None:
    """List the studies that come with consilium, or copy them."""
    from consilium_common.study.examples import example_files

    files = example_files()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for path in files:
            (out / path.name).write_bytes(path.read_bytes())
    result(
        {"examples": [path.stem for path in files], "copied_to": str(out) if out else None},
        "\n".join(path.stem for path in files) + (f"\ncopied to {out}" if out else ""),
    )


@app.command()
@command
def propose(
    study: Annotated[
        str,
        typer.Argument(help="The study's YAML file, or the digest of a draft.", metavar="STUDY"),
    ],
    *,
    start: Annotated[
        Path | None,
        typer.Option(
            help="The public starting weights that the study names, safetensors.", metavar="WEIGHTS"
        ),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(help="Propose it to this site alone; repeatable (default: to all)."),
    ] = None,
    draft: Annotated[
        bool,
        typer.Option("--draft", help="Keep it at the aggregator; no site sees it yet."),
    ] = False,
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Sign a study and propose it to all sites, or to some."""
    from consilium_common.identity.personal import person
    from consilium_common.study.check import check as check_file
    from consilium_common.study.load import study_from_canonical
    from consilium_common.wire.statements import proposal_statement
    from consilium_server.starts import read_start, send_start

    who, file = person(connect, home), Path(study)
    if file.is_file() or file.suffix in (".yaml", ".yml"):
        read = check_file(file).study
    else:
        shown = ask(home, connect, methods.OPERATOR_SHOW, {"digest": study})
        read = study_from_canonical(shown["study"])
    request: dict[str, Any] = {
        "canonical": read.to_canonical(),
        "sites": site or None,
        "draft": draft,
    }
    if not draft:
        request["signature"] = who.sign(proposal_statement(read.digest, who.name))
    # Of a draft that is proposed the weights are there already.
    weights = read_start(read, start) if file.is_file() or start else None
    with who.caller() as caller:
        if weights is not None:
            send_start(caller, weights)
        answer = caller.call(methods.OPERATOR_PROPOSE, request)
    known = " (it was there before)" if answer["known"] else ""
    digest = read.digest[:12]
    result(
        answer,
        f"Kept {read.name} as a draft, digest {digest}{known}.\n"
        f"Propose it with `consilium study propose {digest}`."
        if draft
        else f"Proposed {read.name}, digest {digest}{known}.\n"
        "Sites see it with `consilium site studies` and decide with `consilium site approve`.",
    )


@app.command()
@command
def clone(
    study: Which,
    *,
    out: Annotated[Path, typer.Option(help="YAML file to write; it must not exist.")],
    name: Annotated[str | None, typer.Option(help="Name of the new study.")] = None,
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Write a study's YAML to a file, for changing: every change makes another study."""
    import yaml

    from consilium_common.files import require_new, write_atomic

    require_new(out)
    shown = ask(home, connect, methods.OPERATOR_SHOW, {"digest": study})
    text = yaml.safe_dump(_renamed(shown["study"], name), sort_keys=False, allow_unicode=True)
    write_atomic(out, f"# From {shown['name']}, digest {shown['digest'][:12]}.\n{text}".encode())
    result(
        {"file": str(out), "of": shown["digest"]},
        f"Wrote {out}. Change it, then: consilium study check {out}",
    )


@app.command()
@command
def compare(
    first: Which,
    second: Which,
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Compare two studies: what differs in their documents, and what came of each."""
    from consilium_server.comparing import print_comparison, side_by_side

    data = side_by_side(ask_study(home, connect, first), ask_study(home, connect, second))
    result(data, lambda console: print_comparison(data, console))


@app.command("list")
@command
def list_studies(home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """List studies and where they stand."""
    data = ask(home, connect, methods.OPERATOR_STUDIES, {})

    def people(console: Console) -> None:
        from rich.table import Table

        table = Table("study", "digest", "state", "priority", "rounds", "approved by", "why")
        for row in data["studies"]:
            table.add_row(
                row["name"],
                row["digest"][:12],
                row["state"] + (f", place {row['place']}" if row["place"] else ""),
                str(row["priority"]),
                f"{row['rounds_done']}/{row['rounds']}",
                str(row["approved"]),
                row["waits_for"] or row["reason"],
            )
        console.print(table)

    result(data, people)


@app.command()
@command
def show(study: Which, home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """Show a study: approvals, rounds, sites, ε."""
    data = ask_study(home, connect, study)

    def people(console: Console) -> None:
        from consilium_server.watching import study_view

        console.print(study_view(data))

    result(data, people)


def _renamed(document: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Return a study's document under another name, in the order of a study file."""
    from pydantic import ValidationError

    from consilium_common.errors import ConsiliumError
    from consilium_common.study import Study

    document = document if name is None else {**document, "name": name}
    try:
        return Study.model_validate(document).to_canonical()
    except ValidationError as error:
        if name is not None and any(one["loc"] == ("name",) for one in error.errors()):
            raise ConsiliumError(
                "usage.name",
                f"{name!r} cannot be a study's name.",
                where="--name",
                hint="Take up to 63 small letters, digits, dots and hyphens, as in liver-ct-2.",
            ) from error
        return document  # of another release: `study check` says what to change in it


@app.command()
@command
def stats(study: Which, home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """Show a study's statistics over sites: public values, and noised ones that it asks for."""
    from consilium_server.statistics import print_view, public_view

    data = public_view(ask_study(home, connect, study))

    def people(console: Console) -> None:
        print_view(data, console)

    result(data, people)
