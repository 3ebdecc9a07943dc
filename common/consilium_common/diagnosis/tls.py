"""The TLS handshake with the aggregator: who answers, and whether somebody sits in between."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from consilium_common.diagnosis.reaching import open_way
from consilium_common.diagnosis.steps import Found
from consilium_common.diagnosis.target import Target
from consilium_common.errors import ConsiliumError
from consilium_common.identity.certificates import SERVER_NAME
from consilium_common.identity.words import fingerprint_words
from consilium_common.wire.unavailable import tls_context, wrong_party

#: Connection there, handshake gone: nobody refuses TLS this way by himself.
_CUT = (ssl.SSLEOFError, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Secured:
    """What a finished handshake showed."""

    version: str
    cipher: str
    http2: bool
    certificate: x509.Certificate


def try_tls(target: Target) -> Found:
    """Shake hands with the aggregator and judge its certificate by the consortium's authorities.

    Raises
    ------
    ConsiliumError
        ``network.foreign-tls`` when the network opens TLS, ``identity.wrong-aggregator``,
        ``identity.aggregator-expired``, ``network.no-tls``, ``network.cut``,
        ``network.no-http2``, and those of the way there.
    """
    try:
        seen = handshake(target)
    except ssl.SSLCertVerificationError as error:
        raise wrong_party(target.address, target.proxy, error.verify_code) from error
    except _CUT as error:
        raise ConsiliumError(
            "network.cut",
            "The connection came about, and was cut when TLS began.",
            where=target.address,
            hint="A firewall that looks at protocols does this: ask your network department to let "
            f"TLS 1.3 to {target.address} through. If it does, ask the aggregator operator.",
        ) from error
    except (OSError, ssl.SSLError) as error:
        raise wrong_party(target.address, target.proxy, 0) from error
    if not seen.http2:
        raise ConsiliumError(
            "network.no-http2",
            "What answers speaks TLS 1.3 and not HTTP/2.",
            where=target.address,
            hint="A device in between changes the connection: ask your network department to pass "
            f"{target.address} through unchanged.",
        )
    words = fingerprint_words(seen.certificate)
    return Found(
        f"{seen.version}, HTTP/2, {seen.cipher}; the aggregator's words: {words}",
        facts={
            "version": seen.version,
            "cipher": seen.cipher,
            "words": words,
            "fingerprint": certificate_fingerprint(seen.certificate),
            "valid_until": seen.certificate.not_valid_after_utc.isoformat(),
        },
    )


def handshake(target: Target) -> Secured:
    """Shake hands, with a certificate of our own where there is one.

    What is wrong with that one shows in a later step: TLS 1.3 lets a client see the whole
    handshake before the aggregator judges it.

    Raises
    ------
    ConsiliumError
        Those of the way there.
    OSError
        ``ssl.SSLError`` and others when the handshake does not come about.
    """
    raw = open_way(target)
    context = _context(target)
    with raw, context.wrap_socket(raw, server_hostname=SERVER_NAME) as secured:
        cipher = secured.cipher()
        return Secured(
            (secured.version() or "").replace("TLSv", "TLS "),
            cipher[0] if cipher else "",
            secured.selected_alpn_protocol() == "h2",
            x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b""),
        )


def certificate_fingerprint(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate as firewalls show it: pairs with colons."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _context(target: Target) -> ssl.SSLContext:
    authority = target.trust.tls_pem()
    try:
        return tls_context(authority, target.credentials)
    except ssl.SSLError:  # a key that is not the certificate's: the next step says so
        return tls_context(authority, None)
