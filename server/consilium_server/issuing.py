"""Who certifies members: the authority's key where it is here, a queue where it is elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from cryptography import x509

from consilium_common.files import write_atomic
from consilium_common.identity.authority import (
    Authority,
    certificate_pem,
    requested_key,
    signing_request,
)
from consilium_common.identity.certificates import (
    SERVER_NAME,
    SIGNING_ROLE_OF,
    Role,
    due_for_renewal,
    load_certificate,
    read_certificate,
)
from consilium_common.identity.keys import is_locked, load_signing_key, load_tls_key
from consilium_common.identity.passphrase import ask_passphrase, read_passphrase
from consilium_common.identity.trust import Trust, key_of
from consilium_server.changing import changing_keys
from consilium_server.home import ServerHome
from consilium_server.pairs import Kept, install_pair, settle_pair
from consilium_server.registry import Registry
from consilium_server.tables import Member
from consilium_server.waiting import CertificateRequest, Issued, Wanted, ask_offline

__all__ = [
    "CertificateRequest",
    "HomeIssuer",
    "Issued",
    "Issuer",
    "authority_here",
    "load_issuer",
    "renew_server_if_due",
]

#: Name in the server's certificate.
AGGREGATOR = "aggregator"
#: The operator that `server init` makes, whose keys lie in the aggregator's own folder.
OPERATOR_NAME = "operator"
#: Name of systemd's credential that holds the authority's passphrase.
CREDENTIAL = "authority-passphrase"


class Certifier(Protocol):
    """Certifies keys for names that somebody else has checked."""

    def issue(
        self,
        name: str,
        role: Role,
        request_pem: bytes,
        signer_request_pem: bytes | None,
        *,
        hosts: tuple[str, ...] = (),
    ) -> Issued | None:
        """Certify the keys of signing requests; None while they wait for the offline authority.

        Raises
        ------
        ConsiliumError
            ``identity.bad-request``, ``identity.weak-key``; ``identity.request-waiting`` when
            other keys wait in that name already.
        """
        ...


class Issuer(Certifier, Protocol):
    """Certifies keys, and knows whom the consortium trusts."""

    @property
    def trust(self) -> Trust:
        """Whom the consortium trusts now; follows a rotation while the aggregator runs."""
        ...

    @property
    def cross_pem(self) -> str | None:
        """Certificates of newer authorities' keys by older ones; None before any rotation."""
        ...


class HomeIssuer:
    """Issues with what the aggregator's home holds, and follows its files as they change.

    Parameters
    ----------
    passphrase : bytes, optional
        Opens the authority's key where it is locked.
    """

    def __init__(self, home: ServerHome, passphrase: bytes | None = None) -> None:
        folder = home.identity
        self._registry = Registry(home.database)
        self._folder = folder
        self._trust = Kept(
            (folder / "authority.pem", folder / "enrolment.pem"), lambda: _trust(folder)
        )
        self._authorities = Kept(
            tuple(folder / name for name in ("authority-key.pem", "authority.pem")),
            lambda: _authorities(folder, passphrase),
        )

    @property
    def trust(self) -> Trust:
        """Whom the consortium trusts now."""
        return self._trust.value()

    @property
    def cross_pem(self) -> str | None:
        """Certificates of newer authorities' keys by older ones; None before any rotation."""
        path = self._folder / "authority-cross.pem"
        return path.read_text(encoding="ascii") if path.exists() else None

    def issue(
        self,
        name: str,
        role: Role,
        request_pem: bytes,
        signer_request_pem: bytes | None,
        *,
        hosts: tuple[str, ...] = (),
    ) -> Issued | None:
        """Certify, or queue; as :meth:`Issuer.issue`."""
        requested_key(request_pem, role)
        if signer_request_pem is not None:
            requested_key(signer_request_pem, SIGNING_ROLE_OF[role])
        authorities = self._authorities.value()
        if authorities is None:
            trusted = self.trust.authorities
            authority = key_of(trusted[-1] if role is Role.SERVER else trusted[0])
            wanted = Wanted(name, role, request_pem, signer_request_pem, hosts, authority)
            return ask_offline(self._registry, wanted)
        # Sites learn the new authority during a rotation: until it is finished the server shows
        # them a certificate of the old one.
        issuing = authorities[-1] if role is Role.SERVER else authorities[0]
        return issue_with(issuing, name, role, request_pem, signer_request_pem, hosts=hosts)


