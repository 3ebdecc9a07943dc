"""Why there is no connection: gRPC has one word for everything, so look from outside, in order.

Address, proxy and TCP first; then who answers with TLS; then our own certificate, by our own
means; and only then that the aggregator refuses a certificate which is valid in itself.
"""

from __future__ import annotations

import os
import socket
import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from consilium_common.errors import ConsiliumError, printable
from consilium_common.identity.certificates import (
    SERVER_NAME,
    Role,
    clock_behind,
    describe,
)
from consilium_common.identity.trust import Trust, load_bundle
from consilium_common.wire.methods import SERVICE_ROLES
from consilium_common.wire.proxy import Proxy, open_socket

if TYPE_CHECKING:
    from consilium_common.wire.channel import Credentials

#: Roles whose certificates open a connection.
CALLING_ROLES: Final = frozenset({Role.SITE, Role.OPERATOR, Role.AUDITOR, Role.INVITATION})

_SECONDS: Final = 5.0
#: OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED.
_NOT_YET_VALID, _EXPIRED = 9, 10
#: With this frame an HTTP/2 server begins (RFC 9113, section 3.4): its type, SETTINGS.
_SETTINGS: Final = 4


def why_unavailable(
    address: str, credentials: Credentials | None, proxy: Proxy | None = None
) -> ConsiliumError:
    """Return the first cause that is found on the way to ``address``; opens connections there."""
    try:
        stream = open_socket(address, proxy, timeout=_SECONDS)
    except ConsiliumError as error:
        return error
    with stream:
        if credentials is None:
            return ConsiliumError(
                "network.unavailable", "The aggregator is unavailable.", where=address
            )
        wrong = own_trouble(credentials)
        if wrong is not None:
            return wrong
        context = tls_context(credentials.authority, credentials)
        try:
            with context.wrap_socket(stream, server_hostname=SERVER_NAME) as secured:
                welcomed = _welcomed(secured)
        except ssl.SSLCertVerificationError as problem:
            return wrong_party(address, proxy, problem.verify_code)
        except TimeoutError:
            return ConsiliumError(
                "network.no-tls",
                f"What answers at this address began no TLS within {_SECONDS:g} s.",
                where=address,
                hint="A firewall on the way may hold TLS up; ask your network department.",
            )
        except (OSError, ssl.SSLError):
            return wrong_party(address, proxy, 0)
    if welcomed:
        return ConsiliumError(
            "network.interrupted",
            "The connection to the aggregator was interrupted; it can be made now.",
            where=address,
            hint="Try again.",
        )
    return why_refused(address, credentials)


def no_way(address: str, proxy: Proxy | None = None) -> ConsiliumError | None:
    """Return why TCP does not reach ``address``, None where it does."""
    try:
        open_socket(address, proxy, timeout=_SECONDS).close()
    except ConsiliumError as error:
        return error
    return None


def why_refused(address: str, credentials: Credentials, method: str = "") -> ConsiliumError:
    """Return why the aggregator refuses this certificate, as far as it can be known from here.

    Parameters
    ----------
    method : str
        What was called; empty where that does not matter.
    """
    trouble = own_trouble(credentials)
    if trouble is not None:
        return trouble
    role = describe(load_bundle(credentials.certificate)[0]).role
    permitted = SERVICE_ROLES.get(method, CALLING_ROLES)
    if role not in permitted:
        return ConsiliumError(
            "identity.wrong-role",
            f"The certificate in use is of the role {role}, which may not do this.",
            where=address,
            hint=f"It takes {' or '.join(sorted(permitted))}: use that one's own identity.",
        )
    if role is Role.INVITATION:
        return ConsiliumError(
            "identity.refused",
            "The aggregator refuses this invitation, which is valid in itself: it was used already"
            " or withdrawn there.",
            where=address,
            hint="Each invitation works once. If it was not you, tell the aggregator operator at"
            " once; otherwise ask for a new one.",
        )
    return ConsiliumError(
        "identity.refused",
        "The aggregator refuses this certificate, which is valid in itself: it was revoked or"
        " replaced there.",
        where=address,
        hint="Ask the aggregator operator; joining again needs a new invitation.",
    )


