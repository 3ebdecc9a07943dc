"""`consilium site join` and `site renew`: how a site comes to its identity and keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consilium_client.home import HOME_VARIABLE, SiteHome
from consilium_common.console import command, note, result
from consilium_common.errors import ConsiliumError

Home = Annotated[
    Path, typer.Option("--home", envvar=HOME_VARIABLE, help="The site's state folder.")
]
DEFAULT_HOME = Path("site")


@command
def join(
    invitation: Annotated[
        Path | None, typer.Argument(help="The file the aggregator operator sent.")
    ] = None,
    *,
    request: Annotated[
        Path | None,
        typer.Option(help="Without network: write the request to carry to the aggregator."),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Without network: the answer that was carried back.")
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Replace this site's certificate and key; ledger and policy stay."
        ),
    ] = False,
    expect_words: Annotated[
        str,
        typer.Option(help="The six words of the authority, as the operator says them."),
    ] = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until an offline authority has signed.")
    ] = False,
    proxy: Annotated[
        str | None,
        typer.Option(help="HTTPS proxy: http://host:port, environment (HTTPS_PROXY) or none."),
    ] = None,
    proxy_login: Annotated[
        Path | None,
        typer.Option(help="File with user:password for the proxy, readable by you alone."),
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Join a consortium: make this site's keys here and have them certified."""
    from consilium_client import joining
    from consilium_client.budget.policy import write_default_policy

    if certificate is not None and (invitation or request):
        raise ConsiliumError(
            "usage.join",
            "--certificate takes the answer to a request made before, and nothing else.",
            hint="consilium site join --certificate ANSWER",
        )
    site = SiteHome.create(home)
    wishes = joining.Wishes(again, proxy, proxy_login, expect_words)
    if certificate is not None:
        joined = joining.take_certificates(site, certificate)
    elif request is not None:
        joined = joining.write_request(site, _given(invitation), request, wishes)
    else:
        joined = joining.join(site, _given(invitation), wishes, wait=wait, say=note)
    lines = [
        f"The consortium's authority: {joined.authority_words}",
        f"This site's key:            {joined.own_words}",
        "Compare both with the aggregator operator by telephone.",
    ]
    if joined.waiting:
        lines += (
            [
                f"Carry {request} to the aggregator (there: consilium server certify), and its"
                " answer back here.",
                "Next: consilium site join --certificate ANSWER",
            ]
            if request is not None
            else [
                "The consortium's authority is offline: the request waits there to be signed.",
                "Later, with the same invitation: consilium site join INVITATION",
            ]
        )
    else:
        lines += [
            f"This site is {joined.config.name} of {joined.config.consortium!r}; its keys are in"
            f" {site.identity}.",
            f"Read and adapt its policy: {write_default_policy(site)}",
            "Next: consilium site start"
            if again
            else "Next: consilium site data import FOLDER, then consilium site start",
        ]
    result(
        {
            "site": joined.config.name,
            "address": joined.config.address,
            "home": str(site.path),
            "waiting": joined.waiting,
            "authority_words": joined.authority_words,
            "own_words": joined.own_words,
        },
        "\n".join(lines),
    )


@command
def renew(home: Home = DEFAULT_HOME) -> None:
    """Renew this site's certificate now; a running site does it by itself before it ends."""
    from consilium_client.identity import SiteIdentity
    from consilium_client.renewal import renew as renew_now

    site = SiteHome.existing(home)
    identity = SiteIdentity.load(site)
    renewed = renew_now(site, identity)
    end = (renewed or identity.certificate).not_valid_after_utc
    result(
        {
            "site": identity.config.name,
            "renewed": renewed is not None,
            "ends": end.isoformat(timespec="seconds"),
        },
        f"The certificate of {identity.config.name} was renewed; it ends on {end:%Y-%m-%d}."
        if renewed
        else "The consortium's authority is offline: the request waits there. Until then the"
        f" certificate is good, to {end:%Y-%m-%d}. Run this again later.",
    )


def _given(invitation: Path | None) -> Path:
    if invitation is None:
        raise ConsiliumError(
            "usage.join",
            "Which invitation?",
            hint="Give the file that the aggregator operator sent: consilium site join INVITATION",
        )
    return invitation
