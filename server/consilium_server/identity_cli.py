"""Commands of `consilium server` about keys: joining by file, the offline authority, rotation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from consilium_common.console import command, note, result
from consilium_server.home import ServerHome
from consilium_server.options import DEFAULT_HOME, Home

if TYPE_CHECKING:
    from consilium_server.offline import OfflineRequest
    from consilium_server.rotation import Custody

app = typer.Typer()

PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help="File with the passphrase of the authority's key; a descriptor as /dev/fd/3 too.",
    ),
]


@app.command()
@command
def certify(
    request: Annotated[Path, typer.Argument(help="The request file.", metavar="REQUEST_FILE")],
    out: Annotated[Path, typer.Option(help="Certificate file to write; carry it back.")],
    home: Home = DEFAULT_HOME,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Certify somebody who cannot connect yet: a request file in, a certificate file out."""
    from consilium_common.identity.authority import requested_key
    from consilium_common.identity.certificates import Role
    from consilium_common.identity.keys import public_fingerprint
    from consilium_common.identity.words import fingerprint_words
    from consilium_server import certifying
    from consilium_server.acts import local_refusals, note_local
    from consilium_server.issuing import load_issuer, passphrase_for

    server = ServerHome.existing(home)
    with local_refusals(server, "certify", request.name):
        locked = passphrase_for(server.identity / "authority-key.pem", passphrase_file)
        asked, certificates = certifying.certify(server, load_issuer(server, locked), request, out)
    key = requested_key(asked.request_pem.encode(), Role(asked.role))
    words = fingerprint_words(key)
    note_local(
        server,
        "certify",
        f"{asked.role} {asked.name}",
        digest=public_fingerprint(key),
        outcome="waiting" if certificates is None else "done",
    )
    data: dict[str, Any] = {"name": asked.name, "role": asked.role, "words": words}
    if certificates is None:
        result(
            {**data, "waiting": True, "file": None},
            f"The request of {asked.role} {asked.name} ({words}) waits for the offline authority.\n"
            "Next: consilium server requests --out FILE; after `take`, certify again.",
        )
        return
    result(
        {**data, "waiting": False, "file": str(out)},
        f"Certificates of {asked.role} {asked.name} written to {out}.\n"
        f"Words of the key, to compare by telephone: {words}",
    )


