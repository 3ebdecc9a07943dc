"""Flower's private interface as a site's processes use it: the SuperNode, and tasks taken from it.

What the link speaks is in :mod:`consilium_client.flower_private_fleet`; nothing else is touched.

A contract test (`tests/unit/test_flower_contract.py`) fails loudly when a Flower release changes
what is used here.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from consilium_client.faults import fault_point
from consilium_client.flower_private_fleet import foreign_bundle
from consilium_common.errors import ConsiliumError
from consilium_common.flower_bundle import bundle_hash

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
    public_reason: Callable[[ConsiliumError], str],
    watch: Callable[[str], Callable[[], bool]],
) -> None:
    """Run one ClientApp task, from pulling its message to pushing the reply.

    Does what Flower's `run_clientapp` does, except that no bundle is unpacked and no context leaves
    the process. A refusal is an error reply: silence would stall the round.

    Parameters
    ----------
    app : callable
        ``app(message, context)`` returns the reply.
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
                raise foreign_bundle()
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


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()
