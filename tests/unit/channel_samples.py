"""What a site may find on its way to the aggregator: proxies, strangers, silence."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from serving_samples import listening

from consilium_common.identity.authority import certificate_pem
from consilium_common.identity.keys import PrivateKey, private_pem


@contextmanager
def tls_server(
    key: PrivateKey, certificate: x509.Certificate, client_authority: x509.Certificate | None = None
) -> Iterator[str]:
    """Answer TLS with this certificate, and nothing after the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        pem = Path(folder) / "server.pem"
        pem.write_bytes(certificate_pem(certificate) + private_pem(key))
        context.load_cert_chain(pem)
    context.set_alpn_protocols(["h2"])
    if client_authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=certificate_pem(client_authority).decode())

    def handshake(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(1)

    with listening(handshake) as address:
        yield address


class ConnectProxy:
    """An HTTP proxy that knows CONNECT: to any address, it leads to ``target``.

    Parameters
    ----------
    status : int
        Answered instead, when it is not 200.
    authorization : str
        Value of Proxy-Authorization without which it answers 407.
    """

    def __init__(self, target: str, *, status: int = 200, authorization: str = "") -> None:
        self.target = target
        self.status = status
        self.authorization = authorization
        self.asked: list[str] = []
        self.passed: list[bytes] = []
        self._open: list[socket.socket] = []
        self._silent: set[socket.socket] = set()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve until the end of the block; yields the proxy's URL."""
        with listening(self._serve) as address:
            yield f"http://{address}"
        self.cut()

    def cut(self) -> None:
        """Break all tunnels off, as a change of address does."""
        for stream in self._open:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def forget(self) -> None:
        """Let everything in the tunnels of now vanish, as a firewall does that has forgotten them;
        new ones work.
        """
        self._silent.update(self._open)

    def _serve(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = client.recv(4096)
            if not piece:
                return  # it only looked whether somebody listens
            head += piece
        first, *headers = head.decode().split("\r\n")
        self.asked.append(first)
        given = [line.partition(": ")[2] for line in headers if line.startswith("Proxy-Auth")]
        if self.authorization and given != [self.authorization]:
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            return
        if self.status != 200:
            client.sendall(f"HTTP/1.1 {self.status} No\r\n\r\n".encode())
            return
        host, _, port = self.target.rpartition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self._open += [client, upstream]
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self._pass(client, upstream)

    def _pass(self, client: socket.socket, upstream: socket.socket) -> None:
        while True:
            for stream in select.select([client, upstream], [], [])[0]:
                content = stream.recv(65536)
                if not content:
                    return
                if stream in self._silent:
                    continue
                self.passed.append(content)
                (upstream if stream is client else client).sendall(content)
