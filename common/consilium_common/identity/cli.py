"""`consilium identity`: an operator's or auditor's identity on a computer of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consilium_common.console import command, result

if TYPE_CHECKING:
    from consilium_common.identity.personal import Personal

app = typer.Typer(
    no_args_is_help=True, help="Your own identity as an operator or auditor, on your own computer."
)

CONNECT_VARIABLE = "CONSILIUM_CONNECT"
#: For every command that can work from one's own computer.
Connect = Annotated[
    Path | None,
    typer.Option(
        "--connect",
        envvar=CONNECT_VARIABLE,
        metavar="FOLDER",
        help="Folder of your identity: work over the network, from anywhere.",
    ),
]


@app.command()
@command
def join(
    invitation: Annotated[Path, typer.Argument(help="The invitation you were sent.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to make (default: ~/.config/consilium/CONSORTIUM-NAME)."),
    ] = None,
    proxy: Annotated[
        str, typer.Option(help="none, environment (HTTPS_PROXY), or http://host:port.")
    ] = "none",
    expect_words: Annotated[
        str | None,
        typer.Option(help="The authority's six words, as you heard them: any other is refused."),
    ] = None,
) -> None:
    """Make your keys, have them certified, and keep your identity in a private folder."""
    from consilium_common.identity.personal_join import check_words
    from consilium_common.identity.personal_join import join as join_consortium

    words = check_words(invitation, expect_words)
    made = join_consortium(invitation, out, proxy=proxy)
    if made is None:
        result(
            {"waiting": True, "authority_words": words},
            "Your request waits for the consortium's authority, whose key is kept offline.\n"
            "Run the same command again later, with the same invitation.",
        )
        return
    data = _shown(made)
    result(
        data,
        f"You are {made.name}, {made.role} of {made.settings.consortium!r}.\n"
        f"Your identity: {made.folder} (readable by you alone; keep a backup)\n"
        f"Words of the authority, compare them by telephone: {data['authority_words']}\n"
        f"Words of your own key:                             {data['words']}\n"
        f"Use it: export {CONNECT_VARIABLE}={made.folder}",
    )


@app.command()
@command
def show(connect: Connect = None) -> None:
    """Show who you are here, until when, and the words of your key."""
    from consilium_common.identity.personal import person

    found = person(connect)
    data = _shown(found)
    result(
        data,
        f"{data['name']}, {data['role']} of {data['consortium']!r} at {data['address']}\n"
        f"folder:             {data['folder']}\n"
        f"valid until:        {data['expires'][:10]} (renews itself when used before then)\n"
        f"words of your key:  {data['words']}\n"
        f"of the authority:   {data['authority_words']}",
    )


def _shown(found: Personal) -> dict[str, str]:
    from consilium_common.identity.words import fingerprint_words

    certified = found.check()
    return {
        "folder": str(found.folder),
        "name": found.name,
        "role": str(found.role),
        "consortium": found.settings.consortium,
        "address": found.settings.address,
        "expires": certified.not_after.isoformat(),
        "fingerprint": certified.fingerprint,
        "words": fingerprint_words(certified.public_key),
        "authority_words": fingerprint_words(found.trust.authorities[0]),
    }
