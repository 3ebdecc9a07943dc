"""`consilium study`: check, propose, run and watch studies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_common.console import command, result
from consilium_common.identity.cli import Connect
from consilium_common.wire import methods
from consilium_server.home import ServerHome
from consilium_server.options import DEFAULT_HOME, Home
from consilium_server.signing_cli import sign

if TYPE_CHECKING:
    from rich.console import Console

    from consilium_common.study import Study

app = typer.Typer(no_args_is_help=True, help="Propose, run and watch studies.")
app.command("sign")(sign)

File = Annotated[Path, typer.Argument(help="The study's YAML file.", metavar="FILE")]
Which = Annotated[str, typer.Argument(help="Name, or the first digits of the digest.")]


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
    file: File,
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
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Sign a study and propose it to all sites, or to some."""
    from consilium_common.identity.personal import person
    from consilium_common.study.check import check as check_file
    from consilium_common.wire.statements import proposal_statement

    who = person(connect, home)
    study = check_file(file).study
    weights = _starting_weights(study, start)
    signature = who.sign(proposal_statement(study.digest, who.name))
    with who.caller() as caller:
        if weights is not None:
            from consilium_server.starts import send_start

            send_start(caller, weights)
        answer = caller.call(
            methods.OPERATOR_PROPOSE,
            {"canonical": study.to_canonical(), "signature": signature, "sites": site or None},
        )
    known = " (it was proposed before)" if answer["known"] else ""
    result(
        answer,
        f"Proposed {study.name}, digest {study.digest[:12]}{known}.\n"
        "Sites see it with `consilium site studies` and decide with `consilium site approve`.",
    )


@app.command("list")
@command
def list_studies(home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """List studies and where they stand."""
    data = _call(home, connect, methods.OPERATOR_STUDIES, {})

    def people(console: Console) -> None:
        from rich.table import Table

        table = Table("study", "digest", "state", "rounds", "approved by", "reason")
        for row in data["studies"]:
            table.add_row(
                row["name"],
                row["digest"][:12],
                row["state"],
                f"{row['rounds_done']}/{row['rounds']}",
                str(row["approved"]),
                row["reason"],
            )
        console.print(table)

    result(data, people)


@app.command()
@command
def show(study: Which, home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """Show a study: approvals, rounds, sites, ε."""
    data = _call(home, connect, methods.OPERATOR_SHOW, {"digest": study})

    def people(console: Console) -> None:
        from consilium_server.watching import study_view

        console.print(study_view(data))

    result(data, people)


@app.command()
@command
def stats(study: Which, home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """Show a study's statistics over sites: public values, and noised ones that it asks for."""
    from consilium_server.statistics import print_view, public_view

    data = public_view(_call(home, connect, methods.OPERATOR_SHOW, {"digest": study}))

    def people(console: Console) -> None:
        print_view(data, console)

    result(data, people)


@app.command()
@command
def run(
    study: Which,
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and watch it.")] = False,
) -> None:
    """Start an approved study, or go on with one that stopped, from its last round."""
    data = _call(home, connect, methods.OPERATOR_RUN, {"digest": study})
    if watch:
        _watch(home, connect, data["digest"])
    else:
        result(data, f"Running. Watch it with `consilium study watch {data['digest'][:12]}`.")


@app.command()
@command
def watch(study: Which, home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """Watch a study live until it ends; ends with an error status when the study does."""
    _watch(home, connect, study)


@app.command()
@command
def stop(study: Which, home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """Stop a running study; finished rounds are kept and it can be run on."""
    data = _call(home, connect, methods.OPERATOR_STOP, {"digest": study})
    result(data, "Stopped. Go on with `consilium study run`.")


def _starting_weights(study: Study, file: Path | None) -> bytes | None:
    """Return the weights a study begins with, checked against it; None where it names none."""
    from consilium_common.errors import ConsiliumError
    from consilium_common.models.registry import start_weights

    if file is None and study.model.start is None:
        return None
    if file is None:
        raise ConsiliumError(
            "study.start",
            "The study begins with public weights, and no file of them was given.",
            where="model.start",
            hint="Give it: consilium study propose FILE --start WEIGHTS.safetensors",
        )
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConsiliumError(
            "study.start",
            f"Cannot read the starting weights: {error.strerror or error}.",
            where=str(file),
            hint="Give the safetensors file that model.start.sha256 names.",
        ) from error
    start_weights(study, content)
    return content


def _call(home: Path, connect: Path | None, method: str, request: dict[str, Any]) -> Any:
    from consilium_common.identity.personal import connect as connect_to

    with connect_to(connect, home) as caller:
        return caller.call(method, request)


def _watch(home: Path, connect: Path | None, study: str) -> None:
    from consilium_common.errors import ConsiliumError
    from consilium_common.identity.personal import connect as connect_to
    from consilium_server.watching import evaluation_line, follow

    with connect_to(connect, home) as caller:
        data = follow(lambda: caller.call(methods.OPERATOR_SHOW, {"digest": study}))
    if data["state"] != "finished":
        raise ConsiliumError(
            "run.failed" if data["state"] == "failed" else "run.stopped",
            f"The study {data['name']} {data['state']}: {data['reason']}",
            hint="Mend the cause, then go on with `consilium study run`; no round is lost.",
        )
    why = f": {data['reason']}" if data["reason"] else ""
    lines = [f"{data['name']} finished after {len(data['rounds'])} rounds{why}."]
    if data["evaluation"]:
        lines.append(evaluation_line(data["evaluation"]))
    if connect is None:
        folder = ServerHome.existing(home).study_folder(data["digest"])
        lines.append(f"The model: {folder / 'model.safetensors'}")
    result(data, "\n".join(lines))
