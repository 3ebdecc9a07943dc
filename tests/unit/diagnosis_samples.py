"""Real ports for the doctor: an aggregator's gateway, strangers that answer TLS, a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from serving_samples import listening

from consilium_common.diagnosis.steps import Check, Diagnosis, Outcome, examine
from consilium_common.diagnosis.target import Target
from consilium_common.identity import authority as issuing
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role, describe, load_certificate
from consilium_common.identity.keys import new_tls_key, save_private
from consilium_common.identity.trust import Trust
from consilium_common.wire.methods import MEMBER_PROBE, SERVICE_ROLES, STREAM_ROLES
from consilium_server.fleet import Arrivals, FleetForwarder
from consilium_server.gateway import Gateway
from consilium_server.limits import Limits
from consilium_server.peers import Doorkeeper, Peer
from consilium_server.registry import Registry
from consilium_server.services.of_members import MemberServices
from consilium_server.tables import Member, now

Answer = Callable[[socket.socket], None]


def diagnosed(checks: Iterator[Check]) -> Diagnosis:
    """Take the steps without showing them."""
    return examine(checks, lambda _: None)


def cause_of(checks: Iterator[Check]) -> tuple[str, str]:
    """Return the name of the step that failed and its error's code."""
    found = diagnosed(checks)
    assert sum(step.outcome is Outcome.FAILED for step in found.steps) == 1
    assert found.cause is not None and found.cause.error is not None
    return found.cause.name, found.cause.error.code


def target_of(address: str, authority: Authority, **changes: Any) -> Target:
    """Return the target at an address."""
    host, _, port = address.rpartition(":")
    return Target(host, int(port), Trust.of(authority.certificate), **changes)


