"""Everything of Flower's private interface that the aggregator touches, and nothing else.

A contract test (`tests/unit/test_flower_contract.py`) fails loudly when a Flower release changes
what is used here.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from consilium_common.errors import ConsiliumError
from consilium_common.flower_bundle import bundle, bundle_hash

FEDERATION = ""  # the open edition's default federation


def superlink_command(*, port: int, certificate: Path, key: Path, secret: Path) -> list[str]:
    """Return the command of an unmodified SuperLink that listens on 127.0.0.1 alone.

    Its state stays in memory: what must survive is in our registry and checkpoints, no model is
    left behind in a database, and a call costs a fifth of what it does with SQLite.
    """
    program = shutil.which("flower-superlink", path=str(Path(sys.executable).parent))
    if program is None:
        raise ConsiliumError("internal.installation", "flower-superlink is not installed.")
    return [
        program,
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
        *("--ssl-ca-certfile", str(certificate)),
        *("--isolation", "process"),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--superexec-auth-secret-file", str(secret)),
    ]


class Control:
    """The SuperLink's Control API, over loopback."""

    def __init__(self, address: str, certificate: Path) -> None:
        from flwr.supercore.control.control_http_client import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        self._client = ControlHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=str(certificate),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="consilium")],
        )

    def register_node(self, public_key_pem: bytes, name: str) -> int:
        """Let the holder of this EC key activate as a node; returns the node id.

        A key that is registered already keeps its node id.
        """
        import httpx
        from flwr.proto.control_pb2 import RegisterNodeRequest

        try:
            response = self._client.RegisterNode(
                RegisterNodeRequest(public_key=public_key_pem, name=name)
            )
            return int(response.node_id)
        except httpx.HTTPStatusError as error:
            node_id = self.node_id(public_key_pem)
            if node_id is None:
                raise ConsiliumError(
                    "internal.flower", "The SuperLink refused to register a site's key."
                ) from error
            return node_id

    def node_id(self, public_key_pem: bytes) -> int | None:
        """Return the node id of a registered key, None for an unknown one."""
        from flwr.proto.control_pb2 import ListNodesRequest

        for node in self._client.ListNodes(ListNodesRequest()).nodes_info:
            if node.public_key == public_key_pem and node.status != "unregistered":
                return int(node.node_id)
        return None

    def unregister_node(self, node_id: int) -> None:
        """Forget a node, so that its key can activate no more."""
        import httpx
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        try:
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
        except httpx.HTTPStatusError:
            return  # it is not registered: what was asked for holds

    def start_run(self, digest: str) -> int:
        """Start a Flower run of our own bundle for the study; returns Flower's run id."""
        from flwr.common.serde import user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.fab_pb2 import Fab

        response = self._client.StartRun(
            StartRunRequest(
                fab=Fab(hash_str=bundle_hash(), content=bundle()),
                override_config=user_config_to_proto({"study": digest}),
                federation=FEDERATION,
            )
        )
        return int(response.run_id)

    def stop_run(self, run_id: int) -> None:
        """Stop a Flower run; a run that has ended already stays as it is."""
        import httpx
        from flwr.proto.control_pb2 import StopRunRequest

        try:
            self._client.StopRun(StopRunRequest(run_id=run_id))
        except httpx.HTTPStatusError:
            return

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def node_key_bytes(public_key: Any) -> bytes:
    """Return an EC public key in the form in which Flower stores it."""
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    content: bytes = public_key_to_bytes(public_key)
    return content


def public_key_header(public_key: Any) -> str:
    """Return the header value in which a SuperNode names its key."""
    import base64

    return base64.b64encode(node_key_bytes(public_key)).decode("ascii")


def has_message(content: bytes) -> bool:
    """Return whether a PullMessages response carries a message."""
    from flwr.proto.fleet_pb2 import PullMessagesResponse

    return bool(PullMessagesResponse.FromString(content).messages_list)


def messages_in(content: bytes) -> list[tuple[str, int, frozenset[str]]]:
    """Return of each message in a PullMessages response its id, its run and its objects' ids."""
    from flwr.proto.fleet_pb2 import PullMessagesResponse

    found = PullMessagesResponse.FromString(content)
    named: set[str] = set()
    pending = list(found.message_object_trees)
    while pending:
        tree = pending.pop()
        named.add(tree.object_id)
        pending.extend(tree.children)
    return [
        (one.metadata.message_id, one.metadata.run_id, frozenset(named))
        for one in found.messages_list
    ]


def asked_after(call: str, body: bytes) -> tuple[int, str | None]:
    """Return the run that a Fleet request names, and the object where it names one.

    ``call`` is GetRun, GetFab, PullObject or ConfirmMessageReceived, and the body a request of it.
    """
    from flwr.proto import fab_pb2, message_pb2, run_pb2

    if call == "PullObject":
        pull = message_pb2.PullObjectRequest.FromString(body)
        return pull.run_id, pull.object_id
    if call == "ConfirmMessageReceived":
        confirmed = message_pb2.ConfirmMessageReceivedRequest.FromString(body)
        return confirmed.run_id, confirmed.message_object_id
    kind = run_pb2.GetRunRequest if call == "GetRun" else fab_pb2.GetFabRequest
    return kind.FromString(body).run_id, None


def objects_to_push(response: bytes) -> list[str]:
    """Return the ids of the objects that a PushMessages response asks for."""
    from flwr.proto.fleet_pb2 import PushMessagesResponse

    return list(PushMessagesResponse.FromString(response).objects_to_push)


