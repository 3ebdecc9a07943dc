"""What we use of Flower's private interface is there, and means what we take it to mean.

A failure here says that the installed Flower release changed something under us. Do not loosen the
test: read the named module of Flower, then mend ``flower_private.py`` or ``flower_bundle.py``.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import inspect
import io
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flower_imports import FlowerImport, flower_imports

from consilium_client import flower_private as client_private
from consilium_client import flower_private_fleet as fleet
from consilium_common.flower_bundle import bundle, bundle_hash
from consilium_common.identity.keys import new_tls_key, openssh_pem
from consilium_common.wire.methods import (
    FLEET_HEADER_PREFIX,
    FLEET_PATHS,
    FLEET_SERVICE,
    PROTOBUF_MEDIA_TYPE,
)
from consilium_server import flower_private as server_private

PRIVATE = sorted({i for i in flower_imports() if i.private}, key=str)


@pytest.mark.parametrize("used", PRIVATE, ids=lambda used: f"{used.module}.{used.name}")
def test_every_private_name_exists(used: FlowerImport) -> None:
    module = importlib.import_module(used.module)
    if used.name and not hasattr(module, used.name):
        importlib.import_module(f"{used.module}.{used.name}")


# --- names, paths and constants ----------------------------------------------------------------


def test_the_fleet_calls_are_those_of_flowers_service() -> None:
    from flwr.proto import fleet_pb2

    service = fleet_pb2.DESCRIPTOR.services_by_name["Fleet"]
    assert service.full_name == FLEET_SERVICE
    assert {method.name for method in service.methods} == set(FLEET_PATHS)


def test_the_superlink_serves_the_fleet_calls_under_our_paths() -> None:
    from flwr.superlink.routers.fleet.router import router

    served = {(route.path, method) for route in router.routes for method in route.methods}
    assert served == {(f"/v1/fleet/{path}", "POST") for path in FLEET_PATHS.values()}


def test_the_gateway_parses_each_fleet_request_as_the_superlink_does() -> None:
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    node = {"node_id": 77}
    for call, path in FLEET_PATHS.items():
        kind = PROTOBUF_REQUEST_TYPES["POST", f"/v1/fleet/{path}"]
        if call in ("RegisterNode", "ActivateNode"):
            assert server_private.claimed_node(call, kind(public_key=b"k").SerializeToString()) == (
                b"k"
            )
        elif call in ("DeactivateNode", "UnregisterNode"):
            assert server_private.claimed_node(call, kind(**node).SerializeToString()) == 77
        else:
            assert server_private.claimed_node(call, kind(node=node).SerializeToString()) == 77
            assert server_private.claimed_node(call, b"") is None


def test_media_type_and_headers_of_node_authentication() -> None:
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.protobuf import constants

    assert constants.PROTOBUF_MEDIA_TYPE == PROTOBUF_MEDIA_TYPE
    # The gateway reads the key under this name.
    assert FLEET_HTTP_PUBLIC_KEY_HEADER == "flwr-public-key"
    for header in (TIMESTAMP_HEADER, FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER):
        assert header.startswith(FLEET_HEADER_PREFIX)


def test_the_words_of_a_crashed_task_are_those_the_egress_gate_lets_out() -> None:
    from flwr.supernode.nodestate.in_memory_nodestate import CLIENT_APP_CRASHED_ERROR

    assert CLIENT_APP_CRASHED_ERROR.reason == fleet.CRASHED_REASON


def test_equal_content_makes_equal_replies_and_a_messages_own_id_is_its_trees_root() -> None:
    from flwr.app import Metadata

    from consilium_common.wire.messages import MAX_FILE_BYTES, Reference, to_server

    metadata = Metadata(3, "m", 1, 2, "", "1", 1.9e9, 60.0, "train")
    asked = fleet.Asked("m", 3, "train", frozenset(), metadata)

    def made(update: Reference | None, figures: dict[str, float] | None) -> fleet.Outgoing:
        return fleet.outgoing(asked, 2, content=to_server(update, figures))

    for update, figures in (
        (None, None),
        (Reference("a" * 64, 10), None),
        (None, {"sum": 0.1 + 0.2}),
        (Reference("f" * 64, MAX_FILE_BYTES), {"loss": 1.0}),
    ):
        reply = made(update, figures)
        assert reply == made(update, figures)
        assert hashlib.sha256(reply.message).hexdigest() == reply.message_id
        request = fleet.read_request("PushMessages", reply.body)
        announced = fleet.announced_in(request)
        assert (
            announced.message_id == reply.message_id == request.messages_list[0].metadata.message_id
        )
        assert announced.is_of(reply)
        content = to_server(update, figures)
        assert content.object_id in reply.content_ids()
    assert not fleet.announced_in(
        fleet.read_request("PushMessages", made(None, {"sum": 1.0}).body)
    ).is_of(made(None, {"sum": 1.0 + 2**-52}))


@pytest.mark.usefixtures("task")
def test_all_that_a_supernode_says_of_our_largest_reply_fits_into_what_link_and_gateway_take() -> (
    None
):
    """And the largest message to it: models and updates go another way."""
    from flwr.app import Message
    from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

    from consilium_client.link import _LARGEST_CALL
    from consilium_common.wire.messages import MAX_FILE_BYTES, Reference, to_server
    from consilium_server.limits import Limits

    figures = {f"dice.{'c' * 60}{number}.total": 0.1 for number in range(200)}
    asked = Message(content=_content(), dst_node_id=1, message_type="train")
    asked.metadata.__dict__["_message_id"] = asked.object_id
    largest = to_server(Reference("f" * 64, MAX_FILE_BYTES), figures)
    reply = Message(content=largest, reply_to=asked)
    for message, kind in ((reply, PushMessagesRequest), (asked, PullMessagesResponse)):
        outline = kind(message_object_trees=[get_object_tree(message)])
        sizes = [len(one.deflate()) for one in get_all_nested_objects(message).values()]
        assert max(outline.ByteSize(), *sizes) + 64 * 1024 < _LARGEST_CALL
        assert Limits().small_message_bytes >= _LARGEST_CALL
        # A site may send each reply a few times over, as after a broken line.
        assert 4 * (outline.ByteSize() + sum(sizes)) < Limits().reply_bytes


def test_a_supernode_waits_longer_for_an_answer_than_the_gateway_holds_a_pull() -> None:
    from flwr.supercore.protobuf import client

    from consilium_client.link import _CALL_SECONDS
    from consilium_server.fleet import HOLD_SECONDS

    timeouts = [
        inspect.signature(found).parameters["timeout"].default
        for found in vars(client).values()
        if inspect.isclass(found)
        and found.__module__ == client.__name__
        and "timeout" in inspect.signature(found).parameters
    ]
    assert len(timeouts) == 1
    assert HOLD_SECONDS < _CALL_SECONDS < timeouts[0]


# --- signatures and behaviour ------------------------------------------------------------------


def takes(function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Assert that a function can be called so."""
    inspect.signature(function).bind(*arguments, **named)


