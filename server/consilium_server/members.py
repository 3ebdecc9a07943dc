"""Making the consortium and its members: authority, server, operator, invitations, revocation."""

from __future__ import annotations

from datetime import UTC, timedelta

from cryptography import x509

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role, check_name, describe
from consilium_common.identity.invitation import Invitation
from consilium_common.identity.keys import (
    load_signing_key,
    new_signing_key,
    new_tls_key,
    private_pem,
    save_private,
)
from consilium_common.wire.channel import Caller, Credentials
from consilium_server.home import ServerConfig, ServerHome
from consilium_server.registry import Registry
from consilium_server.tables import InvitationRow, Member, now
from consilium_server.witness import WitnessKey

OPERATOR_NAME = "operator"


def initialise(home: ServerHome, consortium: str, address: str) -> Authority:
    """Make the authority, the identities of server and first operator, and the witness's key.

    Parameters
    ----------
    address : str
        ``host:port`` that sites will connect to.

    Raises
    ------
    ConsiliumError
        ``state.exists`` when there is an aggregator in this folder already: a second authority
        would make every certificate of the first worthless.
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
    authority = Authority.create(consortium)
    folder = home.identity
    authority.save(folder)
    server_key = new_tls_key()
    save_private(folder / "server-key.pem", server_key)
    server = authority.issue(
        server_key.public_key(), Role.SERVER, "aggregator", hosts=(host.strip("[]"),)
    )
    write_atomic(folder / "server.pem", certificate_pem(server))

    key, signer_key = new_tls_key(), new_signing_key()
    save_private(folder / "operator-key.pem", key)
    save_private(folder / "operator-signing-key.pem", signer_key)
    certificate = authority.issue(key.public_key(), Role.OPERATOR, OPERATOR_NAME)
    signer = authority.issue(signer_key.public_key(), Role.SIGNER, OPERATOR_NAME)
    write_atomic(folder / "operator.pem", certificate_pem(certificate))
    write_atomic(folder / "operator-signer.pem", certificate_pem(signer))
    WitnessKey.ensure(folder, authority)
    with Registry(home.database).transaction() as session:
        session.add(_operator_member(OPERATOR_NAME, certificate, signer))
    home.save_config(ServerConfig(consortium, address))
    return authority


def invite(home: ServerHome, name: str, lifetime: timedelta) -> Invitation:
    """Make a single-use invitation for the site ``name``."""
    check_name(name)
    registry = Registry(home.database)
    member = registry.member(name)
    if member is not None and member.role != Role.SITE:
        raise ConsiliumError(
            "identity.name-taken",
            f"{name!r} is the name of an operator.",
            hint="Choose another name for the site.",
        )
    authority = Authority.load(home.identity)
    config = home.load_config()
    key = new_tls_key()
    certificate = authority.issue(key.public_key(), Role.INVITATION, name, lifetime=lifetime)
    expires = describe(certificate).not_after
    with registry.transaction() as session:
        session.add(
            InvitationRow(
                serial=describe(certificate).serial,
                name=name,
                role=Role.SITE,
                expires=expires.isoformat(),
            )
        )
    return Invitation(
        consortium=config.consortium,
        address=config.address,
        name=name,
        role=Role.SITE,
        expires=expires.astimezone(UTC),
        authority_pem=certificate_pem(authority.certificate).decode(),
        certificate_pem=certificate_pem(certificate).decode(),
        private_key_pem=private_pem(key).decode(),
    )


def revoke(home: ServerHome, name: str) -> Member:
    """Revoke a member's certificate and every unused invitation in its name; acts at once."""
    registry = Registry(home.database)
    with registry.transaction() as session:
        member = session.get(Member, name)
        if member is None or member.role != Role.SITE:
            raise ConsiliumError(
                "identity.unknown",
                f"There is no site {name!r}.",
                hint="List them with `consilium server sites`.",
            )
        member.status = "revoked"
        for invitation in session.query(InvitationRow).filter_by(name=name, used_at=None):
            invitation.used_at = now()
        return member


def operator_caller(home: ServerHome) -> Caller:
    """Return a connection to the aggregator with the operator's certificate."""
    folder = home.identity
    try:
        credentials = Credentials(
            (folder / "authority.pem").read_bytes(),
            (folder / "operator.pem").read_bytes(),
            (folder / "operator-key.pem").read_bytes(),
        )
    except OSError as error:
        raise ConsiliumError(
            "identity.no-certificate",
            "The operator's certificate cannot be read.",
            where=str(folder),
            hint="Run this as the user who ran `consilium server init`.",
        ) from error
    return Caller(home.load_config().address, credentials)


def operator_signature(home: ServerHome, statement: dict[str, object]) -> str:
    """Sign a statement as the operator."""
    from consilium_common.wire.statements import sign

    return sign(load_signing_key(home.identity / "operator-signing-key.pem"), statement)


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
