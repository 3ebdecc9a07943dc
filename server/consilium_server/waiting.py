"""Requests for certificates that wait for an authority whose key is kept offline."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

from sqlalchemy import JSON, select
from sqlalchemy.orm import Mapped, mapped_column

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import requested_key
from consilium_common.identity.certificates import (
    SIGNING_ROLE_OF,
    Role,
    due_for_renewal,
    load_certificate,
)
from consilium_common.identity.keys import public_fingerprint
from consilium_server.registry import Registry
from consilium_server.tables import Base, now

_log = logging.getLogger(__name__)


class CertificateRequest(Base):
    """A request that waits for the offline authority, or was answered by it."""

    __tablename__ = "certificate_requests"
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str]  #: of what is asked for: keys, role, name, hosts, by which authority
    name: Mapped[str]
    role: Mapped[str]
    hosts: Mapped[list[str]] = mapped_column(JSON)
    authority: Mapped[str]  #: fingerprint of the key that is to certify it
    request_pem: Mapped[str]
    signer_request_pem: Mapped[str | None]
    asked_at: Mapped[str]
    state: Mapped[str]  #: waiting, signed or withdrawn
    certificate_pem: Mapped[str | None] = mapped_column(default=None)
    signer_pem: Mapped[str | None] = mapped_column(default=None)


@dataclass(frozen=True)
class Issued:
    """Certificates, PEM."""

    certificate_pem: str
    signer_pem: str | None  #: None for an auditor and for the server: they sign nothing


@dataclass(frozen=True)
class Wanted:
    """A certificate that somebody asks for, whose right to it was checked before."""

    name: str
    role: Role
    request_pem: bytes
    signer_request_pem: bytes | None
    hosts: tuple[str, ...]  #: host names and addresses; for the server alone
    authority: str  #: fingerprint of the authority's key that is to certify it

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked for: the same keys again are the same request."""
        signer = None
        if self.signer_request_pem is not None:
            signing = SIGNING_ROLE_OF[self.role]
            signer = public_fingerprint(requested_key(self.signer_request_pem, signing))
        asked = {
            "name": self.name,
            "role": str(self.role),
            "key": public_fingerprint(requested_key(self.request_pem, self.role)),
            "signer": signer,
            "hosts": list(self.hosts),
            "authority": self.authority,
        }
        return hashlib.sha256(canonical_json(asked)).hexdigest()

    def row(self) -> CertificateRequest:
        """Return it as it is kept."""
        return CertificateRequest(
            digest=self.digest,
            name=self.name,
            role=self.role,
            hosts=list(self.hosts),
            authority=self.authority,
            request_pem=self.request_pem.decode(),
            signer_request_pem=self.signer_request_pem and self.signer_request_pem.decode(),
            asked_at=now(),
            state="waiting",
        )


def ask_offline(registry: Registry, wanted: Wanted) -> Issued | None:
    """Return what the offline authority certified for these keys; None while they wait for it.

    Raises
    ------
    ConsiliumError
        ``identity.request-waiting`` when other keys wait in that name: an invitation serves one
        request.
    """
    with registry.transaction() as session:
        query = select(CertificateRequest).where(
            CertificateRequest.name == wanted.name,
            CertificateRequest.role == wanted.role,
            CertificateRequest.state != "withdrawn",
        )
        for row in session.scalars(query):
            if row.digest != wanted.digest:
                if row.state == "waiting" and row.authority == wanted.authority:
                    raise ConsiliumError(
                        "identity.request-waiting",
                        f"Another request in the name of {wanted.name!r} waits for the authority.",
                        hint="Invite again to withdraw it: `consilium server invite`.",
                    )
            elif row.state == "waiting":
                return None
            elif row.certificate_pem is not None and not due_for_renewal(
                load_certificate(row.certificate_pem.encode())
            ):
                return Issued(row.certificate_pem, row.signer_pem)
        session.add(wanted.row())
        _log.warning(
            "a certificate for %s %s waits for the offline authority", wanted.role, wanted.name
        )
        return None


def withdraw(registry: Registry, name: str) -> None:
    """Drop all requests in a name: what waits, and what was answered and not fetched."""
    with registry.transaction() as session:
        query = select(CertificateRequest).where(CertificateRequest.name == name)
        for row in session.scalars(query):
            row.state = "withdrawn"


def waiting(registry: Registry) -> list[CertificateRequest]:
    """Return the requests that wait, oldest first."""
    with registry.transaction() as session:
        query = select(CertificateRequest).where(CertificateRequest.state == "waiting")
        return list(session.scalars(query.order_by(CertificateRequest.id)))
