"""Everything of Flower's private interface that a site touches, and nothing else.

A contract test (`tests/unit/test_flower_contract.py`) fails loudly when a Flower release changes
what is used here.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from consilium_client.faults import fault_point
from consilium_common.errors import ConsiliumError
from consilium_common.flower_bundle import bundle_hash

#: What a SuperNode itself answers when a task process died; the only words of Flower's that may
#: leave in an error reply.
CRASHED_REASON: Final = "ClientApp stopped responding."
#: Seconds between looks for a part of a message that is still coming.
_SHORTEST_PAUSE: Final = 0.03
_LONGEST_PAUSE: Final = 2.0


def supernode_command(
    *, link_port: int, link_certificate: Path, runtime_port: int, key: Path, secret: Path
) -> list[str]:
    """Return the command of an unmodified SuperNode that knows the link alone."""
    program = shutil.which("flower-supernode", path=str(Path(sys.executable).parent))
    if program is None:
        raise ConsiliumError("internal.installation", "flower-supernode is not installed.")
    return [
        program,
        *("--superlink", f"127.0.0.1:{link_port}", "--root-certificates", str(link_certificate)),
        *("--auth-supernode-private-key", str(key)),
        *("--isolation", "process", "--host", "127.0.0.1", "--port", str(runtime_port)),
        *("--superexec-auth-secret-file", str(secret)),
    ]


def node_headers(key: ec.EllipticCurvePrivateKey) -> list[tuple[str, str]]:
    """Return the headers with which a SuperNode proves its key (a signed time)."""
    import base64

    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.date import now
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

    moment = now().isoformat()
    signature = sign_message(key, moment.encode("ascii"))
    public = public_key_to_bytes(key.public_key())
    return [
        (FLEET_HTTP_PUBLIC_KEY_HEADER, base64.b64encode(public).decode("ascii")),
        (TIMESTAMP_HEADER, moment),
        (FLEET_HTTP_SIGNATURE_HEADER, base64.b64encode(signature).decode("ascii")),
    ]


def deactivate_request(node_id: int) -> bytes:
    """Return the body of a DeactivateNode call."""
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest

    body: bytes = DeactivateNodeRequest(node_id=node_id).SerializeToString()
    return body


def activated_node(response: bytes) -> int:
    """Return the node id in an ActivateNode response."""
    from flwr.proto.fleet_pb2 import ActivateNodeResponse

    return int(ActivateNodeResponse.FromString(response).node_id)


@dataclass(frozen=True)
class Push:
    """An outgoing reply as PushMessages announces it."""

    body: bytes  #: the request, without the run time that Flower adds
    object_ids: tuple[str, ...]  #: of the message, which comes first, and everything in it
    error_reason: str | None  #: of an error reply


def read_push(body: bytes) -> Push:
    """Parse a PushMessages request and drop from it what is nobody's business.

    Flower adds how long the app ran: a duration depends on the data, so it is removed.

    Raises
    ------
    ConsiliumError
        ``privacy.egress`` unless it is exactly one reply without inline content.
    """
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from google.protobuf.message import DecodeError

    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError as error:
        raise ConsiliumError("privacy.egress", "An outgoing message cannot be read.") from error
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise ConsiliumError("privacy.egress", "An outgoing call carries other than one message.")
    message = request.messages_list[0]
    if message.HasField("content") and message.content.ByteSize() > 0:
        raise ConsiliumError("privacy.egress", "An outgoing message carries inline content.")
    request.DiscardUnknownFields()
    del request.clientapp_runtime_list[:]
    request.clientapp_runtime_list.append(0.0)
    reason = message.error.reason if message.HasField("error") else None
    return Push(request.SerializeToString(), tuple(_walk(request.message_object_trees[0])), reason)


def confirmed_message(body: bytes) -> str:
    """Return the id of the message that a ConfirmMessageReceived request says has come whole."""
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest

    return str(ConfirmMessageReceivedRequest.FromString(body).message_object_id)


def read_push_object(body: bytes) -> tuple[str, bytes]:
    """Return id and content of an outgoing object, or raise ``privacy.egress``."""
    from flwr.proto.message_pb2 import PushObjectRequest
    from google.protobuf.message import DecodeError

    try:
        request = PushObjectRequest.FromString(body)
    except DecodeError as error:
        raise ConsiliumError("privacy.egress", "An outgoing object cannot be read.") from error
    return str(request.object_id), bytes(request.object_content)


def object_ids(whole: Any) -> list[str]:
    """Return the ids of a message or record and of everything in it, the whole itself last.

    An id is the SHA-256 of the object's content, so equal records have equal ids.
    """
    from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree

    return [str(tree.object_id) for tree in iterate_object_tree(get_object_tree(whole))]


def _walk(tree: Any) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _walk(child)


class TaskSource:
    """Takes ClientApp tasks from the SuperNode's Runtime API, as Flower's SuperExec does."""

    def __init__(self, address: str, secret: bytes) -> None:
        from flwr.supercore.interceptors import (
            RuntimeVersionHttpInterceptor,
            SuperExecAuthHttpInterceptor,
        )
        from flwr.supercore.runtime import RuntimeHttpClient

        self._client = RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=True,  # loopback, and every call carries the secret's HMAC or a task's token
            root_certificates=None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(
                    master_secret=secret,
                    protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
                ),
            ],
        )

    def acquire(self) -> str | None:
        """Return the token of a waiting task; None when there is none or nobody answers."""
        import httpx
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.constant import TaskType

        try:
            response = self._client.AcquireTask(
                AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
            )
        except httpx.HTTPError:
            return None  # the SuperNode is starting
        if response.HasField("task") and response.token:
            return str(response.token)
        return None


class MessageSource:
    """A task's Runtime client that waits for the rest of the task's message, but not in vain.

    A task is there before its message is. Flower looks for the rest after one second, two, four
    and so on, for two hours: also when the run was stopped meanwhile and the rest never comes.

    Parameters
    ----------
    client : flwr.supercore.runtime.RuntimeHttpClient
        Every other call goes to it as it is.
    watch : callable
        ``watch(message_id)`` returns a function that says whether the SuperNode has since turned
        to another message: what has not come by then will not come.
    """

    def __init__(self, client: Any, watch: Callable[[str], Callable[[], bool]]) -> None:
        self._client = client
        self._watch = watch
        self._overtaken: Callable[[], bool] = lambda: False
        self._ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """Pull the message's outline, from which its id is known."""
        response = self._client.PullMessages(request)
        if response.message_object_trees:
            self._overtaken = self._watch(str(response.message_object_trees[0].object_id))
        return response

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        """Pull a part of the message as soon as it is there."""
        from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

        pause = _SHORTEST_PAUSE
        while True:
            # Before the call: what was whole then is there.
            overtaken = self._overtaken()
            response = self._client.PullObject(request)
            if not response.object_found or response.object_available:
                return response
            if overtaken or self._ended:
                raise ObjectPullError(request.object_id, "its message never came whole")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)

    def end(self) -> None:
        """Let what still waits give up."""
        self._ended = True


