"""The aggregator's one port answers its members, for what their role permits, and nobody else."""

from __future__ import annotations

import importlib
import json
import pkgutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from federation import Federation
from google.protobuf.message import Message

from consilium_client.flower_private_fleet import node_headers
from consilium_common.demo.hospitals import NAMES
from consilium_common.identity.authority import Authority, certificate_pem
from consilium_common.identity.certificates import SERVER_NAME, Role
from consilium_common.identity.keys import load_tls_key, new_tls_key, private_pem, save_private
from consilium_common.wire.channel import CHANNEL_OPTIONS, Credentials
from consilium_common.wire.methods import (
    ERROR_KEY,
    FLEET_PATHS,
    FLEET_SERVICE,
    SERVICE_ROLES,
    SITE_HELLO,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc

SITE, OTHER = NAMES[0], NAMES[1]
#: All that a refused certificate learns; the aggregator's log says more.
REFUSED = (grpc.StatusCode.PERMISSION_DENIED, "identity.refused")
#: What an HTTP/2 client says first; an HTTP/2 server answers with its settings.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def identity_folder(federation: Federation, name: str) -> Path:
    return federation.sites[name].home / "identity"


@pytest.fixture
def channel(federation: Federation) -> Iterator[grpc.Channel]:
    """A connection with a site's own, valid certificate."""
    folder = identity_folder(federation, SITE)
    credentials = Credentials(
        (folder / "authority.pem").read_bytes(),
        (folder / "site.pem").read_bytes(),
        (folder / "site-key.pem").read_bytes(),
    )
    with grpc.secure_channel(
        federation.address, credentials.for_grpc(), options=CHANNEL_OPTIONS
    ) as opened:
        yield opened


def status_of(
    channel: grpc.Channel,
    method: str,
    body: bytes = b"",
    metadata: list[tuple[str, str]] | None = None,
) -> tuple[grpc.StatusCode, str]:
    """Call a method by its name; return gRPC's status and our error's code."""
    try:
        channel.unary_unary(method)(body, timeout=10, metadata=metadata)
    except grpc.RpcError as error:
        trailing = dict(error.trailing_metadata() or ())
        code = json.loads(trailing[ERROR_KEY])["code"] if ERROR_KEY in trailing else ""
        return error.code(), code
    return grpc.StatusCode.OK, ""


def flower_methods() -> list[str]:
    """Return every service method that Flower declares, other than the Fleet calls."""
    import flwr.proto

    methods = []
    for module in pkgutil.iter_modules(flwr.proto.__path__):
        described = getattr(
            importlib.import_module(f"flwr.proto.{module.name}"), "DESCRIPTOR", None
        )
        for service in described.services_by_name.values() if described else ():
            if service.full_name != FLEET_SERVICE:
                methods += [f"/{service.full_name}/{method.name}" for method in service.methods]
    return methods


def flower_paths() -> list[str]:
    """Return every HTTP path of the SuperLink's Control, Runtime and Fleet APIs."""
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    return [path for _, path in PROTOBUF_REQUEST_TYPES]


def test_a_site_reaches_no_flower_service_but_the_fleet_calls(channel: grpc.Channel) -> None:
    methods = flower_methods()
    assert any(method.startswith("/flwr.proto.Control/") for method in methods)
    # Those that speak HTTP alone have no service of that name; asked for all the same.
    methods += [
        f"/flwr.proto.Runtime/{name}"
        for name in ("AcquireTask", "PullTaskInput", "PushTaskOutput", "PushMessages", "GetNodes")
    ]
    methods += [f"/{FLEET_SERVICE}/{name}" for name in ("ListNodes", "registernode", "")]
    methods += [
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Health/Check",
        "/grpc.channelz.v1.Channelz/GetServers",
    ]
    reached = [m for m in methods if status_of(channel, m)[0] != grpc.StatusCode.UNIMPLEMENTED]
    assert reached == []


def test_a_site_reaches_no_http_path_of_the_superlink(
    federation: Federation, channel: grpc.Channel
) -> None:
    paths = flower_paths()
    assert {path.split("/")[2] for path in paths} >= {"control", "runtime", "fleet"}
    reached = [p for p in paths if status_of(channel, p)[0] != grpc.StatusCode.UNIMPLEMENTED]
    assert reached == []
    # And as HTTP/1.1 over the same mutual TLS: the port speaks HTTP/2 alone.
    with httpx.Client(verify=client_context(federation), trust_env=False) as client:
        for path in ("/v1/control/list-nodes", "/v1/runtime/acquire-task", "/"):
            with pytest.raises(httpx.TransportError):
                client.post(
                    f"https://{federation.address}{path}",
                    content=b"",
                    extensions={"sni_hostname": SERVER_NAME},
                )


def test_a_site_may_call_its_own_services_and_no_other_roles(channel: grpc.Channel) -> None:
    for method, roles in SERVICE_ROLES.items():
        if Role.SITE not in roles:
            assert status_of(channel, method, b"{}") == REFUSED, method
    assert status_of(channel, "/consilium.v1.Site/Studies", b"{}")[0] == grpc.StatusCode.OK


def test_garbage_is_answered_with_one_error(channel: grpc.Channel) -> None:
    for body in (b"", b"[]", b"\xff\xfe", b"{", b'{"session": 3, "version": "1"}'):
        assert status_of(channel, SITE_HELLO, body) == (
            grpc.StatusCode.UNAVAILABLE,
            "network.garbage",
        ), body


def fleet_requests(node_id: int, key: bytes) -> dict[str, Message]:
    """Return a request of every Fleet call in the name of a node."""
    from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, node_pb2, run_pb2

    node = node_pb2.Node(node_id=node_id)
    return {
        "RegisterNode": fleet_pb2.RegisterNodeFleetRequest(public_key=key),
        "ActivateNode": fleet_pb2.ActivateNodeRequest(public_key=key, heartbeat_interval=30),
        "DeactivateNode": fleet_pb2.DeactivateNodeRequest(node_id=node_id),
        "UnregisterNode": fleet_pb2.UnregisterNodeFleetRequest(node_id=node_id),
        "SendNodeHeartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(
            node=node, heartbeat_interval=30
        ),
        "PullMessages": fleet_pb2.PullMessagesRequest(node=node),
        "PushMessages": fleet_pb2.PushMessagesRequest(node=node),
        "GetRun": run_pb2.GetRunRequest(node=node, run_id=1),
        "GetFab": fab_pb2.GetFabRequest(node=node, run_id=1),
        "PushObject": message_pb2.PushObjectRequest(node=node, run_id=1, object_id="0" * 64),
        "PullObject": message_pb2.PullObjectRequest(node=node, run_id=1, object_id="0" * 64),
        "ConfirmMessageReceived": message_pb2.ConfirmMessageReceivedRequest(
            node=node, run_id=1, message_object_id="0" * 64
        ),
    }


