"""The gateway admits by certificate and register, and forwards a site's own calls alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from site_samples import member_credentials

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import Role, describe, load_certificate
from consilium_common.identity.keys import new_tls_key, save_private
from consilium_common.processes import free_port
from consilium_common.wire.channel import CHANNEL_OPTIONS, Credentials
from consilium_common.wire.methods import (
    ENROL,
    ERROR_KEY,
    HTTP_STATUS_KEY,
    SERVICE_ROLES,
    SITE_HELLO,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc
from consilium_server.fleet import Arrivals, FleetForwarder
from consilium_server.flower_private import public_key_header
from consilium_server.gateway import Gateway
from consilium_server.peers import Doorkeeper, Peer
from consilium_server.registry import Registry
from consilium_server.tables import InvitationRow, Member, now

NODE = 4711


class House:
    """A gateway with a real port and register; the SuperLink behind it is told what to answer."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority.create("tests")
        self.folder = folder
        key = new_tls_key()
        save_private(folder / "server-key.pem", key)
        server = self.authority.issue(key.public_key(), Role.SERVER, "aggregator")
        (folder / "server.pem").write_bytes(certificate_pem(server))
        (folder / "authority.pem").write_bytes(certificate_pem(self.authority.certificate))
        self.registry = Registry(folder / "registry.db")
        self.port = free_port()
        self.superlink: Callable[[str], tuple[int, bytes]] = lambda _: (200, b"")
        self.forwarded: list[tuple[str, bytes]] = []
        self.fails: ConsiliumError | None = None

    def add(self, role: Role = Role.SITE, name: str = "north", **changes: object) -> Credentials:
        credentials = member_credentials(self.authority, role, name)
        certified = describe(load_certificate(credentials.certificate))
        with self.registry.transaction() as session:
            if role is Role.INVITATION:
                session.add(
                    InvitationRow(serial=certified.serial, name=name, role="site", expires=now())
                )
            else:
                values = {
                    "name": name,
                    "role": role,
                    "status": "active",
                    "serial": certified.serial,
                    "certificate_pem": credentials.certificate.decode(),
                    "signer_pem": "",
                    "node_id": str(NODE),
                    "joined_at": now(),
                }
                session.merge(Member(**{**values, **changes}))
        return credentials

    def run(self, scenario: Callable[[], Awaitable[Any]]) -> Any:
        """Open the port for one scenario."""

        async def service(peer: Peer, request: dict[str, Any]) -> Any:
            if self.fails is not None:
                raise self.fails
            return {"name": peer.name, "request": request}

        async def all_of_it() -> Any:
            fleet = FleetForwarder(
                "https://127.0.0.1:1", self.folder / "authority.pem", self.folder / "kick"
            )

            async def forward(call: str, body: bytes, headers: object) -> tuple[int, bytes]:
                self.forwarded.append((call, body))
                return self.superlink(call)

            fleet.forward = forward  # type: ignore[method-assign]
            (self.folder / "arrived").mkdir(exist_ok=True)
            gateway = Gateway(
                Doorkeeper(self.authority.certificate, self.registry),
                fleet,
                Arrivals(self.folder / "arrived"),
                dict.fromkeys(SERVICE_ROLES, service),
            )
            await gateway.start("127.0.0.1", self.port, self.folder)
            try:
                return await asyncio.wait_for(scenario(), 30)
            finally:
                await gateway.stop(0.1)
                await fleet.close()

        return asyncio.run(all_of_it())

    async def call(
        self, credentials: Credentials, method: str, body: bytes = b"{}", **headers: str
    ) -> tuple[str, str, bytes]:
        """Call a method; return gRPC's status, our error's code or HTTP status, and the body."""
        metadata = [(key.replace("_", "-"), value) for key, value in headers.items()]
        async with grpc.aio.secure_channel(
            f"127.0.0.1:{self.port}", credentials.for_grpc(), options=CHANNEL_OPTIONS
        ) as channel:
            invoke = channel.unary_unary(method)(body, timeout=20, metadata=metadata)
            try:
                content = await invoke
            except grpc.aio.AioRpcError as error:
                trailing = dict(error.trailing_metadata() or ())
                code = json.loads(trailing[ERROR_KEY])["code"] if ERROR_KEY in trailing else ""
                return error.code().name, code, b""
            trailing = dict(await invoke.trailing_metadata() or ())
            return "OK", trailing.get(HTTP_STATUS_KEY, ""), content

    def ask(
        self, credentials: Credentials, method: str, body: bytes = b"{}", **headers: str
    ) -> tuple[str, str, bytes]:
        """Open the port for one call."""
        return self.run(lambda: self.call(credentials, method, body, **headers))  # type: ignore[no-any-return]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_every_method_needs_exactly_one_handler(house: House) -> None:
    async def service(peer: Peer, request: dict[str, Any]) -> Any:
        return {}

    door = Doorkeeper(house.authority.certificate, house.registry)
    arrivals = Arrivals(house.folder)
    fleet = FleetForwarder("https://127.0.0.1:1", house.folder / "authority.pem", Path("kick"))
    complete = dict.fromkeys(SERVICE_ROLES, service)
    Gateway(door, fleet, arrivals, complete)
    for services in (
        {k: v for k, v in complete.items() if k != ENROL},
        {**complete, "/consilium.v1.Secret/Door": service},
    ):
        with pytest.raises(ValueError, match="handler"):
            Gateway(door, fleet, arrivals, services)


