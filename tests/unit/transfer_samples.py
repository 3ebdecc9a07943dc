"""The aggregator's real port with its real files, and a site that counts what it moves.

Run as a program it serves the port until its standard input closes; its memory can be looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from egress_samples import reference
from site_samples import NAME, joined_site

from consilium_client.connection import Connection
from consilium_client.transfers import Transfers as SiteTransfers
from consilium_common.canonical import canonical_json
from consilium_common.files import private_folder
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role, describe, read_certificate
from consilium_common.identity.keys import new_tls_key, save_private
from consilium_common.processes import free_port
from consilium_common.wire.channel import CHANNEL_OPTIONS, Credentials
from consilium_common.wire.messages import Reference
from consilium_common.wire.methods import (
    ERROR_KEY,
    SERVICE_ROLES,
    SITE_DELIVER,
    SITE_FETCH,
)
from consilium_common.wire.tls13 import grpc
from consilium_server.fleet import Arrivals, FleetForwarder
from consilium_server.gateway import Gateway
from consilium_server.home import ServerHome
from consilium_server.kicks import Kicks
from consilium_server.limits import Limits
from consilium_server.peers import Doorkeeper
from consilium_server.registry import Registry
from consilium_server.study_files import StudyFiles
from consilium_server.tables import Approval, Member, now
from consilium_server.transfers import Transfers

STUDY, OTHER_STUDY = "d" * 64, "e" * 64
MIB = 1024 * 1024


def run(scenario: Callable[[], Awaitable[Any]]) -> Any:
    """Run a scenario that must end within 40 seconds."""

    async def limited() -> Any:
        return await asyncio.wait_for(scenario(), 40)

    return asyncio.run(limited())


class Port:
    """An aggregator's home and port. Its studies exist by their approvals alone."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder
        self.home = ServerHome.create(folder / "aggregator")
        self.registry = Registry(self.home.database)
        self.port = port or free_port()
        self.limits = Limits()
        self.files = StudyFiles(self.home.study_folder(STUDY))
        self._gateway: Gateway | None = None

    def found(self) -> Authority:
        """Make authority and certificate, once."""
        authority = Authority.create("tests")
        key = new_tls_key()
        save_private(self.home.identity / "server-key.pem", key)
        server = authority.issue(key.public_key(), Role.SERVER, "aggregator")
        for name, certificate in (
            ("server.pem", server),
            ("authority.pem", authority.certificate),
        ):
            (self.home.identity / name).write_bytes(certificate_pem(certificate))
        return authority

    def add(self, name: str, certificate: bytes, *studies: str) -> None:
        """Make a certificate's holder a member, which has approved studies."""
        from cryptography.x509 import load_pem_x509_certificate

        certified = describe(load_pem_x509_certificate(certificate))
        with self.registry.transaction() as session:
            session.merge(
                Member(
                    name=name,
                    role=Role.SITE,
                    status="active",
                    serial=certified.serial,
                    certificate_pem=certificate.decode(),
                    signer_pem="",
                    node_id="7",
                    joined_at=now(),
                )
            )
            for study in studies:
                session.merge(
                    Approval(
                        digest=study,
                        site=name,
                        decision="approved",
                        why="",
                        cohort_size=5,
                        signature="",
                        decided_at=now(),
                    )
                )

    def offer(self, content: bytes) -> Reference:
        """Put a model on offer."""
        path = self.home.study_folder(STUDY) / "model.safetensors"
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return self.files.offer(path)

    def came(self, site: str = NAME) -> set[str]:
        """Return the names of what is there of a site's deliveries."""
        folder = self.home.study_folder(STUDY) / "in" / site
        return {path.name for path in folder.iterdir()} - {"expected.json"}

    async def start(self) -> None:
        """Listen."""
        authority = self.home.identity / "authority.pem"
        fleet = FleetForwarder("https://127.0.0.1:1", authority, Kicks(self.folder / "kicks"))
        self._gateway = Gateway(
            Doorkeeper(read_certificate(authority), self.registry),
            fleet,
            Arrivals(private_folder(self.folder / "arrived")),
            dict.fromkeys(SERVICE_ROLES, _no_service),
            Transfers(self.home, self.registry).table(),
            limits=self.limits,
        )
        await self._gateway.start("127.0.0.1", self.port, self.home.identity)

    async def stop(self) -> None:
        """Listen no more, and break off what is under way."""
        assert self._gateway is not None
        await self._gateway.stop(0.0)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        await self.start()
        try:
            yield
        finally:
            await self.stop()


async def _no_service(*_: Any) -> Any:
    raise AssertionError("these tests call no service")


@dataclass
class Moved:
    """What one stream of a site moved."""

    method: str
    first: dict[str, Any] = field(default_factory=dict)
    #: What the aggregator said it held, for a delivery.
    said: list[int] = field(default_factory=list)
    bytes: int = 0


