"""The link: a site's only way out.

Towards the SuperNode it is an HTTPS endpoint on loopback; towards the aggregator a mutually
authenticated gRPC channel. It forwards the Fleet calls one by one as raw bytes, asks the egress
gate before anything leaves, and tells the aggregator that the site is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
from collections.abc import Callable
from typing import Any, Final

from consilium_client.egress import EgressGate
from consilium_client.faults import fault_point
from consilium_client.flower_private import (
    activated_node,
    confirmed_message,
    deactivate_request,
    node_headers,
    read_push,
    read_push_object,
)
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_common import __version__
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.keys import load_tls_key
from consilium_common.wire.channel import CHANNEL_OPTIONS, rpc_error
from consilium_common.wire.methods import (
    ERROR_KEY,
    FLEET_CALL_BY_PATH,
    FLEET_HEADER_PREFIX,
    HTTP_STATUS_KEY,
    MAX_MESSAGE_BYTES,
    PROTOBUF_MEDIA_TYPE,
    SITE_HELLO,
    SITE_PROGRESS,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc

_log = logging.getLogger(__name__)

_HELLO_SECONDS: Final = 2.0
_PROGRESS_SECONDS: Final = 0.5
#: A SuperNode gives a call up after 30 s; a held PullMessages ends before that.
_CALL_SECONDS: Final = 29.0
#: So long a SuperNode's call is held while its task works; below the 30 s after which it gives up.
_REPLY_SECONDS: Final = 15.0
_REPLY_POLL_SECONDS: Final = 0.01


class Link:
    """Forwards between the SuperNode and the aggregator.

    Parameters
    ----------
    say : callable
        Tells the site operator what they should know.
    """

    def __init__(self, home: SiteHome, identity: SiteIdentity, say: Callable[[str], None]) -> None:
        self._home = home
        self._identity = identity
        self._gate = EgressGate(home, identity.config.name)
        self._say = say
        self._session = secrets.token_hex(8)
        self._channel = grpc.aio.secure_channel(
            identity.config.address, identity.credentials().for_grpc(), options=CHANNEL_OPTIONS
        )
        self._wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._wake.setblocking(False)
        self._connected: bool | None = None
        self._replied_before = 0
        self._running: list[str] | None = None

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one HTTPS request of the SuperNode (ASGI)."""
        if scope["type"] != "http":
            return
        try:
            status, content = await self._answer(scope, receive)
        except asyncio.CancelledError:
            # The site is stopping, and a call was held open: whoever asked is being stopped too.
            status, content = 503, b""
        headers = [(b"content-type", PROTOBUF_MEDIA_TYPE.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, scope: Any, receive: Any) -> tuple[int, bytes]:
        prefix, _, name = scope["path"].rpartition("/")
        call = FLEET_CALL_BY_PATH.get(name)
        if prefix != "/v1/fleet" or call is None or scope["method"] != "POST":
            return 404, b""
        body = await _read_body(receive)
        if body is None:
            return 413, b""
        headers = [
            (key.decode("latin-1"), value.decode("latin-1"))
            for key, value in scope["headers"]
            if key.startswith(FLEET_HEADER_PREFIX.encode())
        ]
        try:
            return await self._forward(call, self._judge(call, body), headers)
        except ConsiliumError as error:
            self._say(f"the link refused {call}: {error}")
            # 403 ends the matter for Flower; it would try again for ever after others.
            return 403, b""

    def _judge(self, call: str, body: bytes) -> bytes:
        """Return what may be forwarded of an outgoing call, or raise."""
        if call == "PushMessages":
            push = read_push(body)
            self._gate.check_message(push)
            return push.body
        if call == "PushObject":
            self._gate.check_object(*read_push_object(body))
        return body

    async def _forward(
        self, call: str, body: bytes, headers: list[tuple[str, str]]
    ) -> tuple[int, bytes]:
        fault_point(f"link.before.{call}")
        invoke = self._channel.unary_unary(fleet_method(call))(
            body, metadata=headers, timeout=_CALL_SECONDS
        )
        try:
            content: bytes = await invoke
            trailing = dict(await invoke.trailing_metadata() or ())
        except grpc.aio.AioRpcError as error:
            return self._failed(error), b""
        fault_point(f"link.after.{call}")
        status = int(trailing.get(HTTP_STATUS_KEY, 200))
        if status == 200 and call == "ActivateNode":
            node = {"node_id": activated_node(content)}
            write_atomic(self._home.run / "node.json", json.dumps(node).encode())
        if call == "PullMessages":
            self._replied_before = self._replied_at()
        if call == "ConfirmMessageReceived":
            self._wake_executor(confirmed_message(body))
            await self._until_replied()
        return status, content

    def _failed(self, error: Any) -> int:
        """Return the HTTP status that makes the SuperNode do the right thing."""
        for key, value in error.trailing_metadata() or ():
            if key == ERROR_KEY:
                reason = ConsiliumError.from_dict(json.loads(value))
                if reason.code.startswith("identity."):
                    self._say(f"the aggregator refuses this site: {reason}")
                    return 401  # the SuperNode ends; the supervisor tries again, slowly
                return 503
        return 503  # the SuperNode tries again

    async def hello_for_ever(self) -> None:
        """Tell the aggregator every few seconds that this site is there."""
        invoke = self._channel.unary_unary(SITE_HELLO)
        while True:
            request = canonical_json({"version": __version__, "session": self._session})
            try:
                answer = json.loads(await invoke(request, timeout=10))
                if self._connected is not True:
                    self._say(
                        f"connected to {self._identity.config.address}"
                        f" (aggregator {answer['version']})"
                    )
                self._connected = True
                self._note_running(answer["running"])
            except grpc.aio.AioRpcError as error:
                if self._connected is not False:
                    problem = await asyncio.to_thread(
                        rpc_error,
                        error,
                        self._identity.config.address,
                        self._identity.credentials(),
                    )
                    self._say(f"not connected: {problem}")
                self._connected = False
            await asyncio.sleep(_HELLO_SECONDS)

    async def progress_for_ever(self) -> None:
        """Pass on what the executor writes about the running round: public facts alone."""
        path, sent = self._home.run / "progress.json", b""
        invoke = self._channel.unary_unary(SITE_PROGRESS)
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            with contextlib.suppress(OSError, grpc.aio.AioRpcError):
                content = path.read_bytes()
                if content != sent:
                    await invoke(content, timeout=5)
                    sent = content

    async def free_node(self) -> None:
        """Deactivate the node that a killed predecessor left active.

        Flower counts a vanished SuperNode as online for up to a minute and refuses its key
        meanwhile; the key's owner may end that at once.
        """
        # What the predecessor was asked is lost with it: a new session tells the aggregator so.
        self._session = secrets.token_hex(8)
        path = self._home.run / "node.json"
        if not path.exists():
            return
        node_id = int(json.loads(path.read_text(encoding="utf-8"))["node_id"])
        headers = node_headers(load_tls_key(self._identity.folder / "site-key.pem"))
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._channel.unary_unary(fleet_method("DeactivateNode"))(
                deactivate_request(node_id), metadata=headers, timeout=5
            )
        path.unlink(missing_ok=True)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()
        self._wake.close()

    def _note_running(self, digests: list[str]) -> None:
        """Tell the executor which studies run, so that it ends the workers of all others."""
        if digests != self._running:
            # A full disk is not the aggregator's concern: said again with the next hello.
            with contextlib.suppress(ConsiliumError):
                write_atomic(self._home.running, json.dumps(digests).encode(), durable=False)
                self._running = digests

    async def _until_replied(self) -> None:
        """Hold the SuperNode's call until its task has replied, for a while.

        A SuperNode looks for the reply right after this call, and then every half second only.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + _REPLY_SECONDS
        while self._replied_at() == self._replied_before and clock() < end:
            await asyncio.sleep(_REPLY_POLL_SECONDS)

    def _replied_at(self) -> int:
        try:
            return self._home.replied.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _wake_executor(self, message_id: str) -> None:
        with contextlib.suppress(OSError):
            self._wake.sendto(message_id.encode(), str(self._home.wake_socket))


async def _read_body(receive: Any) -> bytes | None:
    """Read a request's body; None when it is larger than any honest one."""
    chunks: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        chunk = event.get("body", b"")
        size += len(chunk)
        if size > MAX_MESSAGE_BYTES:
            return None
        chunks.append(chunk)
        if not event.get("more_body"):
            return b"".join(chunks)
