"""Whom a member of a consortium trusts: its authority, and during a rotation the one before."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import (
    CERTIFYING_ROLES,
    Certified,
    Role,
    consortium_id,
    describe,
    describe_public_key,
    due_for_renewal,
    judge,
)
from consilium_common.identity.keys import public_fingerprint

#: No bundle of certificates is larger.
_LARGEST = 256 * 1024


@dataclass(frozen=True)
class Trust:
    """The authorities of one consortium.

    A bundle, ``authority.pem``, holds the authorities that count, the one in force first, and
    after them those that were replaced: each of these as a certificate of its key by an authority
    in force, which ends when it was replaced. So TLS takes nothing of theirs any more, and what
    they certified for signing still proves signatures from their time.

    Attributes
    ----------
    authorities : tuple of Certificate
        At least one; the first is in force.
    former : tuple of Certificate
        Authorities that were replaced, each certified by one of ``authorities``.
    enrolment : tuple of Certificate
        Keys of the aggregator that certify invitations, and nothing else.
    """

    authorities: tuple[x509.Certificate, ...]
    former: tuple[x509.Certificate, ...] = ()
    enrolment: tuple[x509.Certificate, ...] = ()

    def __post_init__(self) -> None:
        if not self.authorities:
            raise ConsiliumError("identity.bad-certificate", "There is no authority in it.")
        for authority in self.authorities:
            _check_authority(authority)
        if len({consortium_id(authority) for authority in self.authorities}) > 1:
            raise ConsiliumError(
                "identity.foreign",
                "The authorities are of different consortia.",
                hint="Restore authority.pem from your backup, or join again.",
            )
        for certificates, role in ((self.former, Role.FORMER), (self.enrolment, Role.ENROLMENT)):
            for certificate in certificates:
                # Its own end is no fault here: it is asked where something under it is judged.
                moment = certificate.not_valid_before_utc
                if judge(certificate, self.authorities, now=moment).role is not role:
                    raise ConsiliumError(
                        "identity.bad-certificate", f"It is no certificate of {role}."
                    )

    @classmethod
    def of(cls, *certificates: x509.Certificate) -> Trust:
        """Sort certificates into authorities, former ones and enrolment keys, and check them.

        Raises
        ------
        ConsiliumError
            ``identity.bad-certificate``, ``identity.foreign``, ``identity.weak-key``.
        """
        found: dict[Role, list[x509.Certificate]] = {role: [] for role in CERTIFYING_ROLES}
        for certificate in certificates:
            role = _certifying_role(certificate)
            if certificate not in found[role]:
                found[role].append(certificate)
        return cls(
            tuple(found[Role.AUTHORITY]), tuple(found[Role.FORMER]), tuple(found[Role.ENROLMENT])
        )

    @classmethod
    def load(cls, bundle: bytes, *, where: str = "") -> Trust:
        """Parse a PEM bundle; errors as :meth:`of`."""
        return cls.of(*load_bundle(bundle, where=where))

    @classmethod
    def read(cls, path: Path) -> Trust:
        """Read a PEM bundle from a file.

        Raises
        ------
        ConsiliumError
            ``identity.no-certificate``, and what :meth:`of` raises.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConsiliumError(
                "identity.no-certificate",
                f"Cannot read the certificate: {error.strerror or error}.",
                where=str(path),
                hint="Restore it from your backup, or join again with a new invitation.",
            ) from error
        return cls.load(content, where=str(path))

    @property
    def consortium(self) -> str:
        """The consortium's identifier, 16 hexadecimal digits; it outlives its authorities."""
        return consortium_id(self.authorities[0])

    def pem(self) -> bytes:
        """Return the bundle: authorities, then former ones. Enrolment keys travel elsewhere."""
        return _pem(self.authorities + self.former)

    def tls_pem(self) -> bytes:
        """Return what a TLS connection trusts: the authorities alone."""
        return _pem(self.authorities)

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`pem`, 64 hexadecimal digits."""
        return hashlib.sha256(self.pem()).hexdigest()

    def check(self, certificate: x509.Certificate, *, now: datetime | None = None) -> Certified:
        """Judge a certificate as :func:`~consilium_common.identity.certificates.check_issued`."""
        return judge(certificate, self.authorities + self.former + self.enrolment, now=now)

    def in_force(self, certificate: x509.Certificate) -> bool:
        """Return whether the authority in force issued a certificate, and not one before it."""
        try:
            certificate.verify_directly_issued_by(self.authorities[0])
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def wants_renewal(self, certificate: x509.Certificate, *, now: datetime | None = None) -> bool:
        """Return whether a member should renew: its end is near, or the authority is new."""
        return due_for_renewal(certificate, now=now) or not self.in_force(certificate)

    def with_enrolment(self, *certificates: x509.Certificate) -> Trust:
        """Return this trust with keys that may certify invitations."""
        return Trust(self.authorities, self.former, certificates)

    def follow(self, bundle: bytes, cross: bytes | None, *, now: datetime | None = None) -> Trust:
        """Return what to trust after the aggregator said that its authorities changed.

        An authority is added only if one that is trusted already certified its key; several
        rotations that were missed are followed one after the other. One that is missing from
        ``bundle`` is trusted no longer.

        Parameters
        ----------
        bundle : bytes
            The aggregator's bundle, PEM.
        cross : bytes, optional
            Certificates of newer authorities' keys by older ones, PEM.

        Raises
        ------
        ConsiliumError
            ``identity.untrusted-authority`` when no authority that is trusted vouches for a new
            one; what :meth:`load` raises for a bundle that is none.
        """
        offered = Trust.load(bundle)
        crossing = load_bundle(cross) if cross else ()
        if offered.consortium != self.consortium:
            raise ConsiliumError(
                "identity.foreign",
                "The authorities that the aggregator names are of another consortium.",
                hint="Ask the aggregator operator, on a number you know, what was changed there;"
                " another consortium takes another invitation.",
            )
        known = list(self.authorities)
        keys = {key_of(authority) for authority in known}
        before = -1
        while before != len(known):
            before = len(known)
            for certificate in crossing:
                if key_of(certificate) in keys:
                    continue
                try:
                    role = judge(certificate, known, now=now).role
                except ConsiliumError:
                    continue
                if role is Role.AUTHORITY:
                    known.append(certificate)
                    keys.add(key_of(certificate))
        if any(key_of(authority) not in keys for authority in offered.authorities):
            raise ConsiliumError(
                "identity.untrusted-authority",
                "The aggregator offers an authority for which none that is trusted here vouches.",
                hint="Compare the fingerprint words with the aggregator operator by telephone;"
                " if they are right, join again with a new invitation.",
            )
        return offered


def load_bundle(content: bytes, *, where: str = "") -> tuple[x509.Certificate, ...]:
    """Parse PEM certificates, or raise ``identity.bad-certificate``."""
    try:
        if len(content) > _LARGEST:
            raise ValueError("too large")
        return tuple(x509.load_pem_x509_certificates(content))
    except ValueError as error:
        raise ConsiliumError(
            "identity.bad-certificate", "This is no bundle of PEM certificates.", where=where
        ) from error


def key_of(certificate: x509.Certificate) -> str:
    """Return the fingerprint of a certificate's key."""
    return public_fingerprint(describe_public_key(certificate))


def _certifying_role(certificate: x509.Certificate) -> Role:
    try:
        role = describe(certificate).role
    except ConsiliumError as error:
        if error.code != "identity.foreign":
            raise
        # The founding authority carries no name of a consortium: it is the consortium.
        return Role.AUTHORITY
    if role not in CERTIFYING_ROLES:
        raise ConsiliumError(
            "identity.bad-certificate",
            f"A certificate of {role} stands where an authority's should.",
        )
    return role


def _check_authority(authority: x509.Certificate) -> None:
    """Check that it is a self-signed certificate of a P-384 key that may certify others."""
    key = authority.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConsiliumError(
            "identity.weak-key",
            "The authority's key is not EC P-384.",
            hint="Use an authority that `consilium server init` made.",
        )
    try:
        authority.verify_directly_issued_by(authority)
        extensions = authority.extensions
        fits = (
            extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            and extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        )
    except Exception:  # the library raises many kinds, all of them mean: no authority
        fits = False
    if not fits:
        raise ConsiliumError(
            "identity.bad-certificate",
            "This is no authority's certificate.",
            hint="Give authority.pem of the consortium.",
        )


def _pem(certificates: tuple[x509.Certificate, ...]) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)
