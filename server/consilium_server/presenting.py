"""What the port presents and trusts in TLS: read anew from disk when it changes, without a restart.

The server's certificate is renewed and the authority rotated while sites are connected. gRPC asks
before each handshake; connections that stand go on with what they were made with, and our own check
of every call (`peers`) follows the same files.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from consilium_common.errors import ConsiliumError
from consilium_common.identity.trust import Trust
from consilium_common.wire.tls13 import grpc

_log = logging.getLogger(__name__)

_FILES: Final = ("server-key.pem", "server.pem", "authority.pem")
_Stamp = tuple[tuple[int, int, int], ...]


class Presented:
    """The server's certificate, its key and the trusted authorities, as they stand on disk.

    Parameters
    ----------
    folder : Path
        Holds ``server-key.pem``, ``server.pem`` and ``authority.pem`` (a bundle of one or more).

    Raises
    ------
    ConsiliumError
        ``identity.bad-server`` when they cannot be read or do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # gRPC asks from threads of its own.
        self._lock = threading.Lock()
        self._stamp = self._stamp_now()
        self._initial = _read(folder)

    def credentials(self) -> grpc.ServerCredentials:
        """Return the port's credentials: a client certificate is demanded, always."""
        return grpc.dynamic_ssl_server_credentials(
            self._initial, self.changed, require_client_authentication=True
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new configuration when the files have changed, None otherwise.

        Files that do not fit together (one is written a moment before the other) change nothing
        yet: they are looked at again with the next handshake.
        """
        with self._lock:
            stamp = self._stamp_now()
            if stamp == self._stamp:
                return None
            try:
                configuration = _read(self._folder)
            except ConsiliumError as error:
                _log.warning("the port goes on with its old certificate: %s", error)
                return None
            self._stamp = stamp
            _log.info("the port presents a new certificate or trusts other authorities")
            return configuration

    def _stamp_now(self) -> _Stamp:
        return tuple(_stamp(self._folder / name) for name in _FILES)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is replaced; zeros while there is none."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_mtime_ns, status.st_ino, status.st_size)


def _read(folder: Path) -> grpc.ServerCertificateConfiguration:
    try:
        key, certificate, authorities = ((folder / name).read_bytes() for name in _FILES)
        presented = x509.load_pem_x509_certificate(certificate)
        trusted = Trust.load(authorities).tls_pem()
        fits = load_pem_private_key(key, None).public_key() == presented.public_key()
    except (OSError, ValueError, TypeError) as error:
        raise ConsiliumError(
            "identity.bad-server",
            f"The server's certificate, key or authority cannot be read ({type(error).__name__}).",
            where=str(folder),
            hint="Restore the folder from its backup.",
        ) from error
    if not fits:
        raise ConsiliumError(
            "identity.bad-server",
            "The server's key is not that of its certificate.",
            where=str(folder),
            hint="Restore server.pem and server-key.pem from the same backup.",
        )
    return grpc.ssl_server_certificate_configuration(
        [(key, certificate)], root_certificates=trusted
    )