def answers_tls(
    folder: Path,
    certificate: x509.Certificate,
    key: Any,
    *,
    http2: bool = True,
    newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> Answer:
    """Return what shakes hands with this certificate."""
    (folder / "shown.pem").write_bytes(certificate_pem(certificate))
    save_private(folder / "shown-key.pem", key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    context.load_cert_chain(folder / "shown.pem", folder / "shown-key.pem")
    if http2:
        context.set_alpn_protocols(["h2"])

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(1)

    return answer


def shifted(monkeypatch: pytest.MonkeyPatch, by: timedelta) -> None:
    """Let the authority's machine have another clock."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls.fromtimestamp((datetime.now(UTC) + by).timestamp(), tz)

    monkeypatch.setattr(issuing, "datetime", Clock)


def inspecting_certificate(key: Any, issuer: str) -> x509.Certificate:
    """Return what a firewall that opens TLS shows: issued by an authority of its own."""
    begins = datetime.now(UTC) - timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "aggregator")]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(days=30))
        .sign(new_tls_key(), hashes.SHA384())
    )


@contextmanager
def connect_proxy(status: str = "200 fine") -> Iterator[tuple[str, list[str]]]:
    """Run a proxy that answers CONNECT; yields its address and the heads it was sent."""
    heads: list[str] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def answer(connection: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            one = connection.recv(1)
            if not one:
                return  # it only looked whether somebody listens
            head += one
        heads.append(head.decode())
        connection.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
        if not status.startswith("200"):
            return
        host, _, port = head.split(b" ")[1].decode().rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as onward:
            back = threading.Thread(target=pump, args=(onward, connection), daemon=True)
            back.start()
            pump(connection, onward)
            back.join(timeout=10)

    with listening(answer) as address:
        yield address, heads


class Port:
    """An aggregator's real gateway in a thread, with a register; probes are answered by ours.

    Parameters
    ----------
    folder : Path
        Holds ``server.pem``, ``server-key.pem`` and ``authority.pem``; takes what is missing.
    """

    def __init__(self, folder: Path, authority: Authority, registry: Registry) -> None:
        self.authority = authority
        self.registry = registry
        self.folder = folder
        self.limits: Limits | None = None
        #: Laid over every answer to a probe.
        self.says: dict[str, Any] = {}

    def certify(self) -> None:
        """Make the server's own certificate."""
        key = new_tls_key()
        save_private(self.folder / "server-key.pem", key)
        server = self.authority.issue(key.public_key(), Role.SERVER, "aggregator")
        (self.folder / "server.pem").write_bytes(certificate_pem(server))
        (self.folder / "authority.pem").write_bytes(certificate_pem(self.authority.certificate))

    def admit(self, pem: bytes, **changes: Any) -> None:
        """Put the holder of a certificate into the register."""
        certified = describe(load_certificate(pem))
        values = {
            "name": certified.name,
            "role": certified.role,
            "status": "active",
            "serial": certified.serial,
            "certificate_pem": pem.decode(),
            "signer_pem": "",
            "node_id": None,
            "joined_at": now(),
        }
        with self.registry.transaction() as session:
            session.merge(Member(**{**values, **changes}))

    @contextmanager
    def open(self, port: int) -> Iterator[None]:
        """Listen on 127.0.0.1 until the end of the block."""
        ready, failed = threading.Event(), []
        loop = asyncio.new_event_loop()
        done = asyncio.Event()

        def run() -> None:
            try:
                loop.run_until_complete(self._serve(port, ready, done))
            except BaseException as error:
                failed.append(error)
                ready.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert ready.wait(20)
        assert not failed, failed
        try:
            yield
        finally:
            loop.call_soon_threadsafe(done.set)
            thread.join(timeout=20)
            loop.close()

    async def _serve(self, port: int, ready: threading.Event, done: asyncio.Event) -> None:
        members = MemberServices(self.registry, None)  # type: ignore[arg-type] # probes issue nothing

        async def probe(peer: Peer, request: dict[str, Any]) -> Any:
            return {**await members.probe(peer, request), **self.says}

        async def other(*_: Any) -> Any:
            raise AssertionError("the doctor calls nothing but the probe")

        services: dict[str, Callable[[Peer, dict[str, Any]], Awaitable[Any]]] = {
            method: probe if method == MEMBER_PROBE else other for method in SERVICE_ROLES
        }
        trust = Trust.of(self.authority.certificate)
        fleet = FleetForwarder("https://127.0.0.1:1", self.folder / "authority.pem", self.folder)
        streams = dict.fromkeys(STREAM_ROLES, other)
        door, arrivals = Doorkeeper(trust, self.registry), Arrivals(self.folder)
        gateway = Gateway(door, fleet, arrivals, services, streams, limits=self.limits)
        await gateway.start("127.0.0.1", port, self.folder)
        ready.set()
        try:
            await done.wait()
        finally:
            await gateway.stop(0.1)
            await fleet.close()


_PORT = """
import sys, time
from consilium_server import handshakes
handshakes.listen()
from pathlib import Path
from diagnosis_samples import Port
from consilium_common.identity.authority import Authority
from consilium_server.registry import Registry
folder, database, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
strangers = int(sys.argv[4])
told = []
with handshakes.reworded(lambda code, words: told.append(code)):
    port = Port(folder, Authority.load(folder), Registry(database))
    with port.open(number):
        print("open", flush=True)
        sys.stdin.read()
        end = time.monotonic() + 15
        while len(told) < strangers and time.monotonic() < end:
            time.sleep(0.01)
print(*told)
"""


@contextmanager
def alarms(port: Port, number: int, database: Path, strangers: int = 0) -> Iterator[list[str]]:
    """Open the port in a process of its own; the list holds, in the end, why it refused callers.

    It stays open until it has seen as many strangers: it is not told when they hang up.
    """
    port.authority.save(port.folder)
    told: list[str] = []
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            _PORT,
            str(port.folder),
            str(database),
            *map(str, (number, strangers)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        yield told
        said, _ = process.communicate(timeout=20)
    told += said.split()


def secrets_in(text: str, folder: Path) -> list[str]:
    """Return the files of keys and logins of which a line stands in ``text``."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and ("key" in path.name or "login" in path.name):
            lines = [line for line in path.read_bytes().splitlines() if not line.startswith(b"-")]
            assert lines
            if any(line.strip() and line.strip().decode("latin-1") in text for line in lines):
                found.append(path.name)
    return found
