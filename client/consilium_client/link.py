"""The link: a site's only way out.

Towards the SuperNode it is an HTTPS endpoint on loopback; towards the aggregator a mutually
authenticated gRPC channel. What the SuperNode says is read and never forwarded: every Fleet call is
made anew, headers and all, from what the aggregator named and what the egress gate lets out. It
also tells the aggregator that the site is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from consilium_client.connection import Connection, http_status
from consilium_client.egress import EgressGate, Passed, public_progress
from consilium_client.faults import fault_point
from consilium_client.fleet_calls import FleetCalls
from consilium_client.flower_private_fleet import (
    Asked,
    announced_in,
    deactivate_request,
    node_headers,
    node_key,
    object_stored,
    read_request,
    refusal,
)
from consilium_client.greeting import Greeting, greeting, read_greeting, studies_at_once
from consilium_client.home import SiteHome
from consilium_client.identity import SiteIdentity
from consilium_client.refusals import Refusals
from consilium_client.sending import Sendings
from consilium_client.store import StudyStore
from consilium_client.transfers import Transfers
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.identity.keys import load_tls_key
from consilium_common.wire.channel import said_in
from consilium_common.wire.methods import (
    FLEET_CALL_BY_PATH,
    PROTOBUF_MEDIA_TYPE,
    PULLED_KEY,
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
#: So long one is held while the aggregator cannot be reached.
_REACHED_SECONDS: Final = 15.0
#: A SuperNode's call waits so long for an update to be delivered; then it comes again.
_DELIVERY_SECONDS: Final = 20.0
#: Flower's answer to a node whose signed time it does not take; nothing was done then.
_NOT_ADMITTED: Final = 401
#: Nothing that a SuperNode says is longer: models and updates go another way.
_LARGEST_CALL: Final = 256 * 1024


class Link:
    """Forwards between the SuperNode and the aggregator.

    Parameters
    ----------
    say : callable
        Tells the site operator what they should know.
    heard : callable
        Gets each answer of the aggregator to our greeting (default: nobody does).
    """

    def __init__(
        self,
        home: SiteHome,
        identity: SiteIdentity,
        say: Callable[[str], None],
        heard: Callable[[Greeting], None] = lambda _: None,
    ) -> None:
        self._home = home
        self._node_file = home.run / "node.json"
        self._identity = identity
        # The same key for the site's whole life: it is the Flower node's too.
        self._key = load_tls_key(identity.folder / "site-key.pem")
        self._gate = EgressGate(home, identity.config.name, identity.signer)
        self._calls = FleetCalls(node_key(self._key.public_key()))
        self._sendings = Sendings(self._gate)
        self._refusals = Refusals(home.refused)
        self._ahead: set[asyncio.Task[None]] = set()
        self._say = say
        self._session = secrets.token_hex(8)
        #: Receipt of the messages that came last.
        self._pulled = ""
        self._connection = Connection(identity)
        self._transfers = Transfers(home, self._connection)
        self._heard = heard
        self._wake = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._wake.setblocking(False)
        #: By how much the aggregator's clock is ahead of this machine's, as it said last.
        self._clock_ahead = timedelta(0)
        self._connected: bool | None = None
        self._reached = asyncio.Event()
        self._replied_before = 0
        self._running: list[str] | None = None
        self._benched: dict[str, str] = {}
        self._prepared: tuple[object, ...] = ()

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one HTTPS request of the SuperNode (ASGI)."""
        if scope["type"] != "http":
            return
        try:
            status, content = await self._answer(scope, receive)
        except asyncio.CancelledError:
            # The site is stopping, and a call was held open: whoever asked is being stopped too.
            status, content = 503, b""
        headers = [
            (b"content-type", PROTOBUF_MEDIA_TYPE.encode()),
            (b"content-length", str(len(content)).encode()),
        ]
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
        try:
            if call == "PushObject":
                return await self._push_object(body)
            request = read_request(call, body)
            if call == "PushMessages":
                return await self._reply(request)
            return await self._protocol_call(call, request)
        except ConsiliumError as error:
            if error.code == "network.bad-answer":
                self._say(f"{call} failed: {error}")
                return 503, b""
            if self._refusals.note(call, error):
                self._say(f"the link refused {call}: {error}")
            # 403 ends the matter for Flower; it would try again for ever after others.
            return 403, b""

    async def _protocol_call(self, call: str, request: Any) -> tuple[int, bytes]:
        status, content = await self._forward(call, self._calls.made_anew(call, request))
        if status != 200:
            return status, content
        try:
            known = self._calls.answered(call, request, content)
        except ConsiliumError as error:
            if error.code == "run.foreign-bundle":
                for asked in self._calls.of_run(int(request.run_id)):
                    await self._stand_in(asked, error, self._calls.own_node())
            raise
        if known is not None:
            # While the round is at work, so that its reply does not wait for it.
            self._ahead_of(self._gate.prepare, known)
            wanted = self._gate.wanted_model(known)
            if wanted is not None:
                self._transfers.fetch(*wanted, lambda: self._gate.require_fitting(*wanted))
        if call == "ActivateNode":
            node = {"node_id": self._calls.own_node()}
            write_atomic(self._node_file, json.dumps(node).encode())
        if call == "DeactivateNode":
            self._node_file.unlink(missing_ok=True)
        if call == "PullMessages":
            self._replied_before = self._replied_at()
        if call == "ConfirmMessageReceived":
            self._wake_executor(str(request.message_object_id))
            await self._until_replied()
        return status, content

    def _ahead_of(self, prepare: Callable[[Any], None], what: Any) -> None:
        task = asyncio.create_task(asyncio.to_thread(prepare, what))
        self._ahead.add(task)
        task.add_done_callback(self._ahead.discard)

    async def _reply(self, request: Any) -> tuple[int, bytes]:
        """Send the one reply that may leave for what the SuperNode announces."""
        announced = announced_in(request)
        asked = self._calls.asked(announced.reply_to)
        node_id = self._calls.own_node()
        try:
            # Large updates are hashed: other calls go on meanwhile.
            passed = await asyncio.to_thread(self._gate.judge, asked, announced, node_id)
        except ConsiliumError as error:
            await self._stand_in(asked, error, node_id)
            raise
        fault_point("link.receipt")
        try:
            if not await self._delivered(passed):
                return 503, b""
        except ConsiliumError as error:
            self._gate.kept_back(asked, passed)
            await self._stand_in(asked, error, node_id)
            raise
        asked.left = True
        status, content = await self._forward("PushMessages", passed.reply.body)
        if status != 200:
            return status, content
        return status, self._sendings.begin(
            node_id, asked.run_id, announced.message_id, passed, content
        )

    async def _delivered(self, passed: Passed) -> bool:
        """Whether what the reply names is at the aggregator, as it must be before the reply is."""
        if passed.approval is None or passed.file is None or passed.update is None:
            return True
        return await self._transfers.deliver(
            passed.approval.study.digest,
            passed.update,
            passed.file,
            lambda: self._gate.require_standing(passed),
            _DELIVERY_SECONDS,
        )

    async def _stand_in(self, asked: Asked, error: ConsiliumError, node_id: int) -> None:
        """Send an error reply for one that was refused: silence would stall the round."""
        passed = self._gate.instead(asked, error, node_id)
        if passed is None:
            return
        asked.left = True
        status, content = await self._forward("PushMessages", passed.reply.body)
        if status != 200:
            return
        own = passed.reply.message_id
        self._sendings.begin(node_id, asked.run_id, own, passed, content)
        body = self._sendings.whole_error(passed)
        if body is not None:
            await self._forward("PushObject", body)

    async def _push_object(self, body: bytes) -> tuple[int, bytes]:
        sending, name, made = await asyncio.to_thread(self._sendings.object, body)
        status, content = await self._forward("PushObject", made)
        if status != 200:
            sending.tried.add(name)
            return status, content
        await asyncio.to_thread(self._sendings.stored, sending, name)
        return status, object_stored() if name in sending.tried else content

    async def _forward(self, call: str, body: bytes) -> tuple[int, bytes]:
        fault_point(f"link.before.{call}")
        try:
            status, content = await self._call(call, body)
            if status == _NOT_ADMITTED:
                # A clock was set since the last greeting, here or there: the signed time was wrong.
                await self._greet()
                status, content = await self._call(call, body)
        except grpc.aio.AioRpcError as error:
            status = await self._failed(error)
            if status == 503 and error.code() is grpc.StatusCode.UNAVAILABLE:
                await self._until_reached()
            return status, b""
        fault_point(f"link.after.{call}")
        return status, content

    async def _call(self, call: str, body: bytes) -> tuple[int, bytes]:
        # Headers are ours too: nothing of the SuperNode's is repeated.
        headers = node_headers(self._key, self._clock_ahead)
        if call == "PullMessages":
            headers.append((PULLED_KEY, f"{self._session}.{self._pulled}"))
        invoke = self._connection.unary(fleet_method(call))(
            body, metadata=headers, timeout=_CALL_SECONDS
        )
        content: bytes = await invoke
        trailing = dict(await invoke.trailing_metadata() or ())
        self._pulled = str(trailing.get(PULLED_KEY, self._pulled))
        return http_status(trailing), content

    async def _failed(self, error: Any) -> int:
        """Return the HTTP status that makes the SuperNode do the right thing."""
        reason = said_in(error)
        if reason is not None and reason.code.startswith("identity."):
            if self._connected:
                # After a new start the aggregator knows the site and not its node. Should it
                # refuse the site itself, the next greeting learns that, and says so.
                _log.warning("the aggregator knows this SuperNode no more; it joins again")
            else:
                reason = await self._connection.explain(error)
                self._say(f"the aggregator refuses this site: {reason}")
            return 401  # the SuperNode ends; the supervisor tries again, slowly
        return 503  # the SuperNode tries again

    async def _until_reached(self) -> None:
        """Hold a call that did not get through until the aggregator is there, for a while.

        A SuperNode tries again at once at first, and then ever more seldom: every twenty seconds.
        """
        self._reached.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reached.wait(), _REACHED_SECONDS)

    async def hello_for_ever(self) -> None:
        """Tell the aggregator every few seconds that this site is there."""
        while True:
            try:
                answer = await self._greet()
                if self._connected is not True:
                    self._say(
                        f"connected to {self._identity.config.address}"
                        f" (aggregator {answer.version})"
                    )
                self._connected = True
                self._reached.set()
                self._note_running(answer.running)
                self._transfers.received.tidy(answer.running)
                for study, why in answer.benched.items() - self._benched.items():
                    self._say(f"study {study[:12]} does not ask this site for now: {why}")
                self._benched = answer.benched
                if not self._ahead and self._store_changed(answer.running):
                    self._ahead_of(self._gate.prepare_ahead, answer.running)
                self._heard(answer)
            except (grpc.aio.AioRpcError, ConsiliumError) as error:
                if self._connected is not False:
                    problem = (
                        error
                        if isinstance(error, ConsiliumError)
                        else await self._connection.explain(error)
                    )
                    self._say(f"not connected: {problem}")
                self._connected = False
            await asyncio.sleep(_HELLO_SECONDS)

    async def _greet(self) -> Greeting:
        said = greeting(self._session, self._identity.trust.digest, studies_at_once(self._home))
        answer = read_greeting(await self._connection.unary(SITE_HELLO)(said, timeout=10))
        if answer.time is not None:
            self._clock_ahead = answer.time - datetime.now(UTC)
        return answer

    async def progress_for_ever(self) -> None:
        """Pass on what the executor writes about the running round: public facts alone."""
        path, seen = self._home.run / "progress.json", b""
        store = StudyStore(self._home)
        invoke = self._connection.unary(SITE_PROGRESS)
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            with contextlib.suppress(OSError, grpc.aio.AioRpcError, ConsiliumError):
                content = path.read_bytes()
                if content == seen:
                    continue
                public = public_progress(content, store)
                if public is None:
                    self._refusals.note("Progress", refusal("what progress never says"))
                else:
                    await invoke(canonical_json(public), timeout=5)
                seen = content

    async def free_node(self, seconds: float = 5.0) -> None:
        """Deactivate the node that a SuperNode left active: killed, or stopped as it began.

        Flower counts a vanished SuperNode as online for up to a minute and refuses its key
        meanwhile; the key's owner may end that at once.
        """
        # What the predecessor was asked is lost with it: a new session tells the aggregator so.
        self._session = secrets.token_hex(8)
        if not self._node_file.exists():
            return
        node_id = int(json.loads(self._node_file.read_text(encoding="utf-8"))["node_id"])
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._connection.unary(fleet_method("DeactivateNode"))(
                deactivate_request(node_id),
                metadata=node_headers(self._key, self._clock_ahead),
                timeout=seconds,
            )
        self._node_file.unlink(missing_ok=True)

    async def close(self) -> None:
        """Close the channel."""
        self._gate.stop()
        await self._transfers.close()
        await self._connection.close()
        self._wake.close()

    def _note_running(self, digests: list[str]) -> None:
        """Tell the executor which studies run, so that it ends the workers of all others."""
        if digests != self._running:
            # A full disk is not the aggregator's concern: said again with the next hello.
            with contextlib.suppress(ConsiliumError):
                write_atomic(self._home.running, json.dumps(digests).encode(), durable=False)
                self._running = digests

    def _store_changed(self, digests: list[str]) -> bool:
        """Whether something was decided or stored, or other studies run, since the last time."""
        try:
            now = (self._home.studies.stat().st_mtime_ns, *digests)
        except OSError:
            return False  # it is said where it matters
        before, self._prepared = self._prepared, now
        return now != before

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
        if size > _LARGEST_CALL:
            return None
        chunks.append(chunk)
        if not event.get("more_body"):
            return b"".join(chunks)