@app.command()
@command
def requests(
    out: Annotated[
        Path | None, typer.Option(help="File to write and carry to the authority.")
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """List the certificate requests that wait for the offline authority; write them to a file."""
    from consilium_common.files import require_new
    from consilium_common.identity.enrolment import write_form
    from consilium_server.issuing import HomeIssuer
    from consilium_server.offline import waiting_requests

    if out is not None:
        require_new(out)
    server = ServerHome.existing(home)
    content = waiting_requests(server, HomeIssuer(server))
    if out is not None:
        write_form(out, content)
    lines = [_line(request) for request in content.requests]
    lines.append(
        f"Written to {out}. At the authority: consilium server sign-offline {out.name}"
        " --authority FOLDER --out FILE"
        if out is not None
        else "Write them to a file with --out FILE and carry it to the authority."
    )
    result(
        {
            "file": None if out is None else str(out),
            "requests": [
                {"name": one.name, "role": one.role, "words": one.words, "asked_at": one.asked_at}
                for one in content.requests
            ],
        },
        "\n".join(lines),
    )


@app.command("sign-offline")
@command
def sign_offline(
    file: Annotated[Path, typer.Argument(help="What `server requests` wrote.", metavar="FILE")],
    authority: Annotated[Path, typer.Option(help="Folder of the authority's key.")],
    out: Annotated[Path, typer.Option(help="File to write; carry it back to the aggregator.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Certify all without asking.")] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """At the authority, without any network: look at each request and certify it."""
    from consilium_common.errors import ConsiliumError
    from consilium_common.files import require_new
    from consilium_common.identity.authority import Authority
    from consilium_common.identity.enrolment import write_form
    from consilium_common.identity.trust import Trust
    from consilium_server import offline
    from consilium_server.issuing import passphrase_for

    require_new(out)
    locked = passphrase_for(authority / "authority-key.pem", passphrase_file)
    holder = Authority.load(authority, locked)

    content = offline.read_requests(file, Trust.read(authority / "authority.pem"))

    def agree(request: OfflineRequest) -> bool:
        note(_line(request))
        return yes or typer.confirm("Certify it?", err=True)

    signed, left = offline.sign_offline(holder, content, agree)
    if not signed.certificates:
        raise ConsiliumError(
            "identity.no-request",
            "Nothing was certified.",
            where=str(file),
            hint="Every request was refused, or is for another authority of a rotation.",
        )
    write_form(out, signed)
    result(
        {
            "file": str(out),
            "certified": len(signed.certificates),
            "left_out": [{"name": one.name, "role": one.role} for one in left],
        },
        f"{len(signed.certificates)} certified, {len(left)} left out; written to {out}.\n"
        f"At the aggregator: consilium server take {out.name}",
    )


@app.command()
@command
def take(
    file: Annotated[Path, typer.Argument(help="What `sign-offline` wrote.", metavar="FILE")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Take the certificates that the offline authority issued; those who wait get them."""
    from consilium_server import offline
    from consilium_server.acts import local_refusals, note_local
    from consilium_server.issuing import HomeIssuer

    server = ServerHome.existing(home)
    with local_refusals(server, "take", file.name):
        taken = offline.take(server, HomeIssuer(server), file)
    for row in taken:
        note_local(server, "take", f"{row.role} {row.name}", digest=row.digest)
    result(
        {"taken": [{"name": row.name, "role": row.role} for row in taken]},
        f"{len(taken)} taken. Sites and people that wait get them when they ask again;"
        " for a request file run `consilium server certify` again.",
    )


@app.command()
@command
def rotate(
    what: Annotated[
        Literal["server", "authority"],
        typer.Argument(help="server: its key; authority: the consortium's."),
    ],
    *,
    finish: Annotated[
        bool, typer.Option("--finish", help="Trust the new authority alone from now on.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Finish although members are not ready; they are out.")
    ] = False,
    distrust: Annotated[
        bool,
        typer.Option("--distrust", help="The old authority's key may be stolen: believe nothing."),
    ] = False,
    authority: Annotated[
        Path | None, typer.Option(help="Folder of the offline authority's key now in force.")
    ] = None,
    offline_authority: Annotated[
        Path | None, typer.Option(help="New folder for an offline authority's next key.")
    ] = None,
    home: Home = DEFAULT_HOME,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Replace the server's key, or the authority, while the consortium works."""
    from consilium_common.errors import ConsiliumError

    server = ServerHome.existing(home)
    if what == "server":
        if finish or force or distrust or authority or offline_authority:
            raise ConsiliumError(
                "usage.rotate",
                "These options are for the authority.",
                hint="The server's key is rotated by `consilium server rotate server` alone.",
            )
        _rotate_server(server, passphrase_file)
        return
    if (force or distrust) and not finish:
        raise ConsiliumError(
            "usage.rotate",
            "--force and --distrust go with --finish.",
            hint="Begin with `consilium server rotate authority`.",
        )
    if finish:
        _finish(server, authority, passphrase_file, force=force, distrust=distrust)
    else:
        _begin(server, authority, passphrase_file, offline_authority)


@app.command("lock-authority")
@command
def lock_authority(
    *,
    authority: Annotated[
        Path | None, typer.Option(help="Folder of an offline authority's key.")
    ] = None,
    new_passphrase_file: Annotated[
        Path | None,
        typer.Option(help="File with the new passphrase; asked for twice without it."),
    ] = None,
    home: Home = DEFAULT_HOME,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Put the authority's key under a passphrase, or under another one."""
    from consilium_common.identity.passphrase import new_passphrase
    from consilium_common.identity.trust import key_of
    from consilium_server.acts import local_refusals, note_local
    from consilium_server.locking import lock_authority as lock

    server = ServerHome.existing(home)
    folder = authority or server.identity
    with local_refusals(server, "lock", "authority"):
        custody = _custody(server, authority, passphrase_file)
        # What is wrong with it shows before a new passphrase is thought of.
        key = key_of(custody.authority().certificate)
        lock(custody, new_passphrase(new_passphrase_file))
    note_local(server, "lock", "authority", digest=key)
    result(
        {"authority_key": str(folder / "authority-key.pem")},
        f"{folder / 'authority-key.pem'} is under the new passphrase.\n"
        "Restart a running aggregator: until then it goes on as it was started.\n"
        "Destroy copies and backups from before: what opened them still does.",
    )


def _custody(server: ServerHome, offline: Path | None, passphrase_file: Path | None) -> Custody:
    """Return where the authority's key is; asks for its passphrase where it is under one."""
    from consilium_server.issuing import passphrase_for
    from consilium_server.rotation import Custody

    key_file = (offline or server.identity) / "authority-key.pem"
    return Custody(server, passphrase_for(key_file, passphrase_file), offline)


def _rotate_server(server: ServerHome, passphrase_file: Path | None) -> None:
    from consilium_common.identity.keys import load_tls_key, public_fingerprint
    from consilium_common.identity.words import fingerprint_words
    from consilium_server.acts import local_refusals, note_local
    from consilium_server.issuing import load_issuer, passphrase_for
    from consilium_server.rotation import rotate_server

    folder, act = server.identity, ("rotate", "server key")
    with local_refusals(server, *act):
        locked = passphrase_for(folder / "authority-key.pem", passphrase_file)
        done = rotate_server(server, load_issuer(server, locked))
    key_file = folder / ("server-key.pem" if done else "server-waiting-key.pem")
    key = load_tls_key(key_file).public_key()
    outcome = "done" if done else "waiting"
    note_local(server, *act, digest=public_fingerprint(key), outcome=outcome)
    words = fingerprint_words(key)
    result(
        {"waiting": not done, "words": words},
        f"The server has a new key: {words}. A running aggregator shows it from the next"
        " connection on."
        if done
        else "The server's new key waits for the offline authority: consilium server requests.",
    )


def _begin(
    server: ServerHome, offline: Path | None, passphrase_file: Path | None, keep_in: Path | None
) -> None:
    from consilium_common.identity.trust import key_of
    from consilium_common.identity.words import fingerprint_words
    from consilium_server.acts import local_refusals, note_local
    from consilium_server.rotation import rotate_authority

    act = ("rotate", "authority")
    with local_refusals(server, *act):
        trust = rotate_authority(_custody(server, offline, passphrase_file), keep_in)
    note_local(server, *act, digest=key_of(trust.authorities[0]))
    words = fingerprint_words(trust.authorities[0])
    result(
        {"words": words, "authorities": len(trust.authorities)},
        f"The consortium has a new authority: {words}.\n"
        "Old and new are trusted; members follow by themselves when they connect.\n"
        "Then: consilium server rotate authority --finish",
    )


def _finish(
    server: ServerHome,
    offline: Path | None,
    passphrase_file: Path | None,
    *,
    force: bool,
    distrust: bool,
) -> None:
    from consilium_common.identity.trust import Trust, key_of
    from consilium_server.acts import local_refusals, note_local
    from consilium_server.rotation import finish_rotation

    act = ("rotate", "authority, finished")
    with local_refusals(server, *act):
        custody = _custody(server, offline, passphrase_file)
        out = finish_rotation(custody, force=force, distrust=distrust)
    trust = Trust.read(server.identity / "authority.pem")
    note_local(server, *act, digest=key_of(trust.authorities[0]))
    lines = ["The new authority alone is trusted now."]
    if out:
        lines.append(f"Out, and in need of a new invitation: {', '.join(out)}.")
    if offline is not None:
        lines.append("Destroy the old authority's key, and every copy of its folder.")
    if distrust:
        lines.append("Restart the aggregator, and propose studies again: old signatures are void.")
    result({"out": out, "distrusted": distrust}, "\n".join(lines))


def _line(request: OfflineRequest) -> str:
    hosts = f", at {', '.join(request.hosts)}" if request.hosts else ""
    return f"{request.role} {request.name}{hosts}: {request.words}"
