"""Certificates with a role: reading, checking and describing them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from consilium_common.errors import ConsiliumError
from consilium_common.identity.keys import PublicKey, public_fingerprint

#: The name every aggregator's certificate carries, whatever its address: clients check it, so an
#: aggregator can move without new certificates. No other role is ever issued it.
SERVER_NAME = "aggregator.consilium.internal"

_TO_THE_SECOND: Final = "%Y-%m-%d %H:%M:%S"
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
    #: A site's Ed25519 key: it signs approvals, ledger and receipts, and opens no connection.
    SIGNER = "signer"
    #: An operator's Ed25519 key: it signs studies, and opens no connection.
    PROPOSER = "proposer"
    #: The aggregator's Ed25519 key that countersigns the heads of the sites' ledgers.
    WITNESS = "witness"
    #: A key of the aggregator that certifies invitations and nothing else, for an authority whose
    #: own key is locked or elsewhere.
    ENROLMENT = "enrolment"
    #: An authority that was replaced: what it certified for signing still proves old signatures.
    FORMER = "former"


#: Roles of Ed25519 keys: they sign, and open no connection.
SIGNING_ROLES: Final = frozenset({Role.SIGNER, Role.PROPOSER, Role.WITNESS})
#: Roles of keys that certify others.
CERTIFYING_ROLES: Final = frozenset({Role.AUTHORITY, Role.ENROLMENT, Role.FORMER})
#: Roles that an invitation can carry.
MEMBER_ROLES: Final = (Role.SITE, Role.OPERATOR, Role.AUDITOR)
#: The role of a member's signing key; an auditor has none.
SIGNING_ROLE_OF: Final = {Role.SITE: Role.SIGNER, Role.OPERATOR: Role.PROPOSER}
#: A certificate is renewed so many days before it ends.
RENEW_DAYS: Final = 30


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
    """Return the consortium's identifier, 16 hexadecimal digits.

    It is taken from the key of the authority that founded the consortium. Authorities that came
    after it carry the identifier in their certificate.
    """
    named = _named(authority)
    return named[0] if named else public_fingerprint(describe_public_key(authority))[:16]


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
        ``identity.foreign`` when it is no certificate of any consortium; ``identity.weak-key``
        when its key is of no kind that consilium makes.
    """
    named = _named(certificate)
    if named is None:
        raise ConsiliumError(
            "identity.foreign",
            "The certificate carries no consilium role.",
            hint="Use the certificate that `consilium site join` stored.",
        )
    consortium, role, name = named
    return Certified(
        consortium=consortium,
        role=role,
        name=name,
        serial=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        public_key=describe_public_key(certificate),
    )


def due_for_renewal(certificate: x509.Certificate, *, now: datetime | None = None) -> bool:
    """Return whether a certificate should be renewed now.

    That is 30 days before its end, and for a short-lived one when a third of its life is left.
    """
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    left = certificate.not_valid_after_utc - (now or datetime.now(UTC))
    return left <= min(timedelta(days=RENEW_DAYS), life / 3)


class Trusting(Protocol):
    """Whoever judges certificates: :class:`~consilium_common.identity.trust.Trust`."""

    def check(self, certificate: x509.Certificate, *, now: datetime | None = None) -> Certified:
        """Return what the certificate says, or raise ``identity.*``."""
        ...


def check_issued(
    certificate: x509.Certificate,
    authority: x509.Certificate | Trusting,
    *,
    now: datetime | None = None,
) -> Certified:
    """Check that ``authority`` issued ``certificate``, for this use, and that it is valid now.

    Parameters
    ----------
    authority : Certificate or Trust
        One authority, or all that this consortium trusts.

    Raises
    ------
    ConsiliumError
        ``identity.foreign`` (another consortium), ``identity.weak-key``,
        ``identity.wrong-usage``, ``identity.expired``, ``identity.not-yet-valid``,
        ``identity.authority-expired``, ``identity.authority-retired``.
    """
    if isinstance(authority, x509.Certificate):
        return judge(certificate, (authority,), now=now)
    return authority.check(certificate, now=now)


def judge(
    certificate: x509.Certificate,
    issuers: Iterable[x509.Certificate],
    *,
    now: datetime | None = None,
) -> Certified:
    """Check a certificate as :func:`check_issued` does, under any of several issuers.

    An issuer with the role of enrolment can vouch for invitations alone; a former authority for
    keys that sign, and only for what it certified before it was replaced.
    """
    certified, issuer = _issued(certificate, tuple(issuers))
    named = _named(issuer)
    issuing = named[1] if named else Role.AUTHORITY
    now = now or datetime.now(UTC)
    if issuing is Role.FORMER:
        if certified.role not in SIGNING_ROLES or certified.not_before > issuer.not_valid_after_utc:
            raise ConsiliumError(
                "identity.authority-retired",
                f"The certificate of {certified.name!r} is of an authority that was replaced.",
                hint="Ask the aggregator operator for a new invitation and join again.",
            )
    elif now > issuer.not_valid_after_utc:
        raise ConsiliumError(
            "identity.authority-expired",
            f"The consortium's {issuing} expired on {issuer.not_valid_after_utc:%Y-%m-%d}.",
            hint="The aggregator operator replaces it with `consilium server rotate authority`.",
        )
    if now > certified.not_after:
        raise ConsiliumError(
            "identity.expired",
            f"The certificate of {certified.name!r} expired on {certified.not_after:%Y-%m-%d}.",
            hint="Ask the aggregator operator for a new invitation and join again.",
        )
    if now < certified.not_before:
        whose = f"the certificate of {certified.name!r}"
        raise clock_behind("identity.not-yet-valid", whose, certified.not_before, now)
    return certified