def run_client_task(
    address: str,
    token: str,
    app: Callable[[Any, Any], Any],
    *,
    permit: Callable[[Any, Any, list[str]], None],
    public_reason: Callable[[ConsiliumError], str],
    watch: Callable[[str], Callable[[], bool]],
) -> None:
    """Run one ClientApp task, from pulling its message to pushing the reply.

    Does what Flower's `run_clientapp` does, except that no bundle is unpacked, no context leaves
    the process, and the ids of all objects of the reply are given to ``permit`` before anything is
    pushed. A refusal is an error reply: silence would stall the round.

    Parameters
    ----------
    app : callable
        ``app(message, context)`` returns the reply.
    permit : callable
        ``permit(message, reply, object_ids)`` is told what the reply consists of.
    public_reason : callable
        The words of an error reply.
    watch : callable
        As for :class:`MessageSource`.
    """
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
    )
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.runtime.run_clientapp import (
        pull_task_input,
        push_message,
        push_task_output,
    )

    retry = make_simple_http_retry_invoker()

    def connect(invoker: Any) -> Any:
        return RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=True,
            root_certificates=None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
                RuntimeTokenHttpInterceptor(token),
            ],
            retry_invoker=invoker,
        )

    client = connect(retry)
    source = MessageSource(client, watch)
    # Without a retry of its own: the sender tries again, and can be stopped while it waits.
    pulse = connect(None)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(pulse))
    heartbeat.start()
    status, details = SubStatus.FAILED, "the client application failed"
    try:
        message, context, _, fab = pull_task_input(source)
        try:
            if fab.hash_str != bundle_hash() or _sha256(fab.content) != bundle_hash():
                raise ConsiliumError(
                    "run.foreign-bundle",
                    "The aggregator sent code that is not this site's installed release.",
                    hint="Site and aggregator must run the same release of consilium.",
                )
            reply = app(message, context)
        except Exception as error:
            # A SuperNode waits for the reply for ever: whatever happens, there is one.
            known = (
                error
                if isinstance(error, ConsiliumError)
                else ConsiliumError("internal.unexpected", type(error).__name__)
            )
            reason = public_reason(known)
            reply = Message(
                Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message
            )
        reply.metadata.__dict__["_message_id"] = reply.object_id
        fault_point("reply.made")
        permit(message, reply, object_ids(reply))
        fault_point("reply.permitted")
        push_message(client, reply, context)
        fault_point("reply.pushed")
        status, details = SubStatus.COMPLETED, ""
    finally:
        # Once: a SuperNode that is gone does not know this task when it comes back.
        source.end()
        retry.max_tries = 1
        push_task_output(client, None, status, details)
        fault_point("reply.done")
        heartbeat.stop()
        pulse.close()
        client.close()


def reason_code(reason: str) -> str | None:
    """Return the error code in an error reply's reason, None when it is not one of ours."""
    try:
        value = json.loads(reason)
        return str(value["code"])
    except (ValueError, KeyError, TypeError):
        return None


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()
