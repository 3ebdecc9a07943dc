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


def private_pem(key: PrivateKey, passphrase: bytes | None = None) -> bytes:
    """Return the key as PKCS#8 PEM, encrypted where there is a passphrase."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase)
        if passphrase
        else serialization.NoEncryption(),
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


def save_private(path: Path, key: PrivateKey, passphrase: bytes | None = None) -> None:
    """Write the key durably with mode 0600, encrypted where there is a passphrase."""
    write_atomic(path, private_pem(key, passphrase), mode=0o600)


def load_tls_key(path: Path, passphrase: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Read an EC key; ``passphrase`` opens one that is locked.

    Raises
    ------
    ConsiliumError
        ``identity.no-key``, ``identity.key-exposed``, ``identity.bad-key``;
        ``identity.passphrase-needed`` and ``identity.wrong-passphrase`` for a locked key.
    """
    key = _load(path, passphrase)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _wrong_kind(path, "an elliptic-curve key")
    return key


def load_signing_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """Read an Ed25519 key; errors as :func:`load_tls_key`."""
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


def is_locked(path: Path) -> bool:
    """Return whether the file holds a private key under a passphrase."""
    try:
        return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in path.read_bytes()
    except OSError:
        return False


def _load(path: Path, passphrase: bytes | None = None) -> object:
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
    locked = is_locked(path)
    if locked and not passphrase:
        raise ConsiliumError(
            "identity.passphrase-needed",
            "The private key is under a passphrase, and none was given.",
            where=str(path),
            hint="Give it with --passphrase-file, or run this at a terminal.",
        )
    try:
        return serialization.load_pem_private_key(content, passphrase if locked else None)
    except (ValueError, TypeError) as error:
        if locked:
            raise ConsiliumError(
                "identity.wrong-passphrase",
                "The passphrase does not open the private key.",
                where=str(path),
                hint="Check the passphrase; if it is right, restore the key from your backup.",
            ) from None
        raise _wrong_kind(path, "a PEM private key") from error


def _wrong_kind(path: Path, expected: str) -> ConsiliumError:
    return ConsiliumError(
        "identity.bad-key",
        f"The file does not hold {expected}.",
        where=str(path),
        hint="Restore it from your backup, or join again with a new invitation.",
    )