def replied_to(body: bytes) -> str:
    """Return the id of the message that a PushMessages request replies to."""
    from flwr.proto.fleet_pb2 import PushMessagesRequest

    messages = PushMessagesRequest.FromString(body).messages_list
    # Whoever names none, or writes a list of his own here, is waited for in vain.
    return "".join(messages[0].metadata.reply_to_message_id.split()) if messages else ""


def pushed_object(body: bytes) -> str:
    """Return the id of the object in a PushObject request."""
    from flwr.proto.message_pb2 import PushObjectRequest

    return str(PushObjectRequest.FromString(body).object_id)


def claimed_node(call: str, body: bytes) -> int | bytes | None:
    """Return whom a Fleet request claims to come from.

    The node id; for ActivateNode and RegisterNode the public key, for they come before an id is
    known. None when the request says nothing.

    Raises
    ------
    ConsiliumError
        ``network.garbage`` when the body is no such request; ``identity.foreign-node`` for a reply
        in another node's name.
    """
    from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, run_pb2
    from google.protobuf.message import DecodeError

    types: dict[str, Any] = {
        "RegisterNode": fleet_pb2.RegisterNodeFleetRequest,
        "ActivateNode": fleet_pb2.ActivateNodeRequest,
        "DeactivateNode": fleet_pb2.DeactivateNodeRequest,
        "UnregisterNode": fleet_pb2.UnregisterNodeFleetRequest,
        "SendNodeHeartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
        "PullMessages": fleet_pb2.PullMessagesRequest,
        "PushMessages": fleet_pb2.PushMessagesRequest,
        "GetRun": run_pb2.GetRunRequest,
        "GetFab": fab_pb2.GetFabRequest,
        "PushObject": message_pb2.PushObjectRequest,
        "PullObject": message_pb2.PullObjectRequest,
        "ConfirmMessageReceived": message_pb2.ConfirmMessageReceivedRequest,
    }
    try:
        request = types[call].FromString(body)
    except (DecodeError, ValueError) as error:
        raise ConsiliumError("network.garbage", f"The body is no {call} request.") from error
    if call in ("RegisterNode", "ActivateNode"):
        return bytes(request.public_key)
    if call in ("DeactivateNode", "UnregisterNode"):
        return int(request.node_id)
    # Flower takes a reply for that of the node which the reply itself names.
    replies = request.messages_list if call == "PushMessages" else ()
    if any(reply.metadata.src_node_id != request.node.node_id for reply in replies):
        raise ConsiliumError("identity.foreign-node", "A reply names another node as its own.")
    return int(request.node.node_id) if request.HasField("node") else None


class TaskSource:
    """Takes ServerApp tasks from the SuperLink's Runtime API, as Flower's SuperExec does."""

    def __init__(self, address: str, certificate: Path, secret: bytes) -> None:
        from flwr.supercore.interceptors import (
            RuntimeVersionHttpInterceptor,
            SuperExecAuthHttpInterceptor,
        )
        from flwr.supercore.retry import make_simple_http_retry_invoker
        from flwr.supercore.runtime import RuntimeHttpClient

        self._client = RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=str(certificate),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(
                    master_secret=secret,
                    protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
                ),
            ],
            retry_invoker=make_simple_http_retry_invoker(),
        )

    def acquire(self) -> tuple[str, int] | None:
        """Return token and Flower run id of a waiting ServerApp task, None when there is none."""
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.constant import TaskType

        response = self._client.AcquireTask(
            AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        )
        if response.HasField("task") and response.token:
            return str(response.token), int(response.task.run_id)
        return None


def run_server_task(
    address: str, certificate: bytes, token: str, main: Callable[[Any, Any], None]
) -> None:
    """Run one ServerApp task in this process, from pulling its input to its final status.

    Does what Flower's `run_serverapp` does, except that no bundle is unpacked: the bundle must be
    the installed release's own, and ``main(grid, context)`` is the installed code.
    """
    from flwr.common.constant import SubStatus
    from flwr.common.serde import context_from_proto, fab_from_proto, run_from_proto
    from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.superlink.grid import HttpGrid

    grid = HttpGrid(address, insecure=False, root_certificates=certificate, token=token)
    client = grid._runtime_client
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    status, details = SubStatus.FAILED, "the server application failed"
    try:
        task = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id = task.task_id
        TaskIdentity.run_id = task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        context = context_from_proto(task.context)
        run = run_from_proto(task.run)
        if fab_from_proto(task.fab).hash_str != bundle_hash():
            raise ConsiliumError(
                "run.foreign-bundle", "The run carries a bundle that is not this release's."
            )
        grid.set_run(run)
        context.run_config = dict(run.override_config)
        main(grid, context)
        status, details = SubStatus.COMPLETED, ""
    except ConsiliumError as error:
        details = str(error)
        raise
    finally:
        client.PushTaskOutput(
            PushTaskOutputRequest(context=None, sub_status=status, details=details)
        )
        heartbeat.stop()
        grid.close()


def simulate(server_app: Any, client_app: Any, nodes: int, resources: dict[str, Any]) -> None:
    """Run both apps on Flower's simulation engine until the ServerApp ends; raises what it raises.

    Parameters
    ----------
    resources : dict
        Flower's ``backend_config``: what Ray is started with, and what a ClientApp takes of it.
    """
    from flwr.simulation import run_simulation

    run_simulation(server_app, client_app, nodes, backend_config=resources)
