"""An aggregator for tests, and whoever asks it for certificates by file."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import signing_request
from consilium_common.identity.certificates import Role
from consilium_common.identity.enrolment import join_request, write_form
from consilium_common.identity.invitation import Invitation
from consilium_common.identity.keys import new_signing_key, new_tls_key
from consilium_server import members
from consilium_server.certifying import certify
from consilium_server.home import ServerHome
from consilium_server.issuing import Issuer

HOUR = timedelta(hours=1)
SECRET = b"five words drawn at random"
KEY, SIGNING = new_tls_key(), new_signing_key()


def code_of(call: Callable[..., object], *arguments: object, **named: object) -> str:
    """Return the code of the error that a call raises."""
    with pytest.raises(ConsiliumError) as caught:
        call(*arguments, **named)
    return caught.value.code


def requests_of(role: Role) -> tuple[bytes, bytes | None]:
    """Return the signing requests of a member's two keys."""
    signer = None if role is Role.AUDITOR else signing_request(SIGNING, "x")
    return signing_request(KEY, "x"), signer


def request_file(folder: Path, invitation: Invitation) -> Path:
    """Write the request of the holder of an invitation."""
    request_pem, signer = requests_of(Role(invitation.role))
    path = folder / f"request-{len(list(folder.iterdir()))}"
    write_form(
        path,
        join_request(invitation, request_pem=request_pem, signer_request_pem=signer, version="1"),
    )
    return path


def join(home: ServerHome, issuer: Issuer, folder: Path, name: str) -> None:
    """Make a site a member."""
    certify(home, issuer, request_file(folder, members.invite(home, name, HOUR)), folder / name)
