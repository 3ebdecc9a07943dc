"""`consilium site doctor`: what is wrong in the first hour, and on any later day?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consilium_client.data.terminal import HERE, FitsStudy, Fix, Home, progress_shown
from consilium_client.home import SiteHome
from consilium_common.console import MODE, command, err, out, result
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from consilium_client.doctor.site import SiteDoctor

Ticket = Annotated[
    bool,
    typer.Option("--ticket", help="Write a text for your network department to FILE, or show it."),
]
TicketFile = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="With --ticket: new file to write.")
]


@command
def doctor(
    file: TicketFile = None,
    *,
    home: Home = HERE,
    study: FitsStudy = None,
    fix: Fix = False,
    ticket: Ticket = False,
    invitation: Annotated[
        Path | None,
        typer.Option(
            help="Before joining: look at the way to the aggregator that this invitation names. "
            "It stays unused."
        ),
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(help="With --invitation: HTTPS proxy, as `site join` takes it."),
    ] = None,
    proxy_login: Annotated[
        Path | None,
        typer.Option(help="With --proxy: file with user:password, readable by you alone."),
    ] = None,
) -> None:
    """Go step by step from the configuration to the budget, and stop at the first cause.

    Configuration, rights, clock, DNS, TCP, proxy, TLS, identity, revocation, version, speed,
    what the link refused, disk, memory, GPU, cache, data, budget: what was tried, what happened,
    what to do.

    Exit status: 0 all is well, 10 warnings only; else that of the cause: 4 data, 5 identity,
    6 privacy, 7 network, 8 this machine's state.
    """
    from consilium_client.data.doctor.examination import sorted_findings
    from consilium_client.data.doctor.outcome import mended
    from consilium_client.data.findings import findings_table
    from consilium_client.doctor.site import SiteDoctor, Way
    from consilium_common.diagnosis.page import conclude, live
    from consilium_common.diagnosis.steps import examine

    # Before joining there may be no folder yet; it is made where joining will look for it.
    fresh = invitation is not None and not home.expanduser().exists()
    opened = SiteHome.create(home) if fresh else SiteHome.existing(home)
    if file is not None and not ticket:
        raise ConsiliumError(
            "usage.ticket", "A file is given without --ticket.", hint="Write: --ticket FILE"
        )
    way = Way(proxy, proxy_login)
    if ticket:
        _write_ticket(SiteDoctor(opened, invitation, way=way), file)
        return
    fixed = mended(opened) if fix else ()
    for line in fixed:
        (err() if MODE.json else out()).print(line, markup=False)
    with progress_shown() as (progress, _):
        looked = SiteDoctor(opened, invitation, study, progress, way=way)
        diagnosis = examine(looked.checks(), live())
    findings = sorted_findings(looked.findings)
    if len(findings) > 1 or (diagnosis.cause is None and findings):
        err().print(findings_table(findings))
    conclude(diagnosis, {"fixed": list(fixed)})


def _write_ticket(looked: SiteDoctor, file: Path | None) -> None:
    """Try the network's steps, and write down what the network department needs to know."""
    from consilium_common.diagnosis.steps import examine
    from consilium_common.diagnosis.ticket import save_ticket, site_ticket

    diagnosis = examine(looked.network_checks(), lambda _: None)
    if looked.target is None:
        cause = diagnosis.cause
        if cause is not None and cause.error is not None:
            raise cause.error
        raise ConsiliumError(
            "identity.not-joined",
            "Nobody is known yet to whom a connection could be asked for.",
            where=str(looked.home.path),
            hint="Give the invitation (--invitation FILE), or join first.",
        )
    text = site_ticket(looked.target).text(looked.target, diagnosis)
    if file is not None:
        save_ticket(file, text)
    data = {
        "file": str(file) if file else None,
        "text": text,
        "steps": diagnosis.to_list(),
    }
    said = f"Written to {file}; send it to your network department." if file else text.rstrip("\n")
    result(data, said)