def own_trouble(credentials: Credentials) -> ConsiliumError | None:
    """Return what is wrong with one's own certificate, None where nothing is.

    Found are: expired, not yet valid (by this machine's clock), another consortium's, a role that
    opens no connection, wrong key usage, a weak key, and a key that is not the certificate's.
    """
    try:
        # After one's own come, for an invitation, certificates of keys that certify invitations.
        own, *chain = load_bundle(credentials.certificate)
        certified = Trust.load(credentials.authority).with_enrolment(*chain).check(own)
        key = serialization.load_pem_private_key(credentials.key, None)
    except ConsiliumError as error:
        return error
    except (ValueError, TypeError):
        return ConsiliumError(
            "identity.bad-key",
            "Certificates or key of this identity are damaged.",
            hint="Restore them from your backup, or join again with a new invitation.",
        )
    if certified.role not in CALLING_ROLES:
        return ConsiliumError(
            "identity.wrong-role",
            f"The certificate is a {certified.role}'s: it opens no connection.",
            hint="Use the certificate that joining stored.",
        )
    if key.public_key() != certified.public_key:
        return ConsiliumError(
            "identity.bad-key",
            "The private key is not the certificate's.",
            hint="Restore both from the same backup, or join again with a new invitation.",
        )
    return None


def tls_context(authority: bytes, credentials: Credentials | None) -> ssl.SSLContext:
    """Return Python's form of our TLS: as gRPC does it, with a certificate of our own or without.

    Raises
    ------
    ssl.SSLError
        When certificate and key do not belong together.
    """
    context = ssl.create_default_context(cadata=authority.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    if credentials is None:
        return context
    # Python reads these from files only: here from one that has no name and ends with this block.
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("identity"), "wb") as unnamed:
            unnamed.write(credentials.certificate + b"\n" + credentials.key)
            unnamed.flush()
            context.load_cert_chain(f"/proc/self/fd/{unnamed.fileno()}")
    return context


def _welcomed(secured: ssl.SSLSocket) -> bool:
    """Whether the aggregator begins HTTP/2: in TLS 1.3 it judges our certificate before that."""
    secured.settimeout(_SECONDS)
    try:
        # An HTTP/2 client speaks first: the preface and an empty SETTINGS frame.
        secured.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _SETTINGS, *bytes(5)])
        )
        head = secured.recv(9)
    except (OSError, ssl.SSLError):
        return False
    return len(head) >= 4 and head[3] == _SETTINGS


def wrong_party(address: str, proxy: Proxy | None, verify_code: int) -> ConsiliumError:
    """Say who answers in the aggregator's place, by the certificate that is shown."""
    shown = _shown_certificate(address, proxy)
    if shown is None:
        return ConsiliumError(
            "network.no-tls",
            "What answers at this address speaks no TLS 1.3.",
            where=address,
            hint="Check the address and port; a firewall may also break TLS off.",
        )
    try:
        describe(shown)
    except ConsiliumError:
        issuer = _issuer(shown)
        return ConsiliumError(
            "network.foreign-tls",
            f"Somebody else answers TLS at this address{issuer}: no consilium aggregator.",
            where=address,
            hint="Check the address. If your network opens and inspects TLS, ask the network"
            " department to exempt this address: mutual TLS cannot be inspected.",
        )
    if verify_code == _NOT_YET_VALID:
        begins, whose = shown.not_valid_before_utc, "the aggregator's certificate"
        code = "identity.aggregator-expired"
        return clock_behind(code, whose, begins, datetime.now(UTC), where=address)
    if verify_code == _EXPIRED:
        return ConsiliumError(
            "identity.aggregator-expired",
            "By this machine's clock the aggregator's certificate expired on"
            f" {shown.not_valid_after_utc:%Y-%m-%d}.",
            where=address,
            hint="Check this machine's clock; if it is right, tell the aggregator operator.",
        )
    return ConsiliumError(
        "identity.wrong-aggregator",
        "The aggregator at this address belongs to another consortium.",
        where=address,
        hint="Check the address; do not go on if you did not expect this.",
    )


def _shown_certificate(address: str, proxy: Proxy | None) -> x509.Certificate | None:
    """Fetch the certificate of whoever answers, to name them; nothing is sent to them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            open_socket(address, proxy, timeout=_SECONDS) as stream,
            context.wrap_socket(stream, server_hostname=SERVER_NAME) as secured,
        ):
            der = secured.getpeercert(binary_form=True)
        return None if der is None else x509.load_der_x509_certificate(der)
    except (ConsiliumError, OSError, ValueError, socket.gaierror):
        return None


def _issuer(certificate: x509.Certificate) -> str:
    """Return who issued a stranger's certificate, in words to find them by; it may say nothing."""
    for kind in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME):
        for attribute in certificate.issuer.get_attributes_for_oid(kind):
            return f", certified by {printable(str(attribute.value))[:60]!r}"
    return ""
