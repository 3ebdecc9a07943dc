"""Flower's Fleet protocol as the link speaks it: strictly read, and written anew from known values.

Private interface of Flower, as in :mod:`consilium_client.flower_private`; the contract test and
`tests/unit/test_egress_wire.py` fail loudly when a release changes what is used here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from consilium_common.errors import ConsiliumError
from consilium_common.flower_bundle import bundle
from consilium_common.wire.messages import INSTRUCTIONS
from consilium_common.wire.methods import FLEET_PATHS

#: What a SuperNode itself answers when a task process died; the only words of Flower's that may
#: leave in an error reply.
CRASHED_REASON: Final = "ClientApp stopped responding."
#: Instructions are five short values; larger ones are nobody's.
_LARGEST_INSTRUCTIONS: Final = 64 * 1024
#: Objects of a message: itself, and its records.
_MOST_OBJECTS: Final = 64
_ID: Final = re.compile(r"[0-9a-f]{64}")


def refusal(what: str) -> ConsiliumError:
    """Return the error that says what was not let out; the words are ours alone."""
    return ConsiliumError("privacy.egress", f"Refused to let out {what}.")


def read_request(call: str, body: bytes) -> Any:
    """Parse the request of a Fleet call, in the one form in which Flower itself writes it.

    Raises
    ------
    ConsiliumError
        ``privacy.egress`` for what is no such request, has a field that Flower does not know, or
        is written in another way than Flower writes it: each of these could hide bytes.
    """
    from google.protobuf.message import DecodeError

    try:
        request = _request_type(call).FromString(body)
        request.DiscardUnknownFields()
        written = request.SerializeToString(deterministic=True)
    except (DecodeError, ValueError, RecursionError) as error:
        raise refusal(f"a {call} that cannot be read") from error
    if written != body:
        raise refusal(f"a {call} with bytes that Flower does not write")
    return request


def make_request(call: str, **values: Any) -> Any:
    """Return the request of a Fleet call with these values and no others."""
    return _request_type(call)(**values)


def _response(kind: Any, content: bytes) -> Any:
    from google.protobuf.message import DecodeError

    try:
        return kind.FromString(content)
    except (DecodeError, ValueError, RecursionError) as error:
        raise ConsiliumError(
            "network.bad-answer",
            "The aggregator's answer to one of Flower's calls cannot be read.",
            hint="Site and aggregator may run versions that do not fit; update the older one.",
        ) from error


def _request_type(call: str) -> Any:
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    return PROTOBUF_REQUEST_TYPES["POST", f"/v1/fleet/{FLEET_PATHS[call]}"]


@dataclass(eq=False)
class Asked:
    """A message that the aggregator sent this site, as far as the link needs to know it.

    ``objects`` are the ids of everything in it; ``config`` its one record of settings, seen when
    it is pulled; None until then.
    """

    message_id: str
    run_id: int
    kind: str
    objects: frozenset[str]
    metadata: Any = field(repr=False)
    config: Any = None
    #: Id of the reply that was let out; a second reply has another id.
    replied: str = ""
    #: Whether that reply is on its way to the aggregator, and not only the file before it.
    left: bool = False

    def see_object(self, object_id: str, content: bytes) -> bool:
        """Take in an object of the message; whether it is a record of settings of it.

        A message with two records of settings asks for nothing: who reads which is open.
        """
        if len(content) > _LARGEST_INSTRUCTIONS or content[:13] != b"ConfigRecord ":
            return False
        if object_id not in self.objects or hashlib.sha256(content).hexdigest() != object_id:
            return False
        from flwr.app import ConfigRecord

        try:
            record = ConfigRecord.inflate(content)
        except Exception:  # Flower's parser raises anything, and its input came over the wire
            return False
        if self.config is not None and self.config[0] != object_id:
            record = ConfigRecord()
        self.config = (object_id, record)
        return True

    def settings(self) -> Any:
        """Return the message's content with its record of settings alone; empty without one."""
        from flwr.app import RecordDict

        return RecordDict({} if self.config is None else {INSTRUCTIONS: self.config[1]})


def asked_in(response: bytes) -> Asked | None:
    """Return the message in a PullMessages response; None where there is none."""
    from flwr.common.serde import message_from_proto
    from flwr.proto.fleet_pb2 import PullMessagesResponse

    found = _response(PullMessagesResponse, response)
    if not found.messages_list or not found.message_object_trees:
        return None
    # A SuperNode reads the first and no other.
    try:
        metadata = message_from_proto(found.messages_list[0]).metadata
    except (ValueError, TypeError, KeyError) as error:
        raise ConsiliumError(
            "network.bad-answer", "The aggregator's message is none of Flower's."
        ) from error
    if not metadata.message_id:
        return None
    return Asked(
        message_id=str(metadata.message_id),
        run_id=int(metadata.run_id),
        kind=str(metadata.message_type),
        objects=frozenset(_walk(found.message_object_trees[0])),
        metadata=metadata,
    )


