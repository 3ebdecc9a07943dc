"""The gateway admits by certificate and register, and forwards a site's own calls alone."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from site_samples import member_credentials

from consilium_common.errors import ConsiliumError
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import SERVER_NAME, Role, describe, load_certificate
from consilium_common.identity.keys import new_tls_key, save_private
from consilium_common.processes import free_port
from consilium_common.wire.channel import CHANNEL_OPTIONS, Credentials
from consilium_common.wire.methods import (
    CHUNK_BYTES,
    ENROL,
    ERROR_KEY,
    HTTP_STATUS_KEY,
    SERVICE_ROLES,
    SITE_DELIVER,
    SITE_FETCH,
    SITE_HELLO,
    SITE_PROGRESS,
    STREAM_ROLES,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc
from consilium_server.fleet import Arrivals, FleetForwarder
from consilium_server.flower_private import public_key_header
from consilium_server.gateway import Gateway
from consilium_server.kicks import Kicks
from consilium_server.limits import Limits
from consilium_server.peers import Doorkeeper, Peer
from consilium_server.registry import Registry
from consilium_server.tables import InvitationRow, Member, now
from consilium_server.transfers import Line

NODE = 4711
#: All that a caller learns whose certificate is refused.
REFUSED = ("PERMISSION_DENIED", "identity.refused")


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
        self.limits = Limits()

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
            if request.get("slow"):
                await asyncio.sleep(0.3)
            return {"name": peer.name, "request": request}

        async def echo(peer: Peer, line: Line) -> None:
            if self.fails is not None:
                raise self.fails
            await line.write(peer.name.encode())
            while (message := await line.read()) is not None:
                await line.write(message)

        async def all_of_it() -> Any:
            fleet = FleetForwarder(
                "https://127.0.0.1:1", self.folder / "authority.pem", Kicks(self.folder / "kicks")
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
                dict.fromkeys(STREAM_ROLES, echo),
                limits=self.limits,
            )
            self.gateway = gateway
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

    async def stream(peer: Peer, line: Line) -> None:
        return None

    complete = dict.fromkeys(SERVICE_ROLES, service)
    streams = dict.fromkeys(STREAM_ROLES, stream)
    Gateway(door, fleet, arrivals, complete, streams)
    for services, lines in (
        ({k: v for k, v in complete.items() if k != ENROL}, streams),
        ({**complete, "/consilium.v1.Secret/Door": service}, streams),
        (complete, {SITE_FETCH: stream}),
        (complete, {**streams, "/consilium.v1.Secret/Door": stream}),
    ):
        with pytest.raises(ValueError, match="handler"):
            Gateway(door, fleet, arrivals, services, lines)


@pytest.mark.parametrize("role", [Role.SITE, Role.OPERATOR, Role.INVITATION])
def test_each_role_reaches_its_own_services_alone(house: House, role: Role) -> None:
    credentials = house.add(role)
    house.limits = Limits(enrolments_per_minute=600)

    async def scenario() -> None:
        for method, roles in SERVICE_ROLES.items():
            status, code, content = await house.call(credentials, method, b'{"x": 1}')
            if role in roles:
                assert (status, json.loads(content)["request"]) == ("OK", {"x": 1}), method
            else:
                assert (status, code) == REFUSED, method
        status, code, _ = await house.call(credentials, fleet_method("GetRun"))
        if role is not Role.SITE:
            assert (status, code) == REFUSED
        assert (await house.call(credentials, "/flwr.proto.Control/StartRun"))[0] == (
            "UNIMPLEMENTED"
        )

    house.run(scenario)


@pytest.mark.parametrize(
    "role", [Role.SERVER, Role.SIGNER, Role.PROPOSER, Role.WITNESS, Role.AUDITOR]
)
def test_certificates_of_other_roles_open_nothing(house: House, role: Role) -> None:
    credentials = member_credentials(house.authority, role, "north")
    status, code, _ = house.ask(credentials, SITE_HELLO)
    assert status in ("UNAVAILABLE", "PERMISSION_DENIED")
    assert code in ("", "identity.refused")


def test_a_member_that_is_unknown_revoked_or_replaced_is_refused_and_only_the_log_says_why(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    unknown = member_credentials(house.authority, Role.SITE, "nobody")
    revoked = house.add(name="gone", status="revoked")
    replaced = house.add(name="twice")
    house.add(name="twice")
    was_site = house.add(name="changed")
    with house.registry.transaction() as session:
        session.get_one(Member, "changed").role = Role.OPERATOR

    async def scenario() -> list[tuple[str, str, bytes]]:
        return [await house.call(c, SITE_HELLO) for c in (unknown, revoked, replaced, was_site)]

    assert [(status, code) for status, code, _ in house.run(scenario)] == [REFUSED] * 4
    for record, reason in zip(
        caplog.records, ("unknown", "revoked", "replaced", "unknown"), strict=True
    ):
        assert f"identity.{reason}" in record.getMessage()


def test_an_invitation_that_was_used_or_withdrawn_opens_nothing(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    used, withdrawn = house.add(Role.INVITATION, "a"), house.add(Role.INVITATION, "b")
    house.registry.spend_invitation(describe(load_certificate(used.certificate)).serial)
    with house.registry.transaction() as session:
        serial = describe(load_certificate(withdrawn.certificate)).serial
        session.delete(session.get_one(InvitationRow, serial))
    assert house.ask(used, ENROL)[:2] == REFUSED
    assert "identity.invitation-used" in caplog.text
    assert house.ask(withdrawn, ENROL)[:2] == REFUSED
    assert "identity.unknown" in caplog.text


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


# --- streams ------------------------------------------------------------------------------------


async def talk(house: House, credentials: Credentials, *said: bytes) -> list[Any]:
    """Hold a stream open, say something, and return each answer; the last is how it ended."""
    heard: list[Any] = []
    async with grpc.aio.secure_channel(
        f"127.0.0.1:{house.port}", credentials.for_grpc(), options=CHANNEL_OPTIONS
    ) as channel:
        call = channel.stream_stream(SITE_DELIVER)(timeout=20)
        try:
            heard.append(await call.read())
            for message in said:
                await call.write(message)
                heard.append(await call.read())
            await call.done_writing()
            heard.append(await call.read())
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            code = json.loads(trailing[ERROR_KEY])["code"] if ERROR_KEY in trailing else ""
            heard.append((error.code().name, code))
    return heard


def test_a_stream_passes_its_messages_one_by_one_and_ends_with_a_service_s_words(
    house: House,
) -> None:
    credentials = house.add()
    assert house.run(lambda: talk(house, credentials, b"a", b"b")) == [
        b"north",
        b"a",
        b"b",
        grpc.aio.EOF,
    ]
    house.fails = ConsiliumError("run.not-expected", "no")
    assert house.run(lambda: talk(house, credentials)) == [
        ("FAILED_PRECONDITION", "run.not-expected")
    ]


def test_a_piece_larger_than_a_piece_and_a_stream_that_stands_still_are_ended_by_name(
    house: House,
) -> None:
    credentials = house.add()
    most = bytes(CHUNK_BYTES)
    heard = house.run(lambda: talk(house, credentials, most, most + b"x"))
    assert heard[1:] == [most, ("RESOURCE_EXHAUSTED", "network.too-large")]
    house.limits = Limits(body_seconds=0.3)

    async def silent() -> Any:
        async with grpc.aio.secure_channel(
            f"127.0.0.1:{house.port}", credentials.for_grpc(), options=CHANNEL_OPTIONS
        ) as channel:
            call = channel.stream_stream(SITE_DELIVER)(timeout=20)
            await call.write(b"one")
            return [await call.read(), await call.read(), await call.read()]

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        house.run(silent)
    assert json.loads(dict(caught.value.trailing_metadata())[ERROR_KEY])["code"] == "network.slow"


def test_an_open_stream_ends_within_two_seconds_of_its_site_s_revocation(house: House) -> None:
    credentials = house.add()

    async def scenario() -> float:
        async with grpc.aio.secure_channel(
            f"127.0.0.1:{house.port}", credentials.for_grpc(), options=CHANNEL_OPTIONS
        ) as channel:
            call = channel.stream_stream(SITE_DELIVER)(timeout=20)
            assert await call.read() == b"north"
            with house.registry.transaction() as session:
                session.get_one(Member, "north").status = "revoked"
            began = asyncio.get_running_loop().time()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert json.loads(dict(caught.value.trailing_metadata())[ERROR_KEY])["code"] == (
                "identity.refused"
            )
            return asyncio.get_running_loop().time() - began

    assert house.run(scenario) < 2.0


def node_key(credentials: Credentials) -> str:
    return public_key_header(load_certificate(credentials.certificate).public_key())


def test_a_fleet_call_passes_with_its_bytes_and_flowers_status(house: House) -> None:
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
    from flwr.proto.node_pb2 import Node

    credentials = house.add()
    body = SendNodeHeartbeatRequest(node=Node(node_id=NODE)).SerializeToString()
    house.superlink = lambda _: (409, b"conflict")
    assert house.ask(
        credentials, fleet_method("SendNodeHeartbeat"), body, flwr_public_key=node_key(credentials)
    ) == ("OK", "409", b"conflict")
    assert house.forwarded == [("SendNodeHeartbeat", body)]


def test_a_site_may_ask_after_what_it_was_handed_itself_and_nothing_else(house: House) -> None:
    from flwr.proto import fab_pb2, message_pb2, run_pb2
    from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
    from flwr.proto.node_pb2 import Node

    credentials, node = house.add(), Node(node_id=NODE)
    handed = PullMessagesResponse(
        messages_list=[
            message_pb2.Message(metadata=message_pb2.Metadata(message_id="asked", run_id=9))
        ],
        message_object_trees=[
            message_pb2.ObjectTree(
                object_id="asked", children=[message_pb2.ObjectTree(object_id="settings")]
            )
        ],
    )

    async def asks(call: str, request: Any) -> str:
        body, key = request.SerializeToString(), node_key(credentials)
        said = await house.call(credentials, fleet_method(call), body, flwr_public_key=key)
        return " ".join(said[:2]).strip()

    async def about(run: int, name: str) -> list[str]:
        of_run = {"node": node, "run_id": run}
        confirm = message_pb2.ConfirmMessageReceivedRequest(**of_run, message_object_id=name)
        return [
            await asks("GetRun", run_pb2.GetRunRequest(**of_run)),
            await asks("GetFab", fab_pb2.GetFabRequest(**of_run)),
            await asks("PullObject", message_pb2.PullObjectRequest(**of_run, object_id=name)),
            await asks("ConfirmMessageReceived", confirm),
        ]

    refused = "FAILED_PRECONDITION run.not-expected"

    async def scenario() -> None:
        nonlocal credentials, node
        assert await about(9, "asked") == 4 * [refused]
        assert house.forwarded == []
        house.superlink = lambda call: (200, handed.SerializeToString() * (call == "PullMessages"))
        assert await asks("PullMessages", PullMessagesRequest(node=node)) == "OK"
        assert await about(9, "asked") == await about(9, "settings") == 4 * ["OK"]
        assert await about(9, "another site's") == ["OK", "OK", refused, refused]
        assert await about(8, "asked") == 4 * [refused]
        # What came to one site is nothing to another.
        credentials, node = house.add(name="south", node_id=NODE + 1), Node(node_id=NODE + 1)
        assert await about(9, "asked") == 4 * [refused]

    house.run(scenario)


def test_a_reply_that_names_another_node_as_its_own_never_reaches_flower(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.message_pb2 import Message, Metadata
    from flwr.proto.node_pb2 import Node

    credentials = house.add()
    method, key = fleet_method("PushMessages"), node_key(credentials)
    for named, expected in ((NODE, "OK"), (NODE + 1, "PERMISSION_DENIED")):
        reply = Message(metadata=Metadata(src_node_id=named))
        body = PushMessagesRequest(node=Node(node_id=NODE), messages_list=[reply])
        answer = house.ask(credentials, method, body.SerializeToString(), flwr_public_key=key)
        assert answer[0] == expected
    assert len(house.forwarded) == 1
    assert "identity.foreign-node" in caplog.text


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
        Kicks(house.folder / "kicks").kick([NODE])
        return await asyncio.wait_for(call, 10)

    async def scenario() -> None:
        assert await kicked(lambda: waiting.append(full)) == ("OK", "", full)
        waiting.clear()

        def revoke() -> None:
            with house.registry.transaction() as session:
                session.get_one(Member, "north").status = "revoked"

        assert (await kicked(revoke))[:2] == REFUSED

    house.run(scenario)


def presented(house: House, credentials: Credentials) -> str:
    """Return the serial number of the certificate that the port presents to a new caller."""
    context = ssl.create_default_context(cadata=credentials.authority.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", house.port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=SERVER_NAME) as stream,
    ):
        certificate = stream.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"]).lower().lstrip("0")


def certify_server(house: House, key: Any, authority: Authority | None = None) -> str:
    """Replace the server's certificate on disk and return its serial number."""
    server = (authority or house.authority).issue(key.public_key(), Role.SERVER, "aggregator")
    (house.folder / "server.pem").write_bytes(certificate_pem(server))
    return f"{server.serial_number:x}"


