"""Private keys: made where they are used, stored readable by their owner alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


def new_tls_key() -> ec.EllipticCurvePrivateKey:
    """Make an EC P-384 key: it authenticates TLS and is the Flower node's key as well."""
    return ec.generate_private_key(ec.SECP384R1())


def new_signing_key() -> ed25519.Ed25519PrivateKey:
    """Make an Ed25519 key: it signs ledger entries, approvals and studies."""
    return ed25519.Ed25519PrivateKey.generate()


def private_pem(key: PrivateKey) -> bytes:
    """Return the key as unencrypted PKCS#8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def openssh_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the key in OpenSSH's format, which Flower's SuperNode reads."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def public_pem(key: PublicKey) -> bytes:
    """Return the public key as SubjectPublicKeyInfo PEM."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def public_fingerprint(key: PublicKey) -> str:
    """Return the SHA-256 of the public key's DER form, 64 hexadecimal digits."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def save_private(path: Path, key: PrivateKey) -> None:
    """Write the key durably with mode 0600."""
    write_atomic(path, private_pem(key), mode=0o600)


def load_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read an EC key; errors as :func:`_load`."""
    key = _load(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _wrong_kind(path, "an elliptic-curve key")
    return key


def load_signing_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """Read an Ed25519 key; errors as :func:`_load`."""
    key = _load(path)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise _wrong_kind(path, "an Ed25519 key")
    return key


def verify_signature(key: ed25519.Ed25519PublicKey, signature: bytes, content: bytes) -> bool:
    """Return whether ``signature`` is the key's signature of ``content``."""
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _load(path: Path) -> object:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConsiliumError(
            "identity.no-key",
            f"Cannot read the private key: {error.strerror or error}.",
            where=str(path),
            hint="Restore it from your backup, or join again with a new invitation.",
        ) from error
    if path.stat().st_mode & 0o077:
        raise ConsiliumError(
            "identity.key-exposed",
            "The private key can be read by other users of this machine.",
            where=str(path),
            hint=f"Run `chmod 600 {path}`; if others may have read it, ask for a new identity.",
        )
    try:
        return serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:
        raise _wrong_kind(path, "a PEM private key") from error


def _wrong_kind(path: Path, expected: str) -> ConsiliumError:
    return ConsiliumError(
        "identity.bad-key",
        f"The file does not hold {expected}.",
        where=str(path),
        hint="Restore it from your backup, or join again with a new invitation.",
    )
