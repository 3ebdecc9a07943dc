"""A real PACS for tests: Debian's Orthanc, DICOM over TLS, DICOMweb over HTTPS with a password."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from consilium_common.processes import die_with_parent, free_port

ORTHANC = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
USER, PASSWORD = "consilium", "correct horse"
TITLE, OUR_TITLE = "HOSPITAL", "CONSILIUM"

needs_orthanc = pytest.mark.skipif(
    ORTHANC is None or not DICOMWEB.is_file(),
    reason="no Orthanc here: apt-get install orthanc orthanc-dicomweb",
)


class Certificates:
    """An authority and what it has signed; ``other`` is an authority that nobody believes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        key = ec.generate_private_key(ec.SECP256R1())
        self.ca = self._write("ca", _certificate("authority", key, None, None), key)
        for name in ("archive", "ours"):
            own = ec.generate_private_key(ec.SECP256R1())
            self._write(name, _certificate(name, own, "authority", key), own)
        stranger = ec.generate_private_key(ec.SECP256R1())
        self.other = self._write("other", _certificate("other", stranger, None, None), None)

    def _write(
        self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey | None
    ) -> Path:
        pem = self.folder / f"{name}.pem"
        pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        if key is not None:
            path = self.folder / f"{name}-key.pem"
            path.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )
            path.chmod(0o600)
        return pem


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str | None,
    issuer_key: ec.EllipticCurvePrivateKey | None,
) -> x509.Certificate:
    def names(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(names(name))
        .issuer_name(names(issuer or name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
            ),
            critical=False,
        )
    )
    return builder.sign(issuer_key or key, hashes.SHA256())


class TlsFront:
    """Ends TLS and passes the bytes on to a port of this machine, as a hospital's proxy does."""

    def __init__(self, certificate: Path, key: Path, port: int) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)

        class Passing(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with (
                    suppress(OSError),
                    context.wrap_socket(self.request, server_side=True) as outside,
                    socket.create_connection(("127.0.0.1", port), 10) as inside,
                ):
                    back = threading.Thread(target=_pass_on, args=(inside, outside), daemon=True)
                    back.start()
                    _pass_on(outside, inside)
                    back.join()

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", 0), Passing)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class Orthanc:
    """One Orthanc on free ports; :meth:`kill` and :meth:`start` keep its images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificates = Certificates(folder / "certificates")
        self.dicom_port, self.move_port, self._http_port = free_port(), free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        made = self.certificates.folder
        # Debian 12's web server inside Orthanc crashes on its first TLS connection (its library
        # is built for an OpenSSL that Debian no longer has). As in hospitals, TLS ends in front.
        self._front = TlsFront(made / "archive.pem", made / "archive-key.pem", self._http_port)
        self.https_port = self._front.port
        self.url = f"https://127.0.0.1:{self.https_port}/dicom-web"
        self._config = folder / "orthanc.json"
        self._config.write_text(
            json.dumps(
                {
                    "StorageDirectory": str(folder / "storage"),
                    "Plugins": [str(DICOMWEB)],
                    "HttpPort": self._http_port,
                    "AuthenticationEnabled": True,
                    "RegisteredUsers": {USER: PASSWORD},
                    "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
                    "DicomAet": TITLE,
                    "DicomPort": self.dicom_port,
                    "DicomCheckCalledAet": True,
                    "DicomCheckModalityHost": True,
                    "DicomAlwaysAllowEcho": False,
                    "DicomAlwaysAllowStore": False,
                    "DicomTlsEnabled": True,
                    "DicomTlsCertificate": str(made / "archive.pem"),
                    "DicomTlsPrivateKey": str(made / "archive-key.pem"),
                    "DicomTlsTrustedCertificates": str(made / "ca.pem"),
                    "DicomModalities": {
                        "ours": {
                            "AET": OUR_TITLE,
                            "Host": "127.0.0.1",
                            "Port": self.move_port,
                            "UseDicomTls": True,
                        }
                    },
                    "OverwriteInstances": False,
                }
            )
        )

    def start(self) -> None:
        """Start and wait until it answers."""
        assert ORTHANC is not None
        log = (self.folder / "orthanc.log").open("ab")
        self._process = subprocess.Popen(
            [ORTHANC, str(self._config)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - as the product does
        )
        log.close()
        end = time.monotonic() + 30
        while True:
            try:
                self._call("get", "system")
                return
            except requests.ConnectionError:
                running = self._process.poll() is None
                assert running and time.monotonic() < end, (
                    self.folder / "orthanc.log"
                ).read_text()[-2000:]
                time.sleep(0.05)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def upload(self, files: Iterable[Path]) -> None:
        """Store files."""
        for path in files:
            self._call("post", "instances", data=path.read_bytes())

    def close(self) -> None:
        """End it and what stands in front of it."""
        self.kill()
        self._front.close()

    def _call(self, method: str, path: str, **options: Any) -> requests.Response:
        answer = requests.request(
            method,
            f"http://127.0.0.1:{self._http_port}/{path}",
            auth=(USER, PASSWORD),
            timeout=20,
            **options,
        )
        answer.raise_for_status()
        return answer