def load_issuer(home: ServerHome, passphrase: bytes | None = None) -> Issuer:
    """Open what certifies in this home; finishes what a crash left half done.

    Raises
    ------
    ConsiliumError
        ``identity.passphrase-needed``, ``identity.wrong-passphrase``, ``identity.no-key``.
    """
    folder = home.identity
    settle_pair(folder, "server")
    if (folder / "authority-key.pem").exists():
        # A wrong passphrase shows now, and not at the first call.
        authority_here(home, passphrase)
    return HomeIssuer(home, passphrase)


def authority_here(home: ServerHome, passphrase: bytes | None = None) -> Authority:
    """Open the authority whose key lies in this home, finishing a rotation that a crash cut short.

    Raises
    ------
    ConsiliumError
        ``identity.no-key`` and others of :meth:`Authority.load`.
    """
    settle_pair(home.identity, "authority", passphrase)
    return Authority.load(home.identity, passphrase)


def passphrase_for(key_file: Path, given: Path | None) -> bytes | None:
    """Return the passphrase of a key: from a file, systemd's credential or the terminal.

    None where the key is under none.

    Raises
    ------
    ConsiliumError
        ``identity.passphrase-needed`` and others of
        :func:`~consilium_common.identity.passphrase.read_passphrase`.
    """
    if not is_locked(key_file):
        return None
    if given is not None:
        return read_passphrase(given)
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials and (Path(credentials) / CREDENTIAL).is_file():
        # systemd lets the service's user read it by an ACL, which shows as rights of the group.
        return read_passphrase(Path(credentials) / CREDENTIAL, forbidden=0o007)
    return ask_passphrase()


@dataclass(frozen=True)
class AtHand:
    """Issues with one authority's key that was opened, wherever it is kept."""

    authority: Authority

    def issue(
        self,
        name: str,
        role: Role,
        request_pem: bytes,
        signer_request_pem: bytes | None,
        *,
        hosts: tuple[str, ...] = (),
    ) -> Issued:
        """Certify; as :meth:`Certifier.issue`."""
        return issue_with(self.authority, name, role, request_pem, signer_request_pem, hosts=hosts)


def issue_with(
    authority: Authority,
    name: str,
    role: Role,
    request_pem: bytes,
    signer_request_pem: bytes | None,
    *,
    hosts: tuple[str, ...] = (),
) -> Issued:
    """Certify the keys of signing requests with an authority's key that is at hand."""
    certificate = authority.issue_from_request(request_pem, role, name, hosts=hosts)
    signer = None
    if signer_request_pem is not None:
        issued = authority.issue_from_request(signer_request_pem, SIGNING_ROLE_OF[role], name)
        signer = certificate_pem(issued).decode()
    return Issued(certificate_pem(certificate).decode(), signer)


# --- the aggregator's own certificates ---------------------------------------------------------


def renew_server_if_due(
    home: ServerHome, issuer: Issuer, *, moment: datetime | None = None
) -> bool:
    """Renew the certificates of the server and of the operator in this home where they are due.

    The keys stay. Called every hour by the running aggregator, which reads ``server.pem`` anew.

    Returns
    -------
    bool
        Whether the server presents another certificate from now on.

    Raises
    ------
    ConsiliumError
        ``state.running`` while another process changes keys, and what issuing raises.
    """
    with changing_keys(home):
        return renew_own(home, issuer, moment=moment)