def test_clients_are_made_as_we_make_them() -> None:
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.superlink.grid import HttpGrid

    takes(
        ControlHttpClient.from_server_address,
        "127.0.0.1:1",
        insecure=False,
        root_certificates="path",
        interceptors=[],
    )
    for call in ("RegisterNode", "UnregisterNode", "ListNodes", "StartRun", "StopRun"):
        assert callable(getattr(ControlHttpClient, call))
    takes(
        RuntimeHttpClient.from_server_address,
        server_address="127.0.0.1:1",
        insecure=True,
        root_certificates=None,
        interceptors=[],
        retry_invoker=make_simple_http_retry_invoker(),
    )
    for call in ("AcquireTask", "PullTaskInput", "PushTaskOutput", "PushMessages", "PullMessages"):
        assert callable(getattr(RuntimeHttpClient, call))
    takes(RuntimeVersionHttpInterceptor, component_name="x")
    takes(RuntimeTokenHttpInterceptor, "token")
    takes(
        SuperExecAuthHttpInterceptor,
        master_secret=b"s",
        protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
    )
    takes(HttpGrid, "127.0.0.1:1", insecure=False, root_certificates=b"pem", token="t")
    grid = HttpGrid("127.0.0.1:1", insecure=True, token="t")
    assert isinstance(grid._runtime_client, RuntimeHttpClient)
    grid.close()


def test_task_functions_are_called_as_flower_calls_them() -> None:
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supernode.runtime.run_clientapp import (
        pull_task_input,
        push_message,
        push_task_output,
    )

    takes(pull_task_input, "client")
    takes(push_message, "client", "reply", "context")
    takes(push_task_output, "client", None, "status", "details")
    takes(HeartbeatSender, make_task_heartbeat_fn_http("client"))  # type: ignore[arg-type]


def test_a_tasks_message_is_pulled_through_the_two_calls_that_we_wrap() -> None:
    from flwr.supercore.inflatable import inflatable_protobuf_utils
    from flwr.supernode.runtime.run_clientapp import pull_task_input

    source = inspect.getsource(pull_task_input)
    assert "client.PullMessages(" in source
    assert "make_pull_object_fn_protobuf(client.PullObject" in source
    assert "pull_msg_res.message_object_trees[0]" in source
    wrapped = inspect.getsource(inflatable_protobuf_utils.make_pull_object_fn_protobuf)
    assert "response.object_found" in wrapped
    assert "response.object_available" in wrapped


def test_a_task_is_acquired_by_the_method_whose_secret_is_checked() -> None:
    from flwr.supercore.runtime import runtime_http_client

    assert "/flwr.proto.Runtime/AcquireTask" in inspect.getsource(runtime_http_client)


def test_a_grid_sends_and_receives_as_the_round_loop_does() -> None:
    from flwr.serverapp import Grid

    takes(Grid.push_messages, None, [])
    takes(Grid.pull_messages, None, ["id"])
    takes(Grid.get_node_ids, None)


