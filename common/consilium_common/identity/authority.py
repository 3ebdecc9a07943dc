"""The consortium's authority: one key, made once, that certifies every member."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.certificates import (
    SERVER_NAME,
    Role,
    check_name,
    consortium_id,
    read_certificate,
    urn,
)
from consilium_common.identity.keys import (
    PrivateKey,
    PublicKey,
    load_tls_key,
    new_tls_key,
    save_private,
)

AUTHORITY_DAYS = 3650
MEMBER_DAYS = 397  # a little over a year, as public authorities do
#: Clocks of hospitals differ by minutes: certificates begin a little in the past.
CLOCK_SLACK = timedelta(minutes=10)
#: Roles of Ed25519 keys: they sign, and open no connection.
SIGNING_ROLES: Final = frozenset({Role.SIGNER, Role.WITNESS})


@dataclass(frozen=True)
class Authority:
    """The consortium's signing key and its self-signed certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, name: str) -> Authority:
        """Make a new authority; ``name`` is the consortium's, for people."""
        key = new_tls_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SLACK)
            .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA384())
        )
        return cls(key, certificate)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Read ``authority-key.pem`` and ``authority.pem`` from ``folder``."""
        return cls(
            load_tls_key(folder / "authority-key.pem"), read_certificate(folder / "authority.pem")
        )

    def save(self, folder: Path) -> None:
        """Write both files; the key with mode 0600."""
        save_private(folder / "authority-key.pem", self.key)
        write_atomic(folder / "authority.pem", certificate_pem(self.certificate), mode=0o644)

    @property
    def consortium(self) -> str:
        """The consortium's identifier, 16 hexadecimal digits."""
        return consortium_id(self.certificate)

    def issue(
        self,
        public_key: PublicKey,
        role: Role,
        name: str,
        *,
        lifetime: timedelta = timedelta(days=MEMBER_DAYS),
        hosts: tuple[str, ...] = (),
    ) -> x509.Certificate:
        """Certify ``public_key`` for ``role`` and ``name``.

        Parameters
        ----------
        hosts : tuple of str
            Host names and addresses; for the server alone.
        """
        now = datetime.now(UTC)
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(urn(self.consortium, role, name))
        ]
        if role is Role.SERVER:
            names.extend(_host_name(host) for host in (SERVER_NAME, *hosts))
        builder = (
            x509.CertificateBuilder()
            .subject_name(
                x509.Name(
                    [
                        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
                        x509.NameAttribute(NameOID.COMMON_NAME, check_name(name)),
                    ]
                )
            )
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SLACK)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )
        if role not in SIGNING_ROLES:
            usage = (
                ExtendedKeyUsageOID.SERVER_AUTH
                if role is Role.SERVER
                else ExtendedKeyUsageOID.CLIENT_AUTH
            )
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        return builder.sign(self.key, hashes.SHA384())

    def issue_from_request(self, request_pem: bytes, role: Role, name: str) -> x509.Certificate:
        """Certify the key of a signing request (its own signature proves who holds the key)."""
        request = load_request(request_pem)
        key = request.public_key()
        expected = ed25519.Ed25519PublicKey if role in SIGNING_ROLES else ec.EllipticCurvePublicKey
        if not isinstance(key, expected):
            raise ConsiliumError(
                "identity.weak-key", f"The request for a {role} certificate has the wrong key."
            )
        if isinstance(key, ec.EllipticCurvePublicKey) and not isinstance(key.curve, ec.SECP384R1):
            raise ConsiliumError("identity.weak-key", "The request's curve is not P-384.")
        return self.issue(key, role, name)


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
