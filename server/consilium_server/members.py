"""Making the consortium and its members: authority, server, operator, invitations, revocation."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.authority import (
    Authority,
    EnrolmentKey,
    certificate_pem,
    requested_key,
    signing_request,
)
from consilium_common.identity.certificates import (
    MEMBER_ROLES,
    Role,
    check_name,
    describe,
    load_certificate,
    read_certificate,
)
from consilium_common.identity.invitation import Invitation
from consilium_common.identity.keys import (
    load_tls_key,
    new_signing_key,
    new_tls_key,
    private_pem,
    save_private,
)
from consilium_common.identity.trust import Trust
from consilium_server.home import ServerConfig, ServerHome
from consilium_server.issuing import AGGREGATOR, OPERATOR_NAME, authority_here
from consilium_server.registry import Registry
from consilium_server.rotation import offline_folder, write_enrolment
from consilium_server.tables import InvitationRow, Member, now
from consilium_server.waiting import withdraw
from consilium_server.witness import WitnessKey


def initialise(
    home: ServerHome,
    consortium: str,
    address: str,
    *,
    passphrase: bytes | None = None,
    offline: Path | None = None,
    database: str = "",
) -> Authority:
    """Make the authority, the identities of server and first operator, and the witness's key.

    Where the authority's key is locked or elsewhere, the aggregator gets an enrolment key, which
    can certify invitations and nothing else: a thief of it could make no member, because an
    invitation counts only if it stands in the register too.

    Parameters
    ----------
    address : str
        ``host:port`` that sites will connect to.
    passphrase : bytes, optional
        Locks the authority's key.
    offline : Path, optional
        New folder for the authority's key; the aggregator's own gets its certificate alone.
    database : str, optional
        URL of a PostgreSQL database for the registry (default: an SQLite file).

    Raises
    ------
    ConsiliumError
        ``state.registry``; ``state.exists`` when there is an aggregator in this folder already: a
        second authority would make every certificate of the first worthless.
    """
    if home.config_file.exists():
        raise ConsiliumError(
            "state.exists",
            "There is an aggregator here already.",
            where=str(home.path),
            hint="Choose another folder with --home; the authority is made once.",
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConsiliumError(
            "usage.address",
            f"{address!r} is not host:port.",
            hint="Give what sites will connect to, for example fl.example.org:8443.",
        )
    registry = Registry(home.database, database)
    kept = None if offline is None else offline_folder(offline, home)
    authority = Authority.create(consortium)
    folder = home.identity
    if kept is None:
        authority.save(folder, passphrase)
    else:
        authority.save(kept, passphrase)
        write_atomic(folder / "authority.pem", certificate_pem(authority.certificate), mode=0o644)
    if kept is not None or passphrase is not None:
        write_enrolment(folder, authority)
    server_key = new_tls_key()
    save_private(folder / "server-key.pem", server_key)
    server = authority.issue(
        server_key.public_key(), Role.SERVER, AGGREGATOR, hosts=(host.strip("[]"),)
    )
    write_atomic(folder / "server.pem", certificate_pem(server))

    key, signer_key = new_tls_key(), new_signing_key()
    save_private(folder / "operator-key.pem", key)
    save_private(folder / "operator-signing-key.pem", signer_key)
    certificate = authority.issue(key.public_key(), Role.OPERATOR, OPERATOR_NAME)
    signer = authority.issue(signer_key.public_key(), Role.PROPOSER, OPERATOR_NAME)
    write_atomic(folder / "operator.pem", certificate_pem(certificate))
    write_atomic(folder / "operator-signer.pem", certificate_pem(signer))
    WitnessKey.ensure(folder, authority)
    with registry.transaction() as session:
        session.merge(_operator_member(OPERATOR_NAME, certificate, signer))
    home.save_config(ServerConfig(consortium, address, database=database))
    return authority


def invite(home: ServerHome, name: str, lifetime: timedelta, role: Role = Role.SITE) -> Invitation:
    """Make a single-use invitation for a site, an operator or an auditor.

    Needs no passphrase and no offline authority: the enrolment key certifies it.

    Raises
    ------
    ConsiliumError
        As :func:`certify_invitation`.
    """
    key = new_tls_key()
    answer = certify_invitation(home, name, role, lifetime, signing_request(key, name))
    config = home.load_config()
    return Invitation(
        consortium=config.consortium,
        address=config.address,
        name=name,
        role=role,
        expires=datetime.fromisoformat(answer["expires"]),
        authority_pem=Trust.read(home.identity / "authority.pem").pem().decode(),
        certificate_pem=answer["certificate_pem"],
        private_key_pem=private_pem(key).decode(),
    )


def certify_invitation(
    home: ServerHome, name: str, role: Role, lifetime: timedelta, request_pem: bytes
) -> dict[str, str]:
    """Certify and register a bootstrap key; whoever made it has the invitation's secret.

    Returns
    -------
    dict
        ``expires`` (ISO 8601, UTC) and ``certificate_pem``, with the enrolment key's certificate
        after it where that one issued it.

    Raises
    ------
    ConsiliumError
        ``identity.bad-name``, ``identity.bad-role``, ``identity.bad-request``;
        ``identity.name-taken``: a name keeps its role for good.
    """
    check_name(name)
    if role not in MEMBER_ROLES:
        raise ConsiliumError(
            "identity.bad-role",
            f"Nobody is invited as {role}.",
            hint=f"Choose one of {', '.join(MEMBER_ROLES)}.",
        )
    registry = Registry(home.database)
    check_name_is_free(registry, name, role)
    if name == OPERATOR_NAME:
        raise _name_taken(name, Role.OPERATOR)
    public_key = requested_key(request_pem, Role.INVITATION)
    folder = home.identity
    if (folder / "enrolment.pem").exists():
        enrolment = EnrolmentKey(
            load_tls_key(folder / "enrolment-key.pem"), read_certificate(folder / "enrolment.pem")
        )
        certificate = enrolment.issue(public_key, name, lifetime=lifetime)
        chain = certificate_pem(certificate) + certificate_pem(enrolment.certificate)
    else:
        certificate = authority_here(home).issue(
            public_key, Role.INVITATION, name, lifetime=lifetime
        )
        chain = certificate_pem(certificate)
    certified = describe(certificate)
    expires = certified.not_after.astimezone(UTC).isoformat()
    # What was asked for with an earlier invitation, and was not fetched, is asked for no more.
    withdraw(registry, name)
    with registry.transaction() as session:
        session.add(InvitationRow(serial=certified.serial, name=name, role=role, expires=expires))
    return {"expires": expires, "certificate_pem": chain.decode()}


def revoke(home: ServerHome, name: str) -> Member:
    """Revoke a member, as :func:`revoke_member`."""
    return revoke_member(Registry(home.database), name)


def revoke_member(registry: Registry, name: str) -> Member:
    """Revoke a member's certificate and every unused invitation in its name; acts at once.

    Raises
    ------
    ConsiliumError
        ``identity.unknown``; ``identity.last-operator`` for the operator in the aggregator's own
        folder, whom nobody could invite again.
    """
    if name == OPERATOR_NAME:
        raise ConsiliumError(
            "identity.last-operator",
            f"{name!r} is the operator in the aggregator's own folder.",
            hint="Whoever can read that folder is this operator; protect the computer instead.",
        )
    with registry.transaction() as session:
        member = session.get(Member, name)
        invitations = list(session.query(InvitationRow).filter_by(name=name, used_at=None))
        if member is None:
            raise ConsiliumError(
                "identity.unknown",
                f"There is no member {name!r}.",
                hint="List them with `consilium server sites`.",
            )
        member.status = "revoked"
        for invitation in invitations:
            invitation.used_at = now()
    # What was certified offline and not fetched is handed out no more.
    withdraw(registry, name)
    return member


def revocation(member: Member) -> dict[str, str]:
    """Return what is told of a revocation: whose, and the fingerprint of the key that it ends."""
    certified = describe(load_certificate(member.certificate_pem.encode()))
    return {
        "name": member.name,
        "role": member.role,
        "status": member.status,
        "fingerprint": certified.fingerprint,
    }


def _operator_member(name: str, certificate: x509.Certificate, signer: x509.Certificate) -> Member:
    """Return the registry's row of an operator that `server init` certified."""
    return Member(
        name=name,
        role=Role.OPERATOR,
        status="active",
        serial=describe(certificate).serial,
        certificate_pem=certificate_pem(certificate).decode(),
        signer_pem=certificate_pem(signer).decode(),
        node_id=None,
        joined_at=now(),
    )


def check_name_is_free(registry: Registry, name: str, role: Role) -> None:
    """Refuse a name that a member with another role has: ``identity.name-taken``."""
    member = registry.member(name)
    if member is not None and member.role != role:
        raise _name_taken(name, member.role)


def _name_taken(name: str, role: str) -> ConsiliumError:
    return ConsiliumError(
        "identity.name-taken",
        f"{name!r} is the name of {_a(role)}; a name keeps its role.",
        hint="Choose another name.",
    )


def _a(role: str) -> str:
    return f"an {role}" if role[0] in "aeo" else f"a {role}"