@dataclass(frozen=True)
class Announced:
    """A reply as the SuperNode announces it; read, and nothing of it is ever sent on."""

    message_id: str
    reply_to: str
    children: tuple[Any, ...] = field(repr=False)
    error: tuple[int, str] | None = None

    def is_of(self, reply: Outgoing) -> bool:
        """Return whether the announced content is that of ``reply``, object for object."""
        return self.children == reply.children


def announced_in(request: Any) -> Announced:
    """Read a PushMessages request.

    Raises
    ------
    ConsiliumError
        ``privacy.egress`` unless it is one reply without inline content, its objects named by
        SHA-256.
    """
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        raise refusal("other than one message in a call")
    message, tree = request.messages_list[0], request.message_object_trees[0]
    if message.content.ByteSize() > 0:
        raise refusal("a message with inline content")
    names = list(_walk(tree))
    if not all(_ID.fullmatch(name) for name in names):
        raise refusal("an object that is not named by its SHA-256")
    if message.metadata.message_id != tree.object_id:
        raise refusal("a message under another name than its own")
    error = (int(message.error.code), message.error.reason) if message.HasField("error") else None
    if error is not None and tree.children:
        raise refusal("an error reply with content")
    return Announced(
        str(tree.object_id), str(message.metadata.reply_to_message_id), tuple(tree.children), error
    )


@dataclass(frozen=True)
class Outgoing:
    """A reply as it leaves: made here, from what was asked and from what may leave.

    Equal content gives equal bytes: time and lifetime are those of the message it answers.
    """

    body: bytes = field(repr=False)
    message_id: str
    message: bytes = field(repr=False)
    children: tuple[Any, ...] = field(repr=False)

    def content_ids(self) -> tuple[str, ...]:
        """Return the ids of everything in it but the message itself, sorted.

        An id is the SHA-256 of the object's content, so equal content has equal ids.
        """
        return tuple(sorted({name for child in self.children for name in _walk(child)}))


def outgoing(asked: Asked, node_id: int, *, content: Any = None, reason: str = "") -> Outgoing:
    """Make the one reply to a message.

    Parameters
    ----------
    node_id : int
        This site's node.
    content : flwr.app.RecordDict, optional
        What it carries; None makes it an error reply.
    reason : str
        The words of an error reply.
    """
    from flwr.app import Error, Message, Metadata, RecordDict
    from flwr.common.constant import ErrorCode
    from flwr.common.serde import message_to_proto
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.inflatable.inflatable_object import (
        get_object_tree,
        no_object_id_recompute,
    )

    asking = asked.metadata
    metadata = Metadata(
        run_id=asking.run_id,
        message_id="",
        src_node_id=node_id,
        dst_node_id=asking.src_node_id,
        reply_to_message_id=asking.message_id,
        group_id=asking.group_id,
        created_at=asking.created_at,
        ttl=asking.ttl,
        message_type=asking.message_type,
        src_task_id=asking.dst_task_id,
        dst_task_id=asking.src_task_id,
    )
    error = None
    if content is None:
        error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
    reply = Message(metadata=metadata, content=content, error=error)
    # Hashes each part once, not once more for everything that it is a part of.
    with no_object_id_recompute():
        tree = get_object_tree(reply)
        written = reply.deflate()
    metadata.__dict__["_message_id"] = str(tree.object_id)
    # Flower announces a message without its content, whose objects follow one by one.
    outline = None if content is None else RecordDict()
    request = PushMessagesRequest(
        node=Node(node_id=node_id),
        messages_list=[message_to_proto(Message(metadata=metadata, content=outline, error=error))],
        message_object_trees=[tree],
        clientapp_runtime_list=[0.0],  # a duration depends on the data
    )
    return Outgoing(
        request.SerializeToString(deterministic=True),
        str(tree.object_id),
        written,
        tuple(tree.children),
    )


def accepted(response: bytes) -> tuple[str, frozenset[str]]:
    """Return session and ids of the objects that a PushMessages response asks for."""
    from flwr.proto.fleet_pb2 import PushMessagesResponse

    found = _response(PushMessagesResponse, response)
    return str(found.session_id), frozenset(map(str, found.objects_to_push))