class Counted(Connection):
    """A site's connection that counts what passes, and can do something in the midst of it."""

    def __init__(self, identity: Any) -> None:
        super().__init__(identity)
        self.moved: list[Moved] = []
        #: Awaited after each piece, with the stream's record and the call.
        self.meanwhile: Callable[[Moved, Any], Awaitable[None]] = _nothing

    def of(self, method: str) -> list[Moved]:
        return [one for one in self.moved if one.method == method]

    @contextlib.asynccontextmanager
    async def stream(self, method: str) -> AsyncIterator[Any]:
        async with super().stream(method) as call:
            moved = Moved(method)
            self.moved.append(moved)
            yield _CountedCall(self, call, moved)


async def _nothing(*_: Any) -> None:
    """Let it pass."""


class _CountedCall:
    def __init__(self, connection: Counted, call: Any, moved: Moved) -> None:
        self._connection, self._call, self._moved = connection, call, moved

    async def write(self, message: bytes) -> None:
        await self._call.write(message)
        if not self._moved.first:
            self._moved.first = json.loads(message)
        else:
            await self._count(message)

    async def read(self) -> Any:
        message = await self._call.read()
        if message is not grpc.aio.EOF and self._moved.method == SITE_FETCH:
            await self._count(message)
        elif message is not grpc.aio.EOF:
            self._moved.said.append(json.loads(message)["held"])
        return message

    async def done_writing(self) -> None:
        await self._call.done_writing()

    async def _count(self, message: bytes) -> None:
        self._moved.bytes += len(message)
        await self._connection.meanwhile(self._moved, self._call)


class Hospital:
    """A site's home, its connection, and its end of the streams."""

    def __init__(self, port: Port, folder: Path, authority: Authority, name: str = NAME) -> None:
        address = f"127.0.0.1:{port.port}"
        self.site = joined_site(folder / name, address=address, authority=authority, name=name)
        self.name = name
        self.home = self.site.home
        self.credentials: Credentials = self.site.identity.credentials()
        port.add(name, self.credentials.certificate, STUDY)
        self._port = port

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[SiteTransfers, Counted]]:
        connection = Counted(self.site.identity)
        transfers = SiteTransfers(self.home, connection)
        try:
            yield transfers, connection
        finally:
            await transfers.close()
            await connection.close()

    def store(self, content: bytes, round_index: int = 0) -> tuple[Reference, Path]:
        """Store an update, which the aggregator expects."""
        update = reference(content)
        path = self.home.releases / update.sha256
        path.write_bytes(content)
        self._port.files.expect(self.name, round_index, len(content))
        return update, path


async def fetched(
    transfers: SiteTransfers, model: Reference, require_fitting: Callable[[], None] = lambda: None
) -> None:
    """Fetch a model and wait for the end of it, good or bad."""
    transfers.fetch(STUDY, model, require_fitting)
    await transfers._tasks["fetch", STUDY, model.sha256]


async def raw(
    port: Port,
    credentials: Credentials,
    method: str,
    *said: bytes | dict[str, Any],
    done: bool = True,
) -> tuple[list[bytes], str]:
    """Say something on a stream by hand; return what was answered, and the code it ended with."""
    heard: list[bytes] = []
    messages = [canonical_json(one) if isinstance(one, dict) else one for one in said]
    async with grpc.aio.secure_channel(
        f"127.0.0.1:{port.port}", credentials.for_grpc(), options=CHANNEL_OPTIONS
    ) as channel:

        async def say() -> AsyncIterator[bytes]:
            for message in messages:
                yield message
            if not done:
                await asyncio.sleep(30)

        try:
            call = channel.stream_stream(method)(say(), timeout=20)
            while (message := await call.read()) is not grpc.aio.EOF:
                heard.append(message)
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            if ERROR_KEY not in trailing:
                return heard, error.code().name
            return heard, str(json.loads(trailing[ERROR_KEY])["code"])
    return heard, ""


def announced(update: Reference, study: str = STUDY) -> dict[str, Any]:
    """Return the first message of a delivery."""
    return {"study": study, "sha256": update.sha256, "bytes": update.bytes}


def deliver(
    transfers: SiteTransfers,
    update: Reference,
    path: Path,
    still: Callable[[], None] = lambda: None,
    seconds: float = 25.0,
) -> Awaitable[bool]:
    """Deliver an update of the study."""
    return transfers.deliver(STUDY, update, path, still, seconds)


async def _serve(folder: Path, number: int) -> None:
    async with Port(folder, number).open():
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2])))

__all__ = [
    "MIB",
    "NAME",
    "OTHER_STUDY",
    "SITE_DELIVER",
    "SITE_FETCH",
    "STUDY",
    "Counted",
    "Hospital",
    "Moved",
    "Port",
    "announced",
    "deliver",
    "fetched",
    "raw",
]
