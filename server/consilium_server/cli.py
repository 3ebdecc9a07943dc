"""`consilium server`: run the aggregator, invite and revoke sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consilium_common.console import command, note, result
from consilium_server.home import HOME_VARIABLE, ServerHome

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Run the aggregator: identities, gateway, sites.")

Home = Annotated[
    Path,
    typer.Option("--home", envvar=HOME_VARIABLE, help="The aggregator's state folder."),
]
DEFAULT_HOME = Path("aggregator")


@app.command()
@command
def init(
    address: Annotated[
        str, typer.Option(help="host:port that sites connect to; it stands in invitations.")
    ],
    name: Annotated[str, typer.Option(help="The consortium's name, for people.")] = "consortium",
    home: Home = DEFAULT_HOME,
) -> None:
    """Make the consortium's authority, the server's and the operator's identity, once."""
    from consilium_server.members import initialise

    server = ServerHome.create(home)
    authority = initialise(server, name, address)
    result(
        {"home": str(server.path), "consortium": authority.consortium, "address": address},
        f"The aggregator of {name!r} is ready in {server.path}.\n"
        f"Keep {server.identity / 'authority-key.pem'} safe: whoever has it is the consortium.\n"
        f"Next: consilium server start --home {home}",
    )


@app.command()
@command
def start(
    home: Home = DEFAULT_HOME,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",  # noqa: S104 - sites come from outside
    port: Annotated[
        int | None, typer.Option(help="Port to listen on (default: that of the address).")
    ] = None,
) -> None:
    """Run the aggregator until Ctrl-C or SIGTERM."""
    import asyncio
    import logging
    import sys

    from consilium_server.supervisor import serve

    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    server = ServerHome.existing(home)
    asyncio.run(serve(server, host, port or server.load_config().port, note))


@app.command()
@command
def invite(
    name: Annotated[str, typer.Argument(help="The site's name: lower case, digits, hyphens.")],
    out: Annotated[Path, typer.Option(help="File to write; send it to the site, and only there.")],
    hours: Annotated[float, typer.Option(min=0.0, max=24 * 30, help="How long it is valid.")] = 72,
    home: Home = DEFAULT_HOME,
) -> None:
    """Write a single-use invitation file for a site."""
    from datetime import timedelta

    from consilium_common.identity.invitation import write_invitation
    from consilium_server import members

    invitation = members.invite(ServerHome.existing(home), name, timedelta(hours=hours))
    write_invitation(out, invitation)
    result(
        {"name": name, "file": str(out), "expires": invitation.expires.isoformat()},
        f"Invitation for {name} written to {out}; it works once, until"
        f" {invitation.expires:%Y-%m-%d %H:%M} UTC.\nAt the site: consilium site join {out.name}",
    )


@app.command()
@command
def sites(home: Home = DEFAULT_HOME) -> None:
    """List sites: online, last seen, version, expiry, how far their ledgers were witnessed."""
    from consilium_server.overview import sites_overview
    from consilium_server.registry import Registry

    rows = sites_overview(Registry(ServerHome.existing(home).database))

    def people(console: Console) -> None:
        from rich.table import Table

        table = Table("site", "status", "online", "last seen (UTC)", "version", "expires", "ledger")
        for row in rows:
            table.add_row(
                row["name"],
                row["status"],
                "yes" if row["online"] else "no",
                (row["last_seen"] or "never")[:19].replace("T", " "),
                row["version"] or "",
                row["expires"][:10],
                "not seen" if row["witnessed"] is None else f"seen to entry {row['witnessed']}",
            )
        console.print(table if rows else "No site has joined yet: consilium server invite NAME")
        for row in rows:
            for alarm in row["alarms"]:
                line = f"ALARM {row['name']}, {alarm['at'][:19]}: {alarm['message']}"
                console.print(line, style="bold red", markup=False)

    result({"sites": rows}, people)


@app.command()
@command
def records(
    site: Annotated[str, typer.Argument(help="The site.")],
    file: Annotated[Path, typer.Argument(help="New file to write.", metavar="FILE")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Write what the aggregator witnessed and received of a site, signed, for an auditor."""
    from consilium_server.records import write_records

    content = write_records(ServerHome.existing(home), site, file)["content"]
    counts = {name: len(content[name]) for name in ("witnessed", "received")}
    result(
        {"site": site, "file": str(file), **counts},
        f"Records of {site} written to {file}: {counts['witnessed']} ledger entries witnessed,"
        f" {counts['received']} messages received.\n"
        f"Compare them with the site's own: consilium audit compare LEDGER {file}",
    )


@app.command()
@command
def revoke(
    name: Annotated[str, typer.Argument(help="The site.")], home: Home = DEFAULT_HOME
) -> None:
    """Revoke a site's certificate: its calls are refused from now on."""
    from consilium_server import members

    member = members.revoke(ServerHome.existing(home), name)
    result(
        {"name": member.name, "status": member.status},
        f"{name} is revoked. It can come back with a new invitation.",
    )
