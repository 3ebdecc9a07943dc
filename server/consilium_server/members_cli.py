"""Commands of `consilium server` about members and evidence, here or from one's own computer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consilium_common.console import command, result
from consilium_common.identity.cli import Connect
from consilium_server.home import ServerHome
from consilium_server.options import DEFAULT_HOME, Home

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()


@app.command()
@command
def sites(home: Home = DEFAULT_HOME, connect: Connect = None) -> None:
    """List members: last seen, version, address, expiry, ledger witnessed, words of the key."""
    data = _overview(home, connect)

    def people(console: Console) -> None:
        rows = data["sites"]
        if rows:
            console.print(_sites_table(rows))
        else:
            console.print("No site has joined yet: consilium server invite NAME --out FILE")
        if data["people"]:
            console.print(_people_table(data["people"]))
        console.print(_words_table([*rows, *data["people"]]))
        for row in rows:
            for alarm in row["alarms"]:
                line = f"ALARM {row['name']}, {alarm['at'][:19]}: {alarm['message']}"
                console.print(line, style="bold red", markup=False)

    result(data, people)


@app.command()
@command
def revoke(
    name: Annotated[str, typer.Argument(help="The site, operator or auditor.")],
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Revoke a member's certificate: its calls are refused from now on, open ones within 2 s."""
    from consilium_common.wire import methods

    if connect is not None:
        data = _call(connect, methods.OPERATOR_REVOKE, {"name": name})
    else:
        from consilium_server import members
        from consilium_server.acts import local_refusals, note_local

        server = ServerHome.existing(home)
        with local_refusals(server, "revoke", name):
            data = members.revocation(members.revoke(server, name))
        note_local(server, "revoke", f"{data['role']} {name}", digest=data["fingerprint"])
    result(data, f"{name} is revoked. It can come back with a new invitation.")


@app.command()
@command
def records(
    site: Annotated[str, typer.Argument(help="The site.")],
    file: Annotated[Path, typer.Argument(help="New file to write.", metavar="FILE")],
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Write what the aggregator witnessed and received of a site, signed, for an auditor."""
    import json

    from consilium_common.files import require_new, write_new

    require_new(file)
    if connect is not None:
        from consilium_common.audit.fetch import fetch_records
        from consilium_common.identity.personal import connect as connect_to

        with connect_to(connect) as caller:
            content = fetch_records(caller, site)
    else:
        from consilium_server.acts import local_refusals
        from consilium_server.records import records_here

        server = ServerHome.existing(home)
        with local_refusals(server, "records", site):
            content = records_here(server, site)
    write_new(file, content)
    written = json.loads(content)["content"]
    counts = {name: len(written[name]) for name in ("witnessed", "received")}
    result(
        {"site": site, "file": str(file), **counts},
        f"Records of {site} written to {file}: {counts['witnessed']} ledger entries witnessed,"
        f" {counts['received']} messages received.\n"
        f"Compare them with the site's own: consilium audit compare LEDGER {file}",
    )


@app.command()
@command
def log(
    out: Annotated[
        Path | None,
        typer.Option(help="New file to write, for `consilium audit verify`.", metavar="FILE"),
    ] = None,
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Show the audit log, verified: every privileged act, who did it, when and to what."""
    from consilium_common.audit.acts import read_log
    from consilium_common.files import require_new, write_new

    if out is not None:
        require_new(out)
    if connect is not None:
        from consilium_common.audit.fetch import fetch_log
        from consilium_common.identity.personal import person

        who = person(connect)
        trusted = who.folder / "authority.pem"
        with who.caller() as caller:
            content = fetch_log(caller)
    else:
        from hashlib import sha256

        from consilium_server.acts import local_refusals, note_local
        from consilium_server.records import log_here

        server = ServerHome.existing(home)
        trusted = server.identity / "authority.pem"
        with local_refusals(server, "log", "audit log"):
            content = log_here(server)
        note_local(server, "log", "audit log", digest=sha256(content).hexdigest())
    if out is not None:
        write_new(out, content)
    report = read_log(content, where=str(out or "the audit log"), trusted=trusted)
    result(report.to_dict(), report.print_to)


def _overview(home: Path, connect: Path | None) -> Any:
    if connect is not None:
        from consilium_common.wire import methods

        return _call(connect, methods.OPERATOR_SITES, {})
    from consilium_server.overview import people_overview, sites_overview
    from consilium_server.registry import Registry

    registry = Registry(ServerHome.existing(home).database)
    return {"sites": sites_overview(registry), "people": people_overview(registry)}


def _call(connect: Path, method: str, request: dict[str, Any]) -> Any:
    from consilium_common.identity.personal import connect as connect_to

    with connect_to(connect) as caller:
        return caller.call(method, request)


def _sites_table(rows: list[dict[str, Any]]) -> Any:
    table = _table(
        "site", "status", "online", "last seen (UTC)", "address", "version", "expires", "ledger"
    )
    for row in rows:
        table.add_row(
            row["name"],
            row["status"],
            "yes" if row["online"] else "no",
            _moment(row["last_seen"]),
            row["address"] or "",
            row["version"] or "",
            row["expires"][:10],
            "not seen" if row["witnessed"] is None else f"seen to entry {row['witnessed']}",
        )
    return table


def _people_table(rows: list[dict[str, Any]]) -> Any:
    table = _table("person", "role", "status", "last seen (UTC)", "address", "expires")
    for row in rows:
        table.add_row(
            row["name"],
            row["role"],
            row["status"],
            _moment(row["last_seen"]),
            row["address"] or "",
            row["expires"][:10],
        )
    return table


def _words_table(rows: list[dict[str, Any]]) -> Any:
    table = _table("member", "words of its key, to compare by telephone")
    table.columns[1].no_wrap = True  # read aloud from one line
    for row in rows:
        table.add_row(row["name"], row["words"])
    return table


def _table(*headers: str) -> Any:
    from rich.table import Column, Table

    # In a narrow terminal a long name goes on in the next line: cut off, it would be another's.
    return Table(*(Column(header, overflow="fold") for header in headers))


def _moment(time: str | None) -> str:
    return (time or "never")[:19].replace("T", " ")