def renamed(response: bytes, ours: str, theirs: str) -> bytes:
    """Return a PushMessages response for the SuperNode, who knows the message by its own name."""
    from flwr.proto.fleet_pb2 import PushMessagesResponse

    found = _response(PushMessagesResponse, response)
    wanted = [theirs if name == ours else name for name in found.objects_to_push]
    del found.objects_to_push[:]
    found.objects_to_push.extend(wanted)
    if ours in found.results:
        found.results[theirs] = found.results.pop(ours)
    body: bytes = found.SerializeToString()
    return body


def object_stored() -> bytes:
    """Return the answer to a PushObject call that the object is there."""
    from flwr.proto.message_pb2 import PushObjectResponse

    body: bytes = PushObjectResponse(stored=True).SerializeToString()
    return body


def push_object(node_id: int, run_id: int, session: str, object_id: str, content: bytes) -> bytes:
    """Return the body of a PushObject call."""
    from flwr.proto.message_pb2 import PushObjectRequest
    from flwr.proto.node_pb2 import Node

    body: bytes = PushObjectRequest(
        node=Node(node_id=node_id),
        run_id=run_id,
        object_id=object_id,
        object_content=content,
        session_id=session,
    ).SerializeToString(deterministic=True)
    return body


def pulled_object(response: bytes) -> bytes:
    """Return the content in a PullObject response; empty while it is not there."""
    from flwr.proto.message_pb2 import PullObjectResponse

    return bytes(_response(PullObjectResponse, response).object_content)


def bundle_named(response: bytes) -> str:
    """Return the hash of the bundle that a GetRun response names."""
    from flwr.proto.run_pb2 import GetRunResponse

    return str(_response(GetRunResponse, response).run.fab_hash)


def foreign_bundle() -> ConsiliumError:
    """Return the error for code that is not the installed release's."""
    return ConsiliumError(
        "run.foreign-bundle",
        "The aggregator sent code that is not this site's installed release.",
        hint="Site and aggregator must run the same release of consilium.",
    )


def require_own_bundle(response: bytes) -> None:
    """Raise ``run.foreign-bundle`` unless a GetFab response holds the installed release's bundle.

    What is none a SuperNode must not even see: it ends, or hangs, over one that it cannot read.
    """
    from flwr.proto.fab_pb2 import GetFabResponse

    if bytes(_response(GetFabResponse, response).fab.content) != bundle():
        raise foreign_bundle()


def activated_node(response: bytes) -> int:
    """Return the node id in an ActivateNode response."""
    from flwr.proto.fleet_pb2 import ActivateNodeResponse

    return int(_response(ActivateNodeResponse, response).node_id)


def deactivate_request(node_id: int) -> bytes:
    """Return the body of a DeactivateNode call."""
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest

    body: bytes = DeactivateNodeRequest(node_id=node_id).SerializeToString()
    return body


def heartbeat_seconds() -> float:
    """Return the one interval that a SuperNode ever states."""
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL

    return float(HEARTBEAT_DEFAULT_INTERVAL)


def crashed(error: tuple[int, str]) -> bool:
    """Return whether an error reply is the SuperNode's own about a task process that died."""
    from flwr.common.constant import ErrorCode

    return error == (ErrorCode.CLIENT_APP_CRASHED, CRASHED_REASON)


def node_key(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a node's public key as Flower writes it."""
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    content: bytes = public_key_to_bytes(key)
    return content


def node_headers(
    key: ec.EllipticCurvePrivateKey, ahead: timedelta = timedelta(0)
) -> list[tuple[str, str]]:
    """Return the headers with which a node proves its key (a signed time) and names its release.

    Parameters
    ----------
    ahead : timedelta
        By how much the aggregator's clock is ahead of ours: Flower takes no node's word whose clock
        is 5 seconds ahead of its own or 5 minutes behind it, and the two need not agree.
    """
    import base64

    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.date import now
    from flwr.supercore.primitives.asymmetric import sign_message
    from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

    moment = (now() + ahead).isoformat()
    signature = sign_message(key, moment.encode("ascii"))
    return [
        (FLEET_HTTP_PUBLIC_KEY_HEADER, base64.b64encode(node_key(key.public_key())).decode()),
        (TIMESTAMP_HEADER, moment),
        (FLEET_HTTP_SIGNATURE_HEADER, base64.b64encode(signature).decode()),
        *RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata(),
    ]


def _walk(tree: Any) -> Iterator[str]:
    pending, seen = [tree], 0
    while pending:
        one = pending.pop()
        seen += 1
        if seen > _MOST_OBJECTS:
            raise refusal("more objects than a message has")
        yield str(one.object_id)
        pending.extend(one.children)
