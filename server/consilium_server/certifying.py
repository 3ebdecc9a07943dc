"""Joining without a network, the aggregator's half: a request file in, a certificate file out."""

from __future__ import annotations

from pathlib import Path

from consilium_common.errors import ConsiliumError
from consilium_common.files import require_new
from consilium_common.identity.authority import requested_key
from consilium_common.identity.certificates import SIGNING_ROLE_OF, Role, describe, load_certificate
from consilium_common.identity.enrolment import (
    Certificates,
    JoinRequest,
    read_join_request,
    write_form,
)
from consilium_common.identity.keys import public_fingerprint
from consilium_server.home import ServerHome
from consilium_server.issuing import Issued, Issuer
from consilium_server.members import check_name_is_free
from consilium_server.registry import Registry
from consilium_server.tables import InvitationRow, Member, now


def certify(
    home: ServerHome, issuer: Issuer, request_file: Path, out: Path
) -> tuple[JoinRequest, Certificates | None]:
    """Take a request file from somebody who cannot connect yet, and write a certificate file.

    Spends the invitation. The same request again writes the same certificates again: a file that
    was lost on the way is no reason for a new invitation.

    Returns
    -------
    JoinRequest
        What was asked for.
    Certificates or None
        None while the request waits for the offline authority; the invitation serves this request
        alone from then on.

    Raises
    ------
    ConsiliumError
        ``state.exists``, what :func:`read_join_request` raises, ``identity.invitation-used``,
        ``identity.unknown``, ``identity.name-taken``.
    """
    require_new(out)
    request = read_join_request(request_file, issuer.trust)
    registry = Registry(home.database)
    role = _invited_role(registry, request)
    signer_request = request.signer_request_pem
    if (signer_request is None) is not (role is Role.AUDITOR):
        raise ConsiliumError(
            "identity.bad-request",
            f"A request of the role {role} names the wrong keys.",
            where=str(request_file),
            hint="Write it again with the same release of consilium.",
        )
    certificates = _certificates(home, issuer, request, _known(registry, request))
    if certificates is None:
        serial = request.invitation.serial
        key = public_fingerprint(requested_key(request.request_pem.encode(), role))
        registry.check_invitation(serial, key)
        issued = issuer.issue(
            request.name,
            role,
            request.request_pem.encode(),
            None if signer_request is None else signer_request.encode(),
        )
        if issued is None:
            registry.reserve_invitation(serial, key)
            return request, None
        registry.spend_invitation(serial)
        _admit(registry, request, issued)
        certificates = _certificates(home, issuer, request, issued)
    assert certificates is not None
    write_form(out, certificates)
    return request, certificates


def _invited_role(registry: Registry, request: JoinRequest) -> Role:
    with registry.transaction() as session:
        row = session.get(InvitationRow, request.invitation.serial)
    if row is None or (row.name, row.role) != (request.name, request.role):
        raise ConsiliumError(
            "identity.unknown",
            "The request's invitation is not in the register, or was for another name or role.",
            hint="Invite again: `consilium server invite NAME`.",
        )
    check_name_is_free(registry, row.name, Role(row.role))
    return Role(row.role)


def _known(registry: Registry, request: JoinRequest) -> Issued | None:
    """Return what was certified for the very keys of a request before, if it is in force."""
    member = registry.member(request.name)
    if member is None or member.status != "active":
        return None
    asked = [(request.request_pem, Role(request.role), member.certificate_pem)]
    if request.signer_request_pem is not None:
        signing = SIGNING_ROLE_OF[Role(request.role)]
        asked.append((request.signer_request_pem, signing, member.signer_pem))
    for request_pem, role, pem in asked:
        key = describe(load_certificate(pem.encode())).public_key
        if requested_key(request_pem.encode(), role) != key:
            return None
    return Issued(member.certificate_pem, member.signer_pem or None)


def _admit(registry: Registry, request: JoinRequest, issued: Issued) -> None:
    """Make the maker of a request a member; Flower learns of a site when it first says hello."""
    with registry.transaction() as session:
        session.merge(
            Member(
                name=request.name,
                role=request.role,
                status="active",
                serial=describe(load_certificate(issued.certificate_pem.encode())).serial,
                certificate_pem=issued.certificate_pem,
                signer_pem=issued.signer_pem or "",
                node_id=None,
                joined_at=now(),
                last_seen=None,
                session=None,
                version=request.version,
                next_serial=None,
                next_certificate_pem=None,
                next_signer_pem=None,
            )
        )


def _certificates(
    home: ServerHome, issuer: Issuer, request: JoinRequest, issued: Issued | None
) -> Certificates | None:
    if issued is None:
        return None
    return Certificates(
        name=request.name,
        role=request.role,
        certificate_pem=issued.certificate_pem,
        signer_pem=issued.signer_pem,
        authority_pem=issuer.trust.pem().decode(),
        cross_pem=issuer.cross_pem,
        address=home.load_config().address,
    )
