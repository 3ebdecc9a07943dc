"""`consilium server doctor`: what is wrong with the aggregator, or with the way to it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consilium_common.console import command, result
from consilium_common.errors import ConsiliumError
from consilium_server.home import ServerHome
from consilium_server.options import DEFAULT_HOME, Home


@command
def doctor(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="With --ticket: new file to write.")
    ] = None,
    home: Home = DEFAULT_HOME,
    ticket: Annotated[
        bool,
        typer.Option(
            "--ticket", help="Write a text for your network department to FILE, or show it."
        ),
    ] = False,
) -> None:
    """Go step by step from the configuration to the way in, and stop at the first cause.

    Configuration, rights, clock, registry, identity, operator, authority, audit log, members, open
    files, disk, memory, processes, port, TLS, services, version, speed, DNS, the address that sites
    use: what was tried, what happened, what to do.

    Exit status: 0 all is well, 10 warnings only; else that of the cause: 5 identity, 6 audit log,
    7 network, 8 this machine's state.
    """
    from consilium_common.diagnosis.page import conclude, live
    from consilium_common.diagnosis.steps import examine
    from consilium_server.doctor.aggregator import ServerDoctor

    looked = ServerDoctor(ServerHome.existing(home))
    if file is not None and not ticket:
        raise ConsiliumError(
            "usage.ticket", "A file is given without --ticket.", hint="Write: --ticket FILE"
        )
    if not ticket:
        conclude(examine(looked.checks(), live()), {})
        return

    from consilium_common.diagnosis.ticket import save_ticket, server_ticket
    from consilium_server.registry import Registry

    target = looked.configuration()
    diagnosis = examine(looked.network_checks(), lambda _: None)
    sites = [(site.name, site.address or "") for site in Registry(looked.home.database).sites()]
    listening = f"port {target.port}" if looked.local is None else looked.local.address
    text = server_ticket(target, listening, sites).text(target, diagnosis)
    if file is not None:
        save_ticket(file, text)
    data = {"file": str(file) if file else None, "text": text, "steps": diagnosis.to_list()}
    said = f"Written to {file}; send it to your network department." if file else text.rstrip("\n")
    result(data, said)
