"""`consilium server`: run the aggregator, invite and revoke sites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consilium_common.console import command, note, result
from consilium_common.identity.cli import Connect
from consilium_server import identity_cli, members_cli
from consilium_server.doctor.cli import doctor
from consilium_server.home import ServerHome
from consilium_server.identity_cli import PassphraseFile
from consilium_server.options import DEFAULT_HOME, Home

app = typer.Typer(no_args_is_help=True, help="Run the aggregator: identities, gateway, sites.")


@app.command()
@command
def init(
    address: Annotated[
        str, typer.Option(help="host:port that sites connect to; it stands in invitations.")
    ],
    *,
    name: Annotated[str, typer.Option(help="The consortium's name, for people.")] = "consortium",
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Lock the authority's key; asks twice.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    offline_authority: Annotated[
        Path | None,
        typer.Option(help="New folder, on a medium to take away, for the authority's key."),
    ] = None,
    database_file: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="File with a PostgreSQL URL (default: SQLite)."
        ),
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Make the consortium's authority, the server's and the operator's identity, once."""
    from consilium_common.identity.passphrase import new_passphrase
    from consilium_common.identity.trust import key_of
    from consilium_common.identity.words import fingerprint_words
    from consilium_server.acts import note_local
    from consilium_server.members import initialise

    locked = new_passphrase(passphrase_file) if passphrase or passphrase_file else None
    server = ServerHome.create(home)
    database = "" if database_file is None else database_file.read_text(encoding="utf-8").strip()
    authority = initialise(
        server,
        name,
        address,
        passphrase=locked,
        offline=offline_authority,
        database=database,
    )
    note_local(server, "init", name, digest=key_of(authority.certificate))
    words = fingerprint_words(authority.certificate)
    key_file = (offline_authority or server.identity) / "authority-key.pem"
    result(
        {
            "home": str(server.path),
            "consortium": authority.consortium,
            "address": address,
            "authority_words": words,
            "authority_key": str(key_file),
        },
        f"The aggregator of {name!r} is ready in {server.path}.\n"
        f"Keep {key_file} safe: whoever has it is the consortium.\n"
        f"Words of the authority, to read to sites by telephone: {words}\n"
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
    passphrase_file: PassphraseFile = None,
) -> None:
    """Run the aggregator until Ctrl-C or SIGTERM."""
    import asyncio
    import logging
    import sys

    from consilium_server import handshakes

    handshakes.listen()  # before gRPC is imported
    from consilium_common.identity.trust import Trust
    from consilium_common.identity.words import fingerprint_words
    from consilium_server.issuing import passphrase_for
    from consilium_server.supervisor import serve

    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    server = ServerHome.existing(home)
    locked = passphrase_for(server.identity / "authority-key.pem", passphrase_file)
    authority = Trust.read(server.identity / "authority.pem").authorities[0]
    note(f"words of the authority: {fingerprint_words(authority)}")
    listening = port or server.load_config().port
    asyncio.run(serve(server, host, listening, note, passphrase=locked))


@app.command()
@command
def invite(
    name: Annotated[str, typer.Argument(help="Its name: lower case, digits, hyphens.")],
    *,
    out: Annotated[Path, typer.Option(help="File to write; send it to them, and only there.")],
    role: Annotated[str, typer.Option(help="site, operator or auditor.")] = "site",
    hours: Annotated[float, typer.Option(min=0.0, max=24 * 30, help="How long it is valid.")] = 72,
    home: Home = DEFAULT_HOME,
    connect: Connect = None,
) -> None:
    """Write a single-use invitation file for a site, an operator or an auditor."""
    from datetime import timedelta

    from consilium_common.files import require_new
    from consilium_common.identity.invitation import write_invitation
    from consilium_common.identity.words import fingerprint_words
    from consilium_server.inviting import invite_here, invite_remotely, read_role

    wanted, lifetime = read_role(role), timedelta(hours=hours)
    require_new(out)
    if connect is not None:
        from consilium_common.identity.personal import person

        invitation = invite_remotely(person(connect), name, wanted, lifetime)
    else:
        invitation = invite_here(ServerHome.existing(home), name, wanted, lifetime)
    write_invitation(out, invitation)
    words = fingerprint_words(invitation.trust.authorities[0])
    command_there = "site" if wanted == "site" else "identity"
    result(
        {
            "name": name,
            "role": wanted,
            "file": str(out),
            "expires": invitation.expires.isoformat(),
            "authority_words": words,
        },
        f"Invitation for {wanted} {name} written to {out}; it works once, until"
        f" {invitation.expires:%Y-%m-%d %H:%M} UTC.\n"
        f"There: consilium {command_there} join {out.name}\n"
        f"Words of the authority, to compare by telephone: {words}",
    )


app.add_typer(members_cli.app)
app.add_typer(identity_cli.app)
app.command("doctor")(doctor)
