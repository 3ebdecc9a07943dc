"""A member's own, valid certificate and keys in an attacker's hands, who speaks by hand."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from egress_samples import Reply, reference
from federation import Federation, Site, wait_for
from flwr.app import Error, Message, RecordDict
from flwr.proto.fleet_pb2 import PushMessagesResponse

from consilium_client.flower_private_fleet import (
    Asked,
    activated_node,
    asked_in,
    heartbeat_seconds,
    make_request,
    node_headers,
    node_key,
    pulled_object,
)
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.identity.keys import load_signing_key, load_tls_key
from consilium_common.wire.channel import CHANNEL_OPTIONS, Caller, Credentials
from consilium_common.wire.messages import Reference, instructions_of, to_server
from consilium_common.wire.methods import (
    CHUNK_BYTES,
    ERROR_KEY,
    HTTP_STATUS_KEY,
    PROTOCOL,
    SITE_DELIVER,
    SITE_FETCH,
    SITE_HELLO,
    fleet_method,
)
from consilium_common.wire.tls13 import grpc


class Refused(Exception):
    """What the aggregator answered a call that it did not let through."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Task:
    """A message as it came: what a reply to it refers to, and the model that it names."""

    asked: Asked
    message: Message
    kind: str
    study: str
    round: int
    weights: bytes


class Hostile:
    """A member's certificate and node key, in the hands of an attacker."""

    def __init__(self, federation: Federation, site: Site) -> None:
        folder = site.home / "identity"
        self.site = site
        self.key = load_tls_key(folder / "site-key.pem")
        self.signer = load_signing_key(folder / "ledger-key.pem")
        credentials = Credentials(
            (folder / "authority.pem").read_bytes(),
            (folder / "site.pem").read_bytes(),
            (folder / "site-key.pem").read_bytes(),
        )
        self.caller = Caller(federation.address, credentials)
        self._channel = grpc.secure_channel(
            federation.address, credentials.for_grpc(), options=CHANNEL_OPTIONS
        )
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._greet, daemon=True)
        self.node = 0
        #: The honest site's node; what was sent in an earlier round; where an upload was stopped.
        self.other = 0
        self.earlier: Reply | None = None
        self.stopped_at = (0, "")

    def __enter__(self) -> Hostile:
        values = {
            "public_key": node_key(self.key.public_key()),
            "heartbeat_interval": heartbeat_seconds(),
        }
        self.node = activated_node(self.fleet("ActivateNode", **values))
        self._pulse.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pulse.join(30)
        self._channel.close()
        self.caller.close()

    def _greet(self) -> None:
        while not self._ended.wait(2):
            with contextlib.suppress(ConsiliumError, Refused):
                self.fleet(
                    "SendNodeHeartbeat",
                    node={"node_id": self.node},
                    heartbeat_interval=heartbeat_seconds(),
                )
                self.caller.call(
                    SITE_HELLO, {"session": "hostile", "version": "1", "protocol": PROTOCOL}
                )

    def call(self, name: str, body: bytes) -> bytes:
        """Make a Fleet call with a body of our own; raises Refused."""
        invoke = self._channel.unary_unary(fleet_method(name)).with_call
        try:
            content, call = invoke(body, metadata=node_headers(self.key), timeout=40)
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            if ERROR_KEY in trailing:
                raise Refused(json.loads(trailing[ERROR_KEY])["code"]) from None
            raise Refused(error.code().name) from None
        status = dict(call.trailing_metadata() or ()).get(HTTP_STATUS_KEY, "200")
        if status != "200":
            raise Refused(f"HTTP {status}")
        return bytes(content)

    def fleet(self, name: str, **values: Any) -> bytes:
        return self.call(name, make_request(name, **values).SerializeToString())

    def task(self) -> Task | None:
        """Pull the next message with all that is in it; None where none came."""
        asked = asked_in(self.fleet("PullMessages", node={"node_id": self.node}))
        if asked is None:
            return None
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        contents: dict[str, bytes] = {}
        for name in asked.objects:

            def look(name: str = name) -> bytes:
                return pulled_object(
                    self.fleet(
                        "PullObject",
                        node={"node_id": self.node},
                        run_id=asked.run_id,
                        object_id=name,
                    )
                )

            contents[name] = bytes(wait_for(look, "an object of the message", timeout=30))
        whole = inflate_object_from_contents(asked.message_id, contents)
        bare = Message(metadata=asked.metadata, content=RecordDict())
        kind = asked.kind
        told = instructions_of(whole.content)
        weights = b"" if told.model is None else self.fetch(told.study, told.model)
        return Task(asked, bare, kind, told.study, told.round_index, weights)

    def fetch(self, study: str, model: Reference) -> bytes:
        """Return a file on offer; raises Refused."""
        first = {"study": study, "sha256": model.sha256, "offset": 0}
        return b"".join(self._stream(SITE_FETCH, [canonical_json(first)]))

    def deliver(self, study: str, content: bytes, *, named: Reference | None = None) -> None:
        """Send a file as an update, under its own name or another; raises Refused."""
        named = named or reference(content)
        first = {"study": study, "sha256": named.sha256, "bytes": named.bytes}
        pieces = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
        self._stream(SITE_DELIVER, [canonical_json(first), *pieces])

    def updated(
        self, task: Task, content: bytes, figures: dict[str, float] | None = None
    ) -> RecordDict:
        """Deliver an update, unless even its announcement is refused; return a reply naming it."""
        with contextlib.suppress(Refused):
            self.deliver(task.study, content)
        return to_server(reference(content), figures)

    def _stream(self, method: str, messages: list[bytes]) -> list[bytes]:
        try:
            return list(self._channel.stream_stream(method)(iter(messages), timeout=40))
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            if ERROR_KEY in trailing:
                raise Refused(json.loads(trailing[ERROR_KEY])["code"]) from None
            raise Refused(error.code().name) from None

    def reply(self, task: Task, content: RecordDict | Error) -> Reply:
        reply = Reply(SimpleNamespace(message=task.message), content)  # type: ignore[arg-type]
        reply.request.node.node_id = self.node
        return reply

    def announce(self, reply: Reply) -> PushMessagesResponse:
        return PushMessagesResponse.FromString(
            self.call("PushMessages", reply.request.SerializeToString())
        )

    def push(self, task: Task, reply: Reply, response: PushMessagesResponse) -> None:
        for name in response.objects_to_push:
            self.fleet(
                "PushObject",
                node={"node_id": self.node},
                run_id=task.asked.run_id,
                object_id=name,
                object_content=reply.objects[name],
                session_id=response.session_id,
            )

    def send(self, task: Task, content: RecordDict | Error) -> Reply:
        """Send a reply as a SuperNode does, with whatever content."""
        reply = self.reply(task, content)
        self.push(task, reply, self.announce(reply))
        return reply


def give_up(hostile: Hostile, task: Task) -> None:
    """Send an error reply, so that the round does not wait for its deadline."""
    hostile.send(task, Error(code=0, reason=json.dumps({"code": "run.site-failed", "message": ""})))