def node_of(federation: Federation, name: str) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return a site's node id, the headers that prove its key, and the key."""
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key = load_tls_key(identity_folder(federation, name) / "site-key.pem")
    node = json.loads((federation.sites[name].home / "run" / "node.json").read_text())
    return node["node_id"], node_headers(key), public_key_to_bytes(key.public_key())


def test_a_site_speaks_for_no_other_node(federation: Federation, channel: grpc.Channel) -> None:
    own_id, own_headers, own_key = node_of(federation, SITE)
    other_id, other_headers, other_key = node_of(federation, OTHER)
    own, foreign = fleet_requests(own_id, own_key), fleet_requests(other_id, other_key)
    assert set(own) == set(FLEET_PATHS)
    for call in FLEET_PATHS:
        method = fleet_method(call)
        foreign_body = foreign[call].SerializeToString()
        own_body = own[call].SerializeToString()
        # Another's node under our key, another's key (a stolen header) for either, and no key.
        assert status_of(channel, method, foreign_body, own_headers) == REFUSED, call
        assert status_of(channel, method, foreign_body, other_headers) == REFUSED, call
        assert status_of(channel, method, own_body, other_headers) == REFUSED, call
        assert status_of(channel, method, own_body) == REFUSED, call
    # The control: the same call in our own name is forwarded.
    heartbeat = own["SendNodeHeartbeat"].SerializeToString()
    assert status_of(channel, fleet_method("SendNodeHeartbeat"), heartbeat, own_headers) == (
        grpc.StatusCode.OK,
        "",
    )


def test_a_fleet_call_with_a_body_that_is_none_is_refused(
    federation: Federation, channel: grpc.Channel
) -> None:
    _, headers, _ = node_of(federation, SITE)
    for call in FLEET_PATHS:
        assert status_of(channel, fleet_method(call), b"\xff\xff\xff", headers) == (
            grpc.StatusCode.UNAVAILABLE,
            "network.garbage",
        ), call