def renew_own(home: ServerHome, issuer: Issuer, *, moment: datetime | None = None) -> bool:
    """Renew as :func:`renew_server_if_due`, for whoever holds the lock already."""
    folder = home.identity
    changed = _install_rotated_server(folder, issuer)
    if due_for_renewal(read_certificate(folder / "server.pem"), now=moment):
        changed |= renew_server(folder, issuer)
    operator = read_certificate(folder / "operator.pem")
    if due_for_renewal(operator, now=moment) or not issuer.trust.in_force(operator):
        renew_operator(home, issuer)
    return changed


def renew_server(folder: Path, issuer: Certifier) -> bool:
    """Give the server's key a new certificate; False while that waits for the authority."""
    key = load_tls_key(folder / "server-key.pem")
    issued = issuer.issue(
        AGGREGATOR,
        Role.SERVER,
        signing_request(key, AGGREGATOR),
        None,
        hosts=server_hosts(read_certificate(folder / "server.pem")),
    )
    if issued is not None:
        write_atomic(folder / "server.pem", issued.certificate_pem.encode())
    return issued is not None


def renew_operator(home: ServerHome, issuer: Certifier) -> bool:
    """Give the keys of the operator in this home new certificates; False while that waits."""
    folder = home.identity
    issued = issuer.issue(
        OPERATOR_NAME,
        Role.OPERATOR,
        signing_request(load_tls_key(folder / "operator-key.pem"), OPERATOR_NAME),
        signing_request(load_signing_key(folder / "operator-signing-key.pem"), OPERATOR_NAME),
    )
    if issued is None or issued.signer_pem is None:
        return False
    registry = Registry(home.database)
    serial = f"{load_certificate(issued.certificate_pem.encode()).serial_number:x}"
    # Both are in force until the files are written.
    with registry.transaction() as session:
        member = session.get_one(Member, OPERATOR_NAME)
        member.next_serial = serial
        member.next_certificate_pem = issued.certificate_pem
        member.next_signer_pem = issued.signer_pem
    write_atomic(folder / "operator.pem", issued.certificate_pem.encode())
    write_atomic(folder / "operator-signer.pem", issued.signer_pem.encode())
    registry.promote(OPERATOR_NAME, serial)
    return True


def server_hosts(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the host names and addresses in the server's certificate, without the fixed name."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = names.get_values_for_type(x509.DNSName)
    hosts += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return tuple(host for host in hosts if host != SERVER_NAME)


def _install_rotated_server(folder: Path, issuer: Certifier) -> bool:
    """Put a new server key in force once the offline authority has certified it."""
    waiting = folder / "server-waiting-key.pem"
    if not waiting.exists():
        return False
    key = load_tls_key(waiting)
    issued = issuer.issue(
        AGGREGATOR,
        Role.SERVER,
        signing_request(key, AGGREGATOR),
        None,
        hosts=server_hosts(read_certificate(folder / "server.pem")),
    )
    if issued is None:
        return False
    install_pair(folder, "server", waiting.read_bytes(), issued.certificate_pem.encode())
    waiting.unlink()
    return True


def _trust(folder: Path) -> Trust:
    trust = Trust.read(folder / "authority.pem")
    enrolment = folder / "enrolment.pem"
    return trust.with_enrolment(read_certificate(enrolment)) if enrolment.exists() else trust


def _authorities(folder: Path, passphrase: bytes | None) -> tuple[Authority, ...] | None:
    """Return the authority in force and, during a rotation, the one before; None: offline."""
    if not (folder / "authority-key.pem").exists():
        return None
    found = [Authority.load(folder, passphrase)]
    old = folder / "authority-old-key.pem"
    if old.exists():
        key = load_tls_key(old, passphrase)
        found += [
            Authority(key, certificate)
            for certificate in Trust.read(folder / "authority.pem").authorities[1:]
            if certificate.public_key() == key.public_key()
        ]
    return tuple(found)
