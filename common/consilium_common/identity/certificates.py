"""Certificates with a role: reading, checking and describing them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from consilium_common.errors import ConsiliumError
from consilium_common.identity.keys import PublicKey, public_fingerprint

#: The name every aggregator's certificate carries, whatever its address: clients check it, so an
#: aggregator can move without new certificates. No other role is ever issued it.
SERVER_NAME = "aggregator.consilium.internal"

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_URN = re.compile(r"urn:consilium:([0-9a-f]{16}):([a-z]+):([a-z0-9-]+)")


class Role(StrEnum):
    """What a certificate entitles its holder to."""

    AUTHORITY = "authority"
    SERVER = "server"
    OPERATOR = "operator"
    AUDITOR = "auditor"
    SITE = "site"
    #: The bootstrap certificate of an invitation file: enrolment, once, and nothing else.
    INVITATION = "invitation"
    #: A site's or operator's Ed25519 key: it signs, and opens no connection.
    SIGNER = "signer"
    #: The aggregator's Ed25519 key that countersigns the heads of the sites' ledgers.
    WITNESS = "witness"


@dataclass(frozen=True)
class Certified:
    """What a certificate of this consortium says of its holder."""

    consortium: str  #: 16 hexadecimal digits, from the authority's key
    role: Role
    name: str
    serial: str  #: hexadecimal
    not_before: datetime
    not_after: datetime
    public_key: PublicKey

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the holder's public key, 64 hexadecimal digits."""
        return public_fingerprint(self.public_key)


def check_name(name: str) -> str:
    """Return ``name`` if it can stand in a certificate, or raise ``identity.bad-name``."""
    if not _NAME.fullmatch(name):
        raise ConsiliumError(
            "identity.bad-name",
            f"{name!r} is not a valid name.",
            hint="Use lower-case letters, digits and hyphens, at most 63: north-clinic.",
        )
    return name


def urn(consortium: str, role: Role, name: str) -> str:
    """Return the URI that carries role and name in a certificate's subject alternative names."""
    return f"urn:consilium:{consortium}:{role}:{check_name(name)}"


def consortium_id(authority: x509.Certificate) -> str:
    """Return the consortium's identifier: 16 hexadecimal digits of its authority's key."""
    return public_fingerprint(_public_key(authority))[:16]


def load_certificate(content: bytes, *, where: str = "") -> x509.Certificate:
    """Parse one PEM certificate, or raise ``identity.bad-certificate``."""
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise ConsiliumError(
            "identity.bad-certificate", "This is not a PEM certificate.", where=where
        ) from error


def read_certificate(path: Path) -> x509.Certificate:
    """Read one PEM certificate from a file."""
    try:
        return load_certificate(path.read_bytes(), where=str(path))
    except OSError as error:
        raise ConsiliumError(
            "identity.no-certificate",
            f"Cannot read the certificate: {error.strerror or error}.",
            where=str(path),
            hint="Join again with a new invitation.",
        ) from error


def describe(certificate: x509.Certificate) -> Certified:
    """Read consortium, role and name from a certificate, without judging it.

    Raises
    ------
    ConsiliumError
        ``identity.foreign`` when it is no certificate of any consortium.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    for value in names.get_values_for_type(x509.UniformResourceIdentifier):
        match = _URN.fullmatch(value)
        if match and match[2] in set(Role):
            return Certified(
                consortium=match[1],
                role=Role(match[2]),
                name=match[3],
                serial=f"{certificate.serial_number:x}",
                not_before=certificate.not_valid_before_utc,
                not_after=certificate.not_valid_after_utc,
                public_key=_public_key(certificate),
            )
    raise ConsiliumError(
        "identity.foreign",
        "The certificate carries no consilium role.",
        hint="Use the certificate that `consilium site join` stored.",
    )


def check_issued(
    certificate: x509.Certificate, authority: x509.Certificate, *, now: datetime | None = None
) -> Certified:
    """Check that ``authority`` issued ``certificate`` and that it is valid now.

    Raises
    ------
    ConsiliumError
        ``identity.foreign`` (another consortium), ``identity.expired``,
        ``identity.not-yet-valid``.
    """
    certified = describe(certificate)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ConsiliumError(
            "identity.foreign",
            f"The certificate of {certified.name!r} was issued by another consortium.",
            hint="Each consortium has its own authority; use an invitation from this one.",
        ) from error
    if certified.consortium != consortium_id(authority):
        raise ConsiliumError(
            "identity.foreign", f"The certificate of {certified.name!r} names another consortium."
        )
    now = now or datetime.now(UTC)
    if now > certified.not_after:
        raise ConsiliumError(
            "identity.expired",
            f"The certificate of {certified.name!r} expired on {certified.not_after:%Y-%m-%d}.",
            hint="Ask the aggregator operator for a new invitation and join again.",
        )
    if now < certified.not_before:
        raise ConsiliumError(
            "identity.not-yet-valid",
            f"The certificate of {certified.name!r} is valid from {certified.not_before:%c} UTC.",
            hint="Check this machine's clock.",
        )
    return certified


def _public_key(certificate: x509.Certificate) -> PublicKey:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise ConsiliumError(
        "identity.weak-key",
        "The certificate's key is neither EC P-384 nor Ed25519.",
        hint="Join again; consilium makes the right kind of key.",
    )