@pytest.mark.parametrize("role", [Role.SITE, Role.OPERATOR, Role.INVITATION])
def test_each_role_reaches_its_own_services_alone(house: House, role: Role) -> None:
    credentials = house.add(role)

    async def scenario() -> None:
        for method, roles in SERVICE_ROLES.items():
            status, code, content = await house.call(credentials, method, b'{"x": 1}')
            if role in roles:
                assert (status, json.loads(content)["request"]) == ("OK", {"x": 1}), method
            else:
                assert (status, code) == ("PERMISSION_DENIED", "identity.wrong-role"), method
        status, code, _ = await house.call(credentials, fleet_method("GetRun"))
        if role is not Role.SITE:
            assert (status, code) == ("PERMISSION_DENIED", "identity.wrong-role")
        assert (await house.call(credentials, "/flwr.proto.Control/StartRun"))[0] == (
            "UNIMPLEMENTED"
        )

    house.run(scenario)


@pytest.mark.parametrize("role", [Role.SERVER, Role.SIGNER, Role.WITNESS, Role.AUDITOR])
def test_certificates_of_other_roles_open_nothing(house: House, role: Role) -> None:
    credentials = member_credentials(house.authority, role, "north")
    status, code, _ = house.ask(credentials, SITE_HELLO)
    assert status in ("UNAVAILABLE", "PERMISSION_DENIED")
    assert code in ("", "identity.unknown", "identity.wrong-role")


def test_a_member_that_is_unknown_revoked_or_replaced_is_refused(house: House) -> None:
    unknown = member_credentials(house.authority, Role.SITE, "nobody")
    revoked = house.add(name="gone", status="revoked")
    replaced = house.add(name="twice")
    house.add(name="twice")
    was_site = house.add(name="changed")
    with house.registry.transaction() as session:
        session.get_one(Member, "changed").role = Role.OPERATOR

    async def scenario() -> list[tuple[str, str, bytes]]:
        return [await house.call(c, SITE_HELLO) for c in (unknown, revoked, replaced, was_site)]

    assert [(status, code) for status, code, _ in house.run(scenario)] == [
        ("PERMISSION_DENIED", "identity.unknown"),
        ("PERMISSION_DENIED", "identity.revoked"),
        ("PERMISSION_DENIED", "identity.replaced"),
        ("PERMISSION_DENIED", "identity.unknown"),
    ]


def test_an_invitation_that_was_used_or_withdrawn_opens_nothing(house: House) -> None:
    used, withdrawn = house.add(Role.INVITATION, "a"), house.add(Role.INVITATION, "b")
    house.registry.spend_invitation(describe(load_certificate(used.certificate)).serial)
    with house.registry.transaction() as session:
        serial = describe(load_certificate(withdrawn.certificate)).serial
        session.delete(session.get_one(InvitationRow, serial))
    assert house.ask(used, ENROL)[1] == "identity.invitation-used"
    assert house.ask(withdrawn, ENROL)[1] == "identity.unknown"


