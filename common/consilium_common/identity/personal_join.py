"""How an operator or auditor gets an identity: an invitation becomes a folder."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

from consilium_common import __version__
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic
from consilium_common.identity.certificates import Role
from consilium_common.identity.invitation import Invitation, read_invitation
from consilium_common.identity.keys import (
    new_signing_key,
    new_tls_key,
    save_private,
)
from consilium_common.identity.personal import PEOPLE, Personal, Settings
from consilium_common.identity.trust import Trust
from consilium_common.wire import methods
from consilium_common.wire.channel import Caller, Credentials
from consilium_common.wire.proxy import NO_PROXY, check_setting


def join(
    invitation_file: Path, folder: Path | None = None, *, proxy: str = NO_PROXY
) -> Personal | None:
    """Make a person's keys, have them certified, and store the identity.

    Returns None where the consortium's authority is offline and the request waits: the same again
    later goes on with the same keys.

    Raises
    ------
    ConsiliumError
        ``identity.*`` of the invitation, ``state.exists``, ``network.*``.
    """
    check_setting(proxy)
    invitation = read_invitation(invitation_file)
    if invitation.role not in PEOPLE:
        raise ConsiliumError(
            "identity.wrong-role",
            f"The invitation is for a {invitation.role}, not for a person.",
            where=str(invitation_file),
            hint="At a hospital run `consilium site join` with it.",
        )
    folder = private_folder((folder or default_folder(invitation)).expanduser().resolve())
    if (folder / "identity.json").exists():
        raise ConsiliumError(
            "state.exists",
            "There is an identity in this folder already.",
            where=str(folder),
            hint="Choose another folder with --out; nothing was changed.",
        )
    role = Role(invitation.role)
    settings = Settings(invitation.name, role, invitation.consortium, invitation.address, proxy)
    made = Personal(folder, settings)
    key_file, signing_file = folder / made.files.key, folder / made.files.signing_key
    if not key_file.exists():
        save_private(key_file, new_tls_key())
    if role is Role.OPERATOR and not signing_file.exists():
        save_private(signing_file, new_signing_key())
    bootstrap = Credentials(
        invitation.authority_pem.encode(),
        invitation.certificate_pem.encode(),
        invitation.private_key_pem.encode(),
    )
    with Caller(invitation.address, bootstrap, made.proxy()) as caller:
        answer = caller.call(methods.ENROL, {**made.request(), "version": __version__})
    if answer.get("waiting"):
        return None
    trust = Trust.load(invitation.authority_pem.encode())
    pem, signer_pem = made.certified(answer, trust)
    write_atomic(folder / "authority.pem", trust.pem(), mode=0o644)
    write_atomic(folder / made.files.certificate, pem, mode=0o644)
    if signer_pem is not None:
        write_atomic(folder / made.files.signer, signer_pem, mode=0o644)
    # Written last: a folder without it is no identity yet.
    write_atomic(folder / "identity.json", json.dumps(asdict(settings), indent=2).encode() + b"\n")
    return made


def default_folder(invitation: Invitation) -> Path:
    """Return ``~/.config/consilium/<consortium>-<name>``."""
    plain = re.sub(r"[^a-z0-9]+", "-", invitation.consortium.lower()).strip("-") or "consortium"
    return Path("~/.config/consilium") / f"{plain[:40]}-{invitation.name}"


def check_words(invitation_file: Path, expected: str | None) -> str:
    """Return the words of the invitation's authority; refuse it when others are expected.

    Raises
    ------
    ConsiliumError
        ``identity.wrong-words``, and what :func:`read_invitation` raises.
    """
    from consilium_common.identity.words import fingerprint_words

    invitation = read_invitation(invitation_file)
    words = fingerprint_words(Trust.load(invitation.authority_pem.encode()).authorities[0])
    if expected is not None and expected.lower().split() != words.split():
        raise ConsiliumError(
            "identity.wrong-words",
            "The authority in the invitation has other words than those you were told.",
            where=str(invitation_file),
            hint="Do not use this invitation. Call the aggregator operator on a number you know.",
        )
    return words
