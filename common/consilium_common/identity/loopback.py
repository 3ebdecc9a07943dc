"""The hop between Flower and us on one machine: a certificate for 127.0.0.1 and a secret."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from consilium_common.files import write_atomic
from consilium_common.identity.authority import certificate_pem
from consilium_common.identity.keys import new_tls_key, save_private


@dataclass(frozen=True)
class Loopback:
    """Files of one start; the next start replaces them."""

    certificate: Path
    key: Path
    #: Shared by Flower's process and our executor, which takes tasks with it.
    secret: Path


def make_loopback(folder: Path) -> Loopback:
    """Make a fresh certificate for 127.0.0.1, its key, and a fresh secret in ``folder``."""
    made = Loopback(folder / "loopback.pem", folder / "loopback-key.pem", folder / "secret")
    key = new_tls_key()
    save_private(made.key, key)
    write_atomic(made.certificate, certificate_pem(_self_signed(key)))
    write_atomic(made.secret, secrets.token_bytes(32))
    return made


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Make a certificate for 127.0.0.1, for the hop between Flower and us on one machine."""
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "consilium loopback")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(key, hashes.SHA384())
    )