def test_a_service_s_error_travels_with_its_words(house: House) -> None:
    credentials = house.add()
    for code, status in (
        ("study.unknown", "FAILED_PRECONDITION"),
        ("identity.unknown", "PERMISSION_DENIED"),
        ("network.garbage", "UNAVAILABLE"),
        ("internal.flower", "INTERNAL"),
    ):
        house.fails = ConsiliumError(code, "what happened", where="here", hint="do this")
        assert house.ask(credentials, SITE_HELLO)[:2] == (status, code)


def node_key(credentials: Credentials) -> str:
    return public_key_header(load_certificate(credentials.certificate).public_key())


def test_a_fleet_call_passes_with_its_bytes_and_flowers_status(house: House) -> None:
    from flwr.proto.node_pb2 import Node
    from flwr.proto.run_pb2 import GetRunRequest

    credentials = house.add()
    body = GetRunRequest(node=Node(node_id=NODE), run_id=9).SerializeToString()
    house.superlink = lambda _: (409, b"conflict")
    assert house.ask(
        credentials, fleet_method("GetRun"), body, flwr_public_key=node_key(credentials)
    ) == ("OK", "409", b"conflict")
    assert house.forwarded == [("GetRun", body)]


def test_a_held_pull_returns_when_a_message_comes_and_ends_when_the_site_is_revoked(
    house: House,
) -> None:
    from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
    from flwr.proto.message_pb2 import Message
    from flwr.proto.node_pb2 import Node

    credentials = house.add()
    body = PullMessagesRequest(node=Node(node_id=NODE)).SerializeToString()
    full = PullMessagesResponse(messages_list=[Message()]).SerializeToString()
    waiting: list[bytes] = []
    house.superlink = lambda _: (200, waiting[0] if waiting else b"")
    method, key = fleet_method("PullMessages"), node_key(credentials)

    async def kicked(change: Callable[[], None]) -> tuple[str, str, bytes]:
        house.forwarded.clear()
        call = asyncio.create_task(house.call(credentials, method, body, flwr_public_key=key))
        while not house.forwarded:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.15)
        assert not call.done()
        change()
        (house.folder / "kick").touch()
        return await asyncio.wait_for(call, 10)

    async def scenario() -> None:
        assert await kicked(lambda: waiting.append(full)) == ("OK", "", full)
        waiting.clear()

        def revoke() -> None:
            with house.registry.transaction() as session:
                session.get_one(Member, "north").status = "revoked"

        assert (await kicked(revoke))[:2] == ("PERMISSION_DENIED", "identity.revoked")

    house.run(scenario)


def test_a_port_that_is_taken_is_one_clear_error(house: House) -> None:
    async def scenario() -> str:
        with pytest.raises(ConsiliumError) as caught:
            gateway = Gateway(
                Doorkeeper(house.authority.certificate, house.registry),
                FleetForwarder("https://127.0.0.1:1", house.folder / "authority.pem", Path("k")),
                Arrivals(house.folder),
                dict.fromkeys(SERVICE_ROLES, None),  # type: ignore[arg-type]
            )
            await gateway.start("127.0.0.1", house.port, house.folder)
        return caught.value.code

    assert house.run(scenario) == "state.port-in-use"


def test_a_reply_has_arrived_when_its_last_object_has(tmp_path: Path) -> None:
    from flwr.proto.fleet_pb2 import PushMessagesResponse
    from flwr.proto.message_pb2 import PushObjectRequest

    arrivals = Arrivals(tmp_path)
    there = tmp_path / str(NODE)
    announced = PushMessagesResponse(objects_to_push=["a", "b"]).SerializeToString()
    arrivals.note(str(NODE), "PushMessages", b"", announced)
    assert not there.exists()
    for name in ("a", "a", "c"):
        body = PushObjectRequest(object_id=name).SerializeToString()
        arrivals.note(str(NODE), "PushObject", body, b"")
        assert not there.exists()
    arrivals.note(str(NODE), "GetRun", b"", b"")
    assert not there.exists()
    arrivals.note(
        str(NODE), "PushObject", PushObjectRequest(object_id="b").SerializeToString(), b""
    )
    assert there.exists()
    # One with nothing to send is there at once.
    there.unlink()
    arrivals.note(str(NODE), "PushMessages", b"", PushMessagesResponse().SerializeToString())
    assert there.exists()
