"""TLS contexts for a connection to an archive, and for one from it."""

from __future__ import annotations

import ssl

from consilium_client.data.pacs.config import Keys, check_private
from consilium_common.errors import ConsiliumError


def client_context(keys: Keys) -> ssl.SSLContext:
    """Return the context with which we call the archive; its certificate is verified.

    Raises
    ------
    ConsiliumError
        ``pacs.tls-files`` or ``pacs.secret``.
    """
    return _context(ssl.Purpose.SERVER_AUTH, keys)


def server_context(keys: Keys) -> ssl.SSLContext:
    """Return the context with which the archive calls us; its certificate is required."""
    context = _context(ssl.Purpose.CLIENT_AUTH, keys)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _context(purpose: ssl.Purpose, keys: Keys) -> ssl.SSLContext:
    at = keys.ca
    try:
        context = ssl.create_default_context(purpose, cafile=keys.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if keys.certificate and keys.key:
            check_private(keys.key)
            at = keys.certificate
            # Without the callback an encrypted key would stop and ask the terminal.
            context.load_cert_chain(keys.certificate, keys.key, password=lambda: b"")
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConsiliumError(
            "pacs.tls-files",
            "A certificate or its key cannot be used.",
            where=at,
            hint="They must be PEM files that belong together; the key without a password.",
        ) from error
    return context