@pytest.mark.parametrize("side", ["superlink", "supernode"])
def test_flowers_own_parser_takes_our_command_line(
    side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = tmp_path / "file.pem"
    if side == "superlink":
        module = importlib.import_module("flwr.superlink.cli.flower_superlink")
        parser = module._parse_args_run_superlink()
        command = server_private.superlink_command(port=1, certificate=pem, key=pem, secret=pem)
    else:
        module = importlib.import_module("flwr.supernode.cli.flower_supernode")
        parser = module._parse_args_run_supernode()
        command = client_private.supernode_command(
            link_port=1, link_certificate=pem, runtime_port=2, key=pem, secret=pem
        )
    assert Path(command[0]).is_file()
    parsed = parser.parse_args(command[1:])
    assert parsed.host == "127.0.0.1"
    assert parsed.isolation == "process"
    assert str(parsed.superexec_auth_secret_file) == str(pem)
    if side == "superlink":
        assert parsed.enable_supernode_auth is True
        assert not getattr(parsed, "insecure", False)
        assert parsed.runtime_dependency_install is False
    else:
        assert str(parsed.auth_supernode_private_key) == str(pem)
        assert parsed.superlink == "127.0.0.1:1"


def test_a_supernode_reads_our_key_file_and_has_our_nodes_key(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    key = new_tls_key()
    loaded = load_ssh_private_key(openssh_pem(key), None)
    assert loaded.private_numbers() == key.private_numbers()  # type: ignore[union-attr]

    headers = dict(fleet.node_headers(key))
    public = base64.b64decode(headers["flwr-public-key"])
    assert public == server_private.node_key_bytes(key.public_key())
    assert headers["flwr-public-key"] == server_private.public_key_header(key.public_key())
    signature = base64.b64decode(headers["flwr-signature"])
    moment = headers["flwr-timestamp"].encode("ascii")
    assert verify_signature(bytes_to_public_key(public), moment, signature)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower reads the run of a new message from the task of the process."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        assert hasattr(TaskIdentity, name)
        monkeypatch.setattr(TaskIdentity, name, 3)


@pytest.mark.usefixtures("task")
def test_an_object_is_named_by_the_sha256_of_its_content() -> None:
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
    )

    message = Message(content=_content(), dst_node_id=1, message_type="train")
    objects = get_all_nested_objects(message)
    assert {tree.object_id for tree in iterate_object_tree(get_object_tree(message))} == set(
        objects
    )
    for object_id, found in objects.items():
        assert hashlib.sha256(found.deflate()).hexdigest() == object_id
    # Its own id is in the metadata of a reply before it is pushed.
    message.metadata.__dict__["_message_id"] = message.object_id
    assert message.metadata.message_id == message.object_id


@pytest.mark.usefixtures("task")
def test_a_reply_is_announced_and_pushed_as_the_link_reads_it() -> None:
    from flwr.app import Error, Message
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.supercore.inflatable.inflatable_object import get_object_tree

    asked = Message(content=_content(), dst_node_id=1, message_type="train")
    asked.metadata.__dict__["_message_id"] = asked.object_id
    for reply, error in (
        (Message(content=_content(), reply_to=asked), None),
        (Message(Error(code=7, reason="words"), reply_to=asked), (7, "words")),
    ):
        reply.metadata.__dict__["_message_id"] = reply.object_id
        body = PushMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[get_object_tree(reply)],
            clientapp_runtime_list=[12.5],
        ).SerializeToString()
        announced = fleet.announced_in(fleet.read_request("PushMessages", body))
        assert announced.error == error
        assert announced.message_id == reply.object_id
        assert announced.reply_to == asked.object_id
        assert announced.children == tuple(get_object_tree(reply).children)


def test_a_held_pull_sees_whether_a_message_came() -> None:
    from flwr.proto.fleet_pb2 import PullMessagesResponse
    from flwr.proto.message_pb2 import Message

    assert not server_private.has_message(PullMessagesResponse().SerializeToString())
    full = PullMessagesResponse(messages_list=[Message()])
    assert server_private.has_message(full.SerializeToString())


def _content() -> Any:
    from consilium_common.wire.messages import Instructions, Reference, to_site

    return to_site(Instructions("d" * 64, 0, 5, model=Reference("a" * 64, 9)))


# --- the bundle --------------------------------------------------------------------------------


def test_the_bundle_is_small_carries_no_code_and_is_the_same_every_time() -> None:
    content = bundle()
    assert len(content) < 2048
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith((".py", ".so", ".pyc", ".pkl"))]
    bundle.cache_clear()
    assert bundle() == content
    assert bundle_hash() == hashlib.sha256(content).hexdigest()


def test_the_bundle_hash_is_the_same_in_another_process() -> None:
    import subprocess

    program = "from consilium_common.flower_bundle import bundle_hash; print(bundle_hash())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == bundle_hash()


def test_flower_takes_the_bundle_and_finds_our_components() -> None:
    from flwr.cli.config_utils import get_fab_config

    config = get_fab_config(bundle())
    components = config["tool"]["flwr"]["app"]["components"]
    assert components == {
        "serverapp": "consilium_server.app:app",
        "clientapp": "consilium_client.app:app",
    }
    for reference in components.values():
        module, _, name = reference.partition(":")
        assert hasattr(importlib.import_module(module), name)
