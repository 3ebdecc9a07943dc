"""The consortium's authority: one key, made once, that certifies every member."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.certificates import (
    CERTIFYING_ROLES,
    SERVER_NAME,
    SIGNING_ROLES,
    Role,
    check_name,
    consortium_id,
    describe,
    describe_public_key,
    extended_usage,
    read_certificate,
    urn,
)
from consilium_common.identity.keys import (
    PrivateKey,
    PublicKey,
    load_tls_key,
    new_tls_key,
    public_fingerprint,
    save_private,
)

AUTHORITY_DAYS = 3650
MEMBER_DAYS = 397  # a little over a year, as public authorities do
#: Clocks of hospitals differ by minutes: certificates begin a little in the past.
CLOCK_SLACK = timedelta(minutes=10)

__all__ = ["SIGNING_ROLES", "Authority", "certificate_pem", "load_request", "signing_request"]


@dataclass(frozen=True)
class Authority:
    """The consortium's signing key and its self-signed certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, name: str) -> Authority:
        """Found a consortium; ``name`` is its own, for people."""
        return cls._self_signed(f"{name} authority", [])

    @classmethod
    def load(cls, folder: Path, passphrase: bytes | None = None) -> Authority:
        """Read ``authority-key.pem`` and ``authority.pem`` from ``folder``.

        Raises
        ------
        ConsiliumError
            ``identity.no-key`` and others of :func:`load_tls_key`;
            ``identity.bad-certificate`` when key and certificate do not belong together.
        """
        key = load_tls_key(folder / "authority-key.pem", passphrase)
        certificate = read_certificate(folder / "authority.pem")
        if certificate.public_key() != key.public_key():
            raise ConsiliumError(
                "identity.bad-certificate",
                "The authority's key and its certificate do not belong together.",
                where=str(folder),
                hint="Restore both files from the same backup.",
            )
        return cls(key, certificate)

    def save(self, folder: Path, passphrase: bytes | None = None) -> None:
        """Write both files; the key with mode 0600, encrypted where there is a passphrase."""
        save_private(folder / "authority-key.pem", self.key, passphrase)
        write_atomic(folder / "authority.pem", certificate_pem(self.certificate), mode=0o644)

    @property
    def consortium(self) -> str:
        """The consortium's identifier, 16 hexadecimal digits."""
        return consortium_id(self.certificate)

    # --- other authorities -----------------------------------------------------------------

    def successor(self) -> Authority:
        """Make the authority that comes after this one, of the same consortium."""
        (common_name,) = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        title = str(common_name.value)
        head, _, last = title.rpartition(" ")
        head, number = (head, int(last) + 1) if last.isdigit() else (title, 2)
        carries = urn(self.consortium, Role.AUTHORITY, f"authority-{number}")
        return Authority._self_signed(f"{head} {number}", [x509.UniformResourceIdentifier(carries)])

    def cross_certify(self, successor: Authority) -> x509.Certificate:
        """Vouch for the key of the authority that comes after this one."""
        own = describe(successor.certificate)
        return self._certify(
            _Holder(successor.certificate.subject, own.public_key, Role.AUTHORITY, own.name),
            not_before=successor.certificate.not_valid_before_utc,
            not_after=successor.certificate.not_valid_after_utc,
        )

    def retire(
        self, former: x509.Certificate, *, ended: datetime | None = None
    ) -> x509.Certificate:
        """Vouch for what an authority certified for signing until now, and for nothing later.

        Parameters
        ----------
        ended : datetime, optional
            When it was replaced (default: now).
        """
        key = describe_public_key(former)
        return self._certify(
            _Holder(former.subject, key, Role.FORMER, public_fingerprint(key)[:16]),
            not_before=former.not_valid_before_utc,
            not_after=ended or datetime.now(UTC),
        )

    def issue_enrolment(self, public_key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        """Let a key of the aggregator certify invitations, as long as this authority holds."""
        subject = _subject(Role.ENROLMENT, "enrolment")
        return self._certify(
            _Holder(subject, public_key, Role.ENROLMENT, "enrolment"),
            not_before=datetime.now(UTC) - CLOCK_SLACK,
            not_after=self.certificate.not_valid_after_utc,
        )

    # --- members ---------------------------------------------------------------------------

    def issue(
        self,
        public_key: PublicKey,
        role: Role,
        name: str,
        *,
        lifetime: timedelta = timedelta(days=MEMBER_DAYS),
        hosts: tuple[str, ...] = (),
    ) -> x509.Certificate:
        """Certify ``public_key`` for ``role`` and ``name``, at most as long as this one holds.

        Parameters
        ----------
        hosts : tuple of str
            Host names and addresses; for the server alone.
        """
        if role in CERTIFYING_ROLES:
            raise ValueError(f"{role} is no member's role")
        now = datetime.now(UTC)
        return self._certify(
            _Holder(_subject(role, name), public_key, role, name, hosts),
            not_before=now - CLOCK_SLACK,
            not_after=now + lifetime,
        )

    def issue_from_request(
        self, request_pem: bytes, role: Role, name: str, *, hosts: tuple[str, ...] = ()
    ) -> x509.Certificate:
        """Certify the key of a signing request (its own signature proves who holds the key)."""
        return self.issue(requested_key(request_pem, role), role, name, hosts=hosts)

    def _certify(
        self, holder: _Holder, *, not_before: datetime, not_after: datetime
    ) -> x509.Certificate:
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(urn(self.consortium, holder.role, holder.name))
        ]
        if holder.role is Role.SERVER:
            names.extend(_host_name(host) for host in (SERVER_NAME, *holder.hosts))
        certifies = holder.role in CERTIFYING_ROLES
        begins = max(not_before, self.certificate.not_valid_before_utc)
        if certifies:
            begins = not_before
        builder = (
            x509.CertificateBuilder()
            .subject_name(holder.subject)
            .issuer_name(self.certificate.subject)
            .public_key(holder.public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(max(begins, min(not_after, self.certificate.not_valid_after_utc)))
            .add_extension(
                x509.BasicConstraints(ca=certifies, path_length=0 if certifies else None),
                critical=True,
            )
            .add_extension(_usage(authority=certifies), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(holder.public_key), critical=False
            )
        )
        if holder.role is Role.ENROLMENT:
            # TLS libraries hold a chain to this: nothing under it can ever serve.
            nowhere = x509.NameConstraints([x509.DNSName("nowhere.invalid")], None)
            builder = builder.add_extension(nowhere, critical=True)
        usage = extended_usage(holder.role)
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=True)
        return builder.sign(self.key, hashes.SHA384())

    @staticmethod
    def _self_signed(title: str, names: list[x509.GeneralName]) -> Authority:
        key = new_tls_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SLACK)
            .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
            # One below it: the key that certifies invitations while this one is locked away.
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Authority(key, builder.sign(key, hashes.SHA384()))


