"""Every method, asked by everybody, against the real port: as the table in TRUST.md says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
from aggregator_samples import Aggregator
from role_table import COLUMNS, is_current, written
from site_samples import member_credentials

from consilium_common.identity.authority import Authority
from consilium_common.identity.certificates import Role, describe, load_certificate
from consilium_common.wire.channel import Credentials, channel_target
from consilium_common.wire.methods import (
    ERROR_KEY,
    FLEET_PATHS,
    PRIVILEGED,
    SERVICE_ROLES,
    SITE_DELIVER,
    STREAM_ROLES,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc
from consilium_server import members
from consilium_server.flower_private import node_key_bytes, public_key_header
from consilium_server.limits import Limits

EVERY_METHOD = (*SERVICE_ROLES, *STREAM_ROLES, *map(fleet_method, FLEET_PATHS))


@pytest.fixture(scope="module")
def aggregator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aggregator]:
    from flwr.proto.fleet_pb2 import PullMessagesResponse
    from flwr.proto.message_pb2 import Message

    made = Aggregator(tmp_path_factory.mktemp("roles"))
    message = PullMessagesResponse(messages_list=[Message()]).SerializeToString()
    made.superlink = lambda call: message if call == "PullMessages" else b""
    made.limits = Limits(enrolments_per_minute=600)
    with made.open():
        yield made


@pytest.fixture(scope="module")
def callers(aggregator: Aggregator) -> dict[str, Credentials]:
    """One of each role that is in good standing, and of those that are not in the table."""
    found = {
        "site": aggregator.site("north"),
        "operator": aggregator.join("ada", Role.OPERATOR).credentials(),
        "auditor": aggregator.join("eve", Role.AUDITOR).credentials(),
    }
    invited = members.invite(aggregator.home, "west", timedelta(hours=1))
    found["invitation"] = Credentials(
        invited.authority_pem.encode(),
        invited.certificate_pem.encode(),
        invited.private_key_pem.encode(),
    )
    for role in (Role.SERVER, Role.SIGNER, Role.PROPOSER, Role.WITNESS):
        # In the name of a member, so that nothing but the role can be what is refused.
        found[f"{role} as a client"] = member_credentials(aggregator.authority, role, "north")
    other = member_credentials(Authority.create("others"), Role.SITE, "north")
    found["site of another consortium"] = replace(other, authority=invited.authority_pem.encode())
    return found


def test_the_table_in_the_page_is_that_of_the_code() -> None:
    assert is_current(), "run: python tests/unit/role_table.py"
    assert set(written()) == set(EVERY_METHOD)
    assert set(SERVICE_ROLES) >= PRIVILEGED
    # Nobody but these four roles opens anything.
    ours = {**SERVICE_ROLES, **STREAM_ROLES}
    assert all(roles <= set(COLUMNS) for roles in ours.values())


@pytest.mark.parametrize(
    "who",
    [
        "invitation",
        "site",
        "operator",
        "auditor",
        "server as a client",
        "signer as a client",
        "witness as a client",
        "site of another consortium",
    ],
)
def test_each_method_is_open_to_whom_the_table_says_and_to_nobody_else(
    aggregator: Aggregator, callers: dict[str, Credentials], who: str
) -> None:
    rows = written()
    credentials = callers[who]
    node = int(aggregator.member("north").node_id or 0)
    wrong = []
    target, options = channel_target(f"127.0.0.1:{aggregator.port}", None)
    with grpc.secure_channel(target, credentials.for_grpc(), options=options) as channel:
        for method in EVERY_METHOD:
            outcome = _call(channel, method, credentials, node)
            expected = who in rows[method]
            if (outcome == "open") is not expected:
                wrong.append((method, outcome))
    assert not wrong


def test_without_a_certificate_nothing_opens(
    aggregator: Aggregator, callers: dict[str, Credentials]
) -> None:
    target, options = channel_target(f"127.0.0.1:{aggregator.port}", None)
    nobody = grpc.ssl_channel_credentials(callers["site"].authority)
    with grpc.secure_channel(target, nobody, options=options) as channel:
        for method in (*list(SERVICE_ROLES)[:3], SITE_DELIVER, fleet_method("GetRun")):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method)(b"{}", timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_methods_that_are_in_no_table_do_not_exist(
    aggregator: Aggregator, callers: dict[str, Credentials]
) -> None:
    target, options = channel_target(f"127.0.0.1:{aggregator.port}", None)
    with grpc.secure_channel(target, callers["operator"].for_grpc(), options=options) as channel:
        for method in (
            "/flwr.proto.Control/StartRun",
            "/flwr.proto.ServerAppIo/PushMessages",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/consilium.v1.Operator/Delete",
        ):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method)(b"{}", timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def _call(channel: grpc.Channel, method: str, credentials: Credentials, node: int) -> str:
    """Call a method with nothing useful; return ``open``, or how it was refused."""
    key = describe(load_certificate(credentials.certificate)).public_key
    body, headers = b"{}", ()
    if method in map(fleet_method, FLEET_PATHS):
        body, headers = (
            _own_body(method, key, node),
            (("flwr-public-key", public_key_header(key)),),
        )
    try:
        if method in STREAM_ROLES:
            # A first message and no more; whoever is let in is told what is wrong with it.
            list(channel.stream_stream(method)(iter([body]), timeout=20))
        else:
            channel.unary_unary(method)(body, timeout=20, metadata=headers)
    except grpc.RpcError as error:
        trailing = dict(error.trailing_metadata() or ())
        if ERROR_KEY not in trailing:
            return f"closed in TLS: {error.code().name}"
        told = json.loads(trailing[ERROR_KEY])
        if told["code"] != "identity.refused":
            return "open"  # it was let in, and what it asked for made no sense
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        # One sentence for all: whoever is refused learns no reason.
        assert "role" not in told["message"]
        return "refused"
    return "open"


def _own_body(method: str, key: object, node: int) -> bytes:
    """A Fleet request in the caller's own name."""
    from flwr.proto import fleet_pb2

    call = method.rpartition("/")[2]
    own_key = node_key_bytes(key)  # type: ignore[arg-type]
    made = {
        "RegisterNode": fleet_pb2.RegisterNodeFleetRequest(public_key=own_key),
        "ActivateNode": fleet_pb2.ActivateNodeRequest(public_key=own_key),
        "DeactivateNode": fleet_pb2.DeactivateNodeRequest(node_id=node),
        "UnregisterNode": fleet_pb2.UnregisterNodeFleetRequest(node_id=node),
    }
    return made[call].SerializeToString() if call in made else b""