def test_a_new_server_certificate_is_presented_without_a_restart_and_calls_go_on(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = house.add()

    async def scenario() -> None:
        async with grpc.aio.secure_channel(
            f"127.0.0.1:{house.port}", credentials.for_grpc(), options=CHANNEL_OPTIONS
        ) as channel:
            hello = channel.unary_unary(SITE_HELLO)
            await hello(b"{}", timeout=10)
            first = await asyncio.to_thread(presented, house, credentials)
            key = new_tls_key()
            second = certify_server(house, key)
            # The certificate is there a moment before its key: the old pair stays in force.
            assert await asyncio.to_thread(presented, house, credentials) == first
            save_private(house.folder / "server-key.pem", key)
            assert await asyncio.to_thread(presented, house, credentials) == second != first
            await hello(b"{}", timeout=10)

    house.run(scenario)
    assert "goes on with its old certificate" in caplog.text


def test_a_bundle_that_changes_changes_who_may_connect(house: House) -> None:
    """A founding authority's successor is added to the bundle: its members get through TLS."""
    credentials = house.add()
    successor = house.authority.successor()
    renewed = member_credentials(successor, Role.SITE, "north")
    renewed = Credentials(credentials.authority, renewed.certificate, renewed.key)

    async def scenario() -> None:
        assert (await house.call(credentials, SITE_HELLO))[0] == "OK"
        assert (await house.call(renewed, SITE_HELLO))[0] == "UNAVAILABLE"
        bundle = [successor.certificate, house.authority.certificate]
        (house.folder / "authority.pem").write_bytes(b"".join(map(certificate_pem, bundle)))
        # Through TLS now; the register does not know it.
        assert (await house.call(renewed, SITE_HELLO))[:2] == REFUSED
        assert (await house.call(credentials, SITE_HELLO))[0] == "OK"

    house.run(scenario)


def test_a_server_without_readable_certificates_does_not_start(house: House) -> None:
    (house.folder / "server.pem").write_bytes(b"nonsense")

    async def scenario() -> None:
        raise AssertionError("it started")

    with pytest.raises(ConsiliumError) as caught:
        house.run(scenario)
    assert caught.value.code == "identity.bad-server"


def test_a_call_larger_than_its_kind_or_over_the_site_s_limit_is_refused_by_name(
    house: House,
) -> None:
    credentials = house.add()
    house.limits = Limits(calls=2, small_message_bytes=4096)
    large = b'{"x": "' + b"x" * 5000 + b'"}'

    async def scenario() -> None:
        assert (await house.call(credentials, SITE_HELLO, large))[:2] == (
            "RESOURCE_EXHAUSTED",
            "network.too-large",
        )
        answers = await asyncio.gather(
            *(house.call(credentials, SITE_HELLO, b"{}") for _ in range(3)),
            *(house.call(credentials, SITE_PROGRESS, b'{"slow": true}') for _ in range(4)),
        )
        assert {status for status, *_ in answers} == {"OK", "RESOURCE_EXHAUSTED"}
        assert {code for _, code, _ in answers} == {"", "network.too-many-calls"}

    house.run(scenario)


def test_nothing_is_described_by_reflection(house: House) -> None:
    credentials = house.add()
    for method in (
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Health/Check",
        "/grpc.channelz.v1.Channelz/GetServers",
    ):
        assert house.ask(credentials, method)[0] == "UNIMPLEMENTED"


def test_a_server_that_ended_by_itself_is_replaced_and_the_port_answers_again(house: House) -> None:
    credentials = house.add()

    async def scenario() -> None:
        assert (await house.call(credentials, SITE_HELLO, b"{}"))[0] == "OK"
        before = house.gateway._server
        assert before is not None
        await before.shutdown(None)
        end = time.monotonic() + 10
        while (await house.call(credentials, SITE_HELLO, b"{}"))[0] != "OK":
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        assert house.gateway._server is not before

    house.run(scenario)


def test_a_port_that_is_taken_is_one_clear_error(house: House) -> None:
    async def scenario() -> str:
        with pytest.raises(ConsiliumError) as caught:
            gateway = Gateway(
                Doorkeeper(house.authority.certificate, house.registry),
                FleetForwarder("https://127.0.0.1:1", house.folder / "authority.pem", Path("k")),
                Arrivals(house.folder),
                dict.fromkeys(SERVICE_ROLES, None),  # type: ignore[arg-type]
                dict.fromkeys(STREAM_ROLES, None),  # type: ignore[arg-type]
            )
            await gateway.start("127.0.0.1", house.port, house.folder)
        return caught.value.code

    assert house.run(scenario) == "state.port-in-use"


def test_a_reply_has_arrived_when_its_last_object_has(tmp_path: Path) -> None:
    from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
    from flwr.proto.message_pb2 import Message, Metadata, PushObjectRequest

    def reply(to: str) -> bytes:
        message = Message(metadata=Metadata(reply_to_message_id=to))
        return bytes(PushMessagesRequest(messages_list=[message]).SerializeToString())

    arrivals = Arrivals(tmp_path)
    there = tmp_path / str(NODE)
    announced = PushMessagesResponse(objects_to_push=["a", "b"]).SerializeToString()
    # One that came in part, and another in its place.
    arrivals.note(str(NODE), "PushMessages", reply("lost"), announced)
    arrivals.note(str(NODE), "PushMessages", reply("first"), announced)
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
    assert there.read_text() == "first\n"
    # One with nothing to send is there at once.
    nothing = PushMessagesResponse().SerializeToString()
    arrivals.note(str(NODE), "PushMessages", reply("second\nforged"), nothing)
    assert there.read_text() == "first\nsecondforged\n"