def clock_behind(
    code: str, whose: str, begins: datetime, now: datetime, *, where: str = ""
) -> ConsiliumError:
    """Return the error about a certificate that begins later than the clock says it is now.

    Certificates begin some minutes before they are made, so what is wrong is mostly a clock that
    was set back, and not the certificate.
    """
    return ConsiliumError(
        code,
        f"This computer's clock is probably behind: it says {now:{_TO_THE_SECOND}} UTC, and {whose}"
        f" is valid from {begins:{_TO_THE_SECOND}} UTC.",
        where=where,
        hint="Set this computer's clock, best by NTP. If it is right, the aggregator's clock was"
        " ahead: tell the aggregator operator.",
    )


@lru_cache(maxsize=4096)
def _issued(
    certificate: x509.Certificate, issuers: tuple[x509.Certificate, ...]
) -> tuple[Certified, x509.Certificate]:
    """Return holder and issuer; all that does not change with time, so it is kept."""
    certified = describe(certificate)
    issuer = next((one for one in issuers if _signed_by(certificate, one)), None)
    if issuer is None:
        raise ConsiliumError(
            "identity.foreign",
            f"The certificate of {certified.name!r} was issued by another consortium.",
            hint="Each consortium has its own authority; use an invitation from this one.",
        )
    if certified.consortium != consortium_id(issuer):
        raise ConsiliumError(
            "identity.foreign", f"The certificate of {certified.name!r} names another consortium."
        )
    _check_usage(certificate, certified)
    named = _named(issuer)
    if named and named[1] is Role.ENROLMENT and certified.role is not Role.INVITATION:
        raise ConsiliumError(
            "identity.wrong-usage",
            f"The certificate of {certified.name!r} was issued by a key that certifies invitations"
            f" alone, and it is one of {certified.role}.",
            hint="Whoever made it misused the aggregator's enrolment key: tell its operator.",
        )
    return certified, issuer


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _check_usage(certificate: x509.Certificate, certified: Certified) -> None:
    """Check that the key is of the kind that the role needs, and certified for its use."""
    role = certified.role
    signs = role in SIGNING_ROLES
    if isinstance(certified.public_key, ed25519.Ed25519PublicKey) is not signs:
        raise ConsiliumError(
            "identity.weak-key",
            f"The key of {certified.name!r} is not of the kind that {role} certificates have.",
            hint="Join again; consilium makes the right kind of key.",
        )
    try:
        extensions = certificate.extensions
        key_usage = extensions.get_extension_for_class(x509.KeyUsage).value
        authority = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        key_usage, authority = None, False
    try:
        extended = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (x509.ExtensionNotFound, ValueError):
        extended = set()
    certifies = role in CERTIFYING_ROLES
    fits = (
        key_usage is not None
        and (key_usage.digital_signature or certifies)
        and key_usage.key_cert_sign is certifies
        and authority is certifies
        and extended == extended_usage(role)
    )
    if not fits:
        raise ConsiliumError(
            "identity.wrong-usage",
            f"The certificate of {certified.name!r} does not allow the use that {role}"
            " certificates have.",
            hint="Use the certificate that consilium stored; join again if it was replaced.",
        )


def extended_usage(role: Role) -> set[x509.ObjectIdentifier]:
    """Return the extended key usages of a role's certificates; none for those that sign."""
    if role is Role.SERVER:
        return {ExtendedKeyUsageOID.SERVER_AUTH}
    if role in SIGNING_ROLES or role in (Role.AUTHORITY, Role.FORMER):
        return set()
    return {ExtendedKeyUsageOID.CLIENT_AUTH}


def _named(certificate: x509.Certificate) -> tuple[str, Role, str] | None:
    """Return consortium, role and name that a certificate carries."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None
    for value in names.get_values_for_type(x509.UniformResourceIdentifier):
        match = _URN.fullmatch(value)
        if match and match[2] in set(Role):
            return match[1], Role(match[2]), match[3]
    return None


def describe_public_key(certificate: x509.Certificate) -> PublicKey:
    """Return a certificate's key, or raise ``identity.weak-key`` for one consilium never makes."""
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