@dataclass(frozen=True)
class _Holder:
    """Who is certified."""

    subject: x509.Name
    public_key: PublicKey
    role: Role
    name: str
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class EnrolmentKey:
    """The aggregator's key that certifies invitations, and its certificate by the authority."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def issue(self, public_key: PublicKey, name: str, *, lifetime: timedelta) -> x509.Certificate:
        """Certify the key of an invitation for ``name``."""
        return Authority(self.key, self.certificate).issue(
            public_key, Role.INVITATION, name, lifetime=lifetime
        )


def requested_key(request_pem: bytes, role: Role) -> PublicKey:
    """Return the key of a signing request that is of the kind that ``role`` needs.

    Raises
    ------
    ConsiliumError
        ``identity.bad-request``, ``identity.weak-key``.
    """
    key = load_request(request_pem).public_key()
    expected = ed25519.Ed25519PublicKey if role in SIGNING_ROLES else ec.EllipticCurvePublicKey
    if not isinstance(key, expected):
        raise ConsiliumError(
            "identity.weak-key", f"The request for a {role} certificate has the wrong key."
        )
    if isinstance(key, ec.EllipticCurvePublicKey) and not isinstance(key.curve, ec.SECP384R1):
        raise ConsiliumError("identity.weak-key", "The request's curve is not P-384.")
    return key


def signing_request(key: PrivateKey, name: str) -> bytes:
    """Make a certificate signing request (PEM) for ``key``: all of it that ever leaves."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA384()
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def load_request(request_pem: bytes) -> x509.CertificateSigningRequest:
    """Parse a signing request and check that its maker holds the key."""
    try:
        request = x509.load_pem_x509_csr(request_pem)
        valid = request.is_signature_valid
    except ValueError:
        valid = False
    if not valid:
        raise ConsiliumError(
            "identity.bad-request", "The certificate signing request is not valid."
        )
    return request


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return the certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _subject(role: Role, name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, check_name(name)),
        ]
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