# --- below gRPC: the handshake -----------------------------------------------------------------


def client_context(
    federation: Federation, *, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Return a TLS client with a site's certificate, or another one."""
    folder = identity_folder(federation, SITE)
    context = ssl.create_default_context(cafile=str(folder / "authority.pem"))
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(certificate or folder / "site.pem", key or folder / "site-key.pem")
    return context


def answered(federation: Federation, context: ssl.SSLContext | None) -> bytes:
    """Connect, speak HTTP/2, and return what is answered; nothing where it was refused."""
    with socket.create_connection(("127.0.0.1", federation.port), timeout=10) as raw:
        if context is None:
            raw.sendall(PREFACE)
            try:
                return raw.recv(64)
            except ConnectionError:
                return b""
        try:
            with context.wrap_socket(raw, server_hostname=SERVER_NAME) as secured:
                # In TLS 1.3 the client is done first: it learns of a refusal when it reads.
                secured.sendall(PREFACE)
                return secured.recv(64)
        except (ssl.SSLError, ConnectionError):
            return b""


def test_a_member_is_answered(federation: Federation) -> None:
    assert answered(federation, client_context(federation)) != b""


def test_plain_tls_without_a_client_certificate_is_refused_at_the_handshake(
    federation: Federation,
) -> None:
    authority = identity_folder(federation, SITE) / "authority.pem"
    context = ssl.create_default_context(cafile=str(authority))
    context.set_alpn_protocols(["h2"])
    assert answered(federation, context) == b""


def test_tls_below_1_3_is_refused_even_with_a_valid_certificate(federation: Federation) -> None:
    context = client_context(federation)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert answered(federation, context) == b""
    with (
        socket.create_connection(("127.0.0.1", federation.port), timeout=10) as raw,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(raw, server_hostname=SERVER_NAME)


def test_clear_text_is_not_answered(federation: Federation) -> None:
    assert answered(federation, None) == b""
    with grpc.insecure_channel(federation.address) as channel:
        assert status_of(channel, SITE_HELLO, b"{}")[0] == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("role", [Role.SITE, Role.OPERATOR])
def test_a_certificate_of_another_consortium_is_refused_at_the_handshake(
    federation: Federation, tmp_path: Path, role: Role
) -> None:
    foreign = Authority.create("elsewhere")
    key = new_tls_key()
    certificate = foreign.issue(key.public_key(), role, SITE)
    save_private(tmp_path / "key.pem", key)
    (tmp_path / "certificate.pem").write_bytes(certificate_pem(certificate))
    context = client_context(
        federation, certificate=tmp_path / "certificate.pem", key=tmp_path / "key.pem"
    )
    assert answered(federation, context) == b""


def test_a_certificate_of_the_authority_that_is_in_no_register_is_refused(
    federation: Federation,
) -> None:
    # Whoever can sign, but not write the register, is no member by that alone.
    authority = Authority.load(federation.home / "identity")
    key = new_tls_key()
    for name in ("nobody", SITE):
        certificate = authority.issue(key.public_key(), Role.SITE, name)
        credentials = Credentials(
            certificate_pem(authority.certificate), certificate_pem(certificate), private_pem(key)
        )
        with grpc.secure_channel(
            federation.address, credentials.for_grpc(), options=CHANNEL_OPTIONS
        ) as channel:
            assert status_of(channel, SITE_HELLO, b"{}") == REFUSED


def test_all_other_ports_listen_on_loopback_alone(federation: Federation) -> None:
    assert federation.running is not None
    ours = set(federation.running.processes())
    for site in federation.sites.values():
        if site.running is not None:
            ours |= set(site.running.processes())
    listening = {entry for pid in ours for entry in _listening(pid)}
    assert ("127.0.0.1", federation.port) in listening
    assert [entry for entry in sorted(listening) if entry[0] != "127.0.0.1"] == []


def _listening(pid: int) -> Iterator[tuple[str, int]]:
    """Yield address and port of every TCP socket that a process listens on."""
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            own.add(target[8:-1])
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != "0A" or fields[9] not in own:
                continue
            address, _, port = fields[1].partition(":")
            raw = bytes.fromhex(address)
            words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
            # gRPC listens on IPv4 through an IPv6 socket: ::ffff:127.0.0.1.
            words = words.removeprefix(bytes(10) + b"\xff\xff")
            family = socket.AF_INET if len(words) == 4 else socket.AF_INET6
            yield socket.inet_ntop(family, words), int(port, 16)
