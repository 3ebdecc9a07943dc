"""Invitations from anywhere: the bootstrap key is made where the operator works."""

from __future__ import annotations

from datetime import datetime, timedelta

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import signing_request
from consilium_common.identity.certificates import (
    MEMBER_ROLES,
    Role,
    check_name,
    load_certificate,
)
from consilium_common.identity.invitation import Invitation
from consilium_common.identity.keys import new_tls_key, private_pem
from consilium_common.identity.personal import Personal
from consilium_common.identity.trust import key_of
from consilium_common.wire import methods
from consilium_server import members
from consilium_server.acts import local_refusals, note_local
from consilium_server.home import ServerHome


def read_role(text: str) -> Role:
    """Return the role of that name, or raise ``usage.role``."""
    if text not in MEMBER_ROLES:
        raise ConsiliumError(
            "usage.role",
            f"Nobody can be invited as {text!r}.",
            hint=f"Choose one of {', '.join(MEMBER_ROLES)}.",
        )
    return Role(text)


def invite_here(home: ServerHome, name: str, role: Role, lifetime: timedelta) -> Invitation:
    """Make an invitation at the aggregator's own computer, and note it in the audit log."""
    subject = f"{role} {name}"
    with local_refusals(home, "invite", subject):
        invitation = members.invite(home, name, lifetime, role)
    key = key_of(load_certificate(invitation.certificate_pem.encode()))
    note_local(home, "invite", subject, digest=key)
    return invitation


def invite_remotely(person: Personal, name: str, role: Role, lifetime: timedelta) -> Invitation:
    """Make an invitation through the aggregator's port.

    The invitation's secret, its key, is made here and never crosses the wire; the authority in it
    is the one this operator trusts, whatever the aggregator says.

    Raises
    ------
    ConsiliumError
        ``identity.bad-name``, ``identity.name-taken``, ``identity.wrong-role``, ``network.*``.
    """
    key = new_tls_key()
    with person.caller() as caller:
        answer = caller.call(
            methods.OPERATOR_INVITE,
            {
                "name": check_name(name),
                "role": role,
                "hours": lifetime.total_seconds() / 3600,
                "request_pem": signing_request(key, name).decode(),
            },
        )
    return Invitation(
        consortium=person.settings.consortium,
        address=person.settings.address,
        name=name,
        role=role.value,
        expires=datetime.fromisoformat(answer["expires"]),
        authority_pem=person.trust.pem().decode(),
        certificate_pem=answer["certificate_pem"],
        private_key_pem=private_pem(key).decode(),
    )
