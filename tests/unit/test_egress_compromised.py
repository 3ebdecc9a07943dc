"""Whatever a compromised process says to the link, an allowed message leaves or nothing does."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from egress_samples import (
    NODE,
    RUN,
    Question,
    Reply,
    SuperLink,
    SuperNode,
    converse,
    evaluated,
    evaluating_study,
    exact_study,
    plain_study,
    private_study,
    reference,
    trained,
    update_of,
    update_reply,
    walk,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from site_samples import JoinedSite

from consilium_client.error_replies import error_reason
from consilium_client.flower_private_fleet import make_request
from consilium_client.link import Link
from consilium_common.errors import ConsiliumError
from consilium_common.wire.messages import Reference, to_server
from consilium_common.wire.methods import FLEET_PATHS, SITE_DELIVER

SECRET = b"Doe^Jane 1970-01-01"


def leaks(superlink: SuperLink) -> bool:
    """Whether anything that carries the secret reached the aggregator."""
    sent = [request.SerializeToString() for _, request, _ in superlink.calls]
    sent += [repr(metadata).encode() for _, _, metadata in superlink.calls]
    sent += [said for _, said in superlink.streamed]
    return any(SECRET in one or SECRET.decode() in one.decode("latin-1") for one in sent)


def delivered(superlink: SuperLink) -> list[bytes]:
    """Return all that went over the stream that takes updates."""
    return [said for method, said in superlink.streamed if method == SITE_DELIVER]


def only_a_refusal(superlink: SuperLink) -> bool:
    """Whether no reply but our own words of a refusal arrived."""
    return all(
        request.messages_list[0].error.reason == error_reason(ConsiliumError(code_of(request), ""))
        for request in superlink.replies
    )


def code_of(request: PushMessagesRequest) -> str:
    return str(json.loads(request.messages_list[0].error.reason)["code"])


def hidden(content: Any) -> Any:
    content["notes"] = ConfigRecord({"patient": SECRET.decode()})
    return content


def longer(content: Any) -> Any:
    pixels = Array("float32", (1,), "numpy.ndarray", SECRET)
    content["more"] = ArrayRecord({"pixels": pixels})
    return content


def in_the_reference(content: Any) -> Any:
    content["update"]["patient"] = SECRET.decode()
    return content


def with_metrics(content: Any, value: float, key: str = "loss") -> Any:
    content["figures"] = MetricRecord({key: value})
    return content


NAN = struct.unpack("<d", struct.pack("<Q", 0x7FF8_4A61_6E65_0001))[0]
SUBNORMAL = struct.unpack("<d", struct.pack("<Q", 0x0000_4A61_6E65_0001))[0]
CONTENTS: dict[str, Callable[[bytes], Any]] = {
    "another update": lambda _: to_server(reference(update_of(plain_study(), 0.5)), None),
    "pixels as weights": lambda _: to_server(reference(SECRET * 1000), None),
    "another length": lambda blob: to_server(replace(reference(blob), bytes=19700101), None),
    "a hash of its own": lambda blob: to_server(
        Reference(SECRET.hex().ljust(64, "0"), len(blob)), None
    ),
    "a further word": lambda blob: in_the_reference(to_server(reference(blob), None)),
    "an extra record": lambda blob: hidden(to_server(reference(blob), None)),
    "an extra array": lambda blob: longer(to_server(reference(blob), None)),
    "a NaN with a message": lambda blob: with_metrics(to_server(reference(blob), None), NAN),
    "a subnormal with a message": lambda blob: with_metrics(
        to_server(reference(blob), None), SUBNORMAL
    ),
    "a long key": lambda blob: with_metrics(
        to_server(reference(blob), None), 1.0, SECRET.decode() * 500
    ),
    "words of its own": lambda _: Error(code=0, reason=SECRET.decode()),
    "a code of its own": lambda _: Error(
        code=0, reason=json.dumps({"code": "data.doe-jane", "message": SECRET.decode()})
    ),
    "a number of its own": lambda _: Error(code=19700101, reason=error_reason_of("run.round")),
}


def error_reason_of(code: str) -> str:
    return error_reason(ConsiliumError(code, ""))


@pytest.mark.parametrize("study", [plain_study(), private_study()], ids=["plain", "private"])
@pytest.mark.parametrize("what", CONTENTS)
def test_a_reply_with_other_content_than_was_stored_gets_nothing_out(
    site: JoinedSite, study: Any, what: str
) -> None:
    blob = trained(site, study)
    question = Question(study)
    superlink = SuperLink(question)

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        await node.send(Reply(question, CONTENTS[what](blob)))

    converse(site, superlink, talk)
    assert only_a_refusal(superlink)
    assert not leaks(superlink)
    assert not site.home.receipts.exists()
    assert delivered(superlink) == []
    # Its number is ours too.
    raised = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert {one.messages_list[0].error.code for one in superlink.replies} == {raised}


def metadata(request: PushMessagesRequest) -> Any:
    return request.messages_list[0].metadata


def change(name: str, value: Any) -> Callable[[PushMessagesRequest], None]:
    def apply(request: PushMessagesRequest) -> None:
        setattr(metadata(request), name, value)

    return apply


def grow(request: PushMessagesRequest) -> None:
    request.message_object_trees[0].children.append(ObjectTree(object_id="e" * 64))


def nest(request: PushMessagesRequest) -> None:
    tree = request.message_object_trees[0].children[0]
    tree.children.append(ObjectTree(object_id=SECRET.hex().ljust(64, "0")))


def twice(request: PushMessagesRequest) -> None:
    request.messages_list.append(request.messages_list[0])
    request.message_object_trees.append(request.message_object_trees[0])


def inline(request: PushMessagesRequest) -> None:
    request.messages_list[0].content.items.add(key=SECRET.decode())


def error_too(request: PushMessagesRequest) -> None:
    request.messages_list[0].error.reason = SECRET.decode()


DISGUISES: dict[str, Callable[[PushMessagesRequest], None]] = {
    "group": change("group_id", SECRET.decode()),
    "kind": change("message_type", SECRET.decode()),
    "time": change("created_at", 1970.0101),
    "lifetime": change("ttl", 1970.0101),
    "run": change("run_id", 1970),
    "sender": change("src_node_id", 1970),
    "receiver": change("dst_node_id", 1970),
    "task": change("src_task_id", 1970),
    "its own name": change("message_id", SECRET.decode()),
    "what it answers": change("reply_to_message_id", SECRET.decode()),
    "node": lambda request: setattr(request.node, "node_id", 1970),
    "duration": lambda request: request.clientapp_runtime_list.append(1970.0),
    "one more object": grow,
    "one more object below": nest,
    "two messages": twice,
    "inline content": inline,
    "an error beside content": error_too,
}


@pytest.mark.parametrize("what", DISGUISES)
def test_what_is_hidden_in_a_reply_s_outline_never_leaves(site: JoinedSite, what: str) -> None:
    study = private_study()
    blob = trained(site, study)
    question = Question(study)
    honest, disguised = SuperLink(question), SuperLink(question)

    async def plain(node: SuperNode, _: Link) -> None:
        await node.take(question)
        await node.send(update_reply(question, blob))

    async def forged(node: SuperNode, _: Link) -> None:
        await node.take(question)
        reply = update_reply(question, blob)
        DISGUISES[what](reply.request)
        await node.send(reply)

    converse(site, honest, plain)
    converse(site, disguised, forged)
    # The file that left is the stored one, or none did.
    assert set(disguised.files) <= set(honest.files) == {reference(blob).sha256}
    assert len(delivered(disguised)) in (0, 2)
    # Not one byte differs from the honest reply's, or there is a refusal in our words.
    same = [request for request in disguised.replies if request in honest.replies]
    rest = [request for request in disguised.replies if request not in honest.replies]
    disguised.replies = rest
    assert len(same) <= 1
    assert only_a_refusal(disguised)
    assert not leaks(disguised)


def test_there_is_one_reply_to_a_message_and_none_to_any_other(site: JoinedSite) -> None:
    study = evaluating_study()
    evaluated(site, study, {"sum": 1.0})
    question, foreign = Question(study, "evaluate"), Question(study, "evaluate", created_at=1.8e9)
    superlink = SuperLink(question)

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        assert await node.send(Reply(foreign, to_server(None, {"sum": 1.0}))) == [403]
        assert set(await node.send(Reply(question, to_server(None, {"sum": 1.0})))) == {200}
        # One bit more would be whether there are figures, or which error there is.
        assert await node.send(Reply(question, to_server(None, None))) == [403]
        words = error_reason_of("run.round")
        assert await node.send(Reply(question, Error(code=0, reason=words))) == [403]

    converse(site, superlink, talk)
    assert len(superlink.replies) == 1


def test_objects_leave_only_in_their_reply_s_session_and_as_they_are_named(
    site: JoinedSite,
) -> None:
    study = plain_study()
    blob = trained(site, study)
    question = Question(study)
    superlink = SuperLink(question)
    statuses: list[int] = []

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        reply = update_reply(question, blob)
        announced = await node.post("PushMessages", reply.request.SerializeToString())
        response = PushMessagesResponse.FromString(announced.body)
        name = response.objects_to_push[-1]
        content = reply.objects[name]
        honest = {
            "node": {"node_id": NODE},
            "run_id": RUN,
            "object_id": name,
            "object_content": content,
            "session_id": response.session_id,
        }
        for forged in (
            {"object_content": SECRET},
            {"object_content": content + SECRET},
            {"object_id": "e" * 64, "object_content": SECRET},
            {"object_id": SECRET.decode()},
            {"session_id": SECRET.decode()},
            {"run_id": 1970},
            {"node": {"node_id": 1970}},
        ):
            answer = await node.call("PushObject", **{**honest, **forged})
            statuses.append(answer.status)
        own = reply.message.object_id
        await node.call("PushObject", **{**honest, "object_id": own, "object_content": SECRET})
        assert (await node.call("PushObject", **honest)).status == 200

    converse(site, superlink, talk)
    assert set(statuses) == {403}
    assert not leaks(superlink)
    assert set(superlink.received) <= set(walk(superlink.replies[0].message_object_trees[0]))


def test_protocol_calls_carry_nothing_of_their_own(site: JoinedSite) -> None:
    question = Question(plain_study())
    superlink = SuperLink(question)
    node_id = {"node": {"node_id": NODE}}
    forged = [
        ("RegisterNode", {"public_key": SECRET}),
        ("ActivateNode", {"public_key": SECRET, "heartbeat_interval": 30}),
        ("ActivateNode", {"heartbeat_interval": 1970.0101}),
        ("DeactivateNode", {"node_id": 1970}),
        ("UnregisterNode", {"node_id": 1970}),
        ("SendNodeHeartbeat", {**node_id, "heartbeat_interval": 1970.0101}),
        ("SendNodeHeartbeat", {"node": {"node_id": 1970}, "heartbeat_interval": 30}),
        ("PullMessages", {**node_id, "message_ids": [SECRET.decode()]}),
        ("GetRun", {**node_id, "run_id": 1970}),
        ("GetFab", {**node_id, "run_id": RUN, "hash_str": SECRET.decode()}),
        ("PullObject", {**node_id, "run_id": RUN, "object_id": SECRET.decode()}),
        ("PullObject", {**node_id, "run_id": 1970, "object_id": question.message_id}),
        ("ConfirmMessageReceived", {**node_id, "run_id": RUN, "message_object_id": "Doe"}),
    ]
    found: dict[int, int] = {}

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        made = len(superlink.calls)
        for number, (call, values) in enumerate(forged):
            found[number] = (await node.call(call, **values)).status
        assert len(superlink.calls) == made
        assert (await node.call("GetRun", **node_id, run_id=RUN)).status == 200

    converse(site, superlink, talk)
    assert set(found.values()) == {403}
    assert not leaks(superlink)


def test_bytes_that_flower_does_not_write_are_refused(site: JoinedSite) -> None:
    superlink = SuperLink()
    statuses: list[int] = []

    async def talk(node: SuperNode, link: Link) -> None:
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        key = public_key_to_bytes(link._key.public_key())
        body = make_request("ActivateNode", public_key=key, heartbeat_interval=30)
        honest = body.SerializeToString()
        unknown = honest + b"\xfa\x01" + bytes([len(SECRET)]) + SECRET  # field 31, unknown
        again = honest + honest  # the last of two wins, and the first could say anything
        # The key's length in one byte more than it needs.
        varint = bytes([len(key) & 127 | 128, len(key) >> 7 | 128, 0])
        longer = b"\x0a" + varint + honest[honest.index(key) :]
        for one in (unknown, again, longer, b"\xff", SECRET, b""):
            answer = await node.post("ActivateNode", one)
            statuses.append(answer.status)
        # No tensor fits into what a SuperNode may say.
        assert (await node.post("PushObject", bytes(256 * 1024))).status == 403
        assert (await node.post("PushObject", bytes(256 * 1024 + 1))).status == 413

    converse(site, superlink, talk)
    assert set(statuses) == {403}
    assert superlink.calls == []


CALLS = sorted(FLEET_PATHS)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_of_mutated_frames_only_allowed_messages_leave(
    site: JoinedSite, data: st.DataObject
) -> None:
    study = exact_study()
    if not site.home.releases.exists() or not any(site.home.releases.iterdir()):
        trained(site, study)
    blob = update_of(study)
    question = Question(study)
    honest, attacked = SuperLink(question), SuperLink(question)

    async def plain(node: SuperNode, _: Link) -> None:
        await node.take(question)
        await node.send(update_reply(question, blob))
        for call in ("SendNodeHeartbeat", "DeactivateNode"):
            await node.post(call, BODIES[call])
        await node.call("GetRun", node={"node_id": NODE}, run_id=RUN)
        await node.call(
            "ConfirmMessageReceived",
            node={"node_id": NODE},
            run_id=RUN,
            message_object_id=question.message_id,
        )

    async def mutated(node: SuperNode, link: Link) -> None:
        await node.take(question)
        reply = update_reply(question, blob).request.SerializeToString()
        for _ in range(15):
            call = data.draw(st.sampled_from(CALLS))
            body = reply if call == "PushMessages" else BODIES.get(call, b"")
            body = mutate(data, body)
            link._wake.close()
            await asyncio.wait_for(node.post(call, body), 20)

    if not HONEST:
        site.home.replied.touch()
        converse(site, honest, plain)
        HONEST.extend((call, request.SerializeToString()) for call, request, _ in honest.calls)
    converse(site, attacked, mutated)
    refusals = SuperLink()
    for call, request, _ in attacked.calls:
        sent = (call, request.SerializeToString())
        if sent in HONEST:
            continue
        if call == "PushMessages":
            refusals.replies.append(request)
        elif call == "PushObject":
            names = {walk(one.message_object_trees[0])[0] for one in attacked.replies}
            assert request.object_id in names
        else:
            pytest.fail(f"{call} left as nobody honest says it")
    assert only_a_refusal(refusals)


HONEST: list[tuple[str, bytes]] = []
BODIES = {
    "SendNodeHeartbeat": make_request(
        "SendNodeHeartbeat", node={"node_id": NODE}, heartbeat_interval=30
    ).SerializeToString(),
    "DeactivateNode": make_request("DeactivateNode", node_id=NODE).SerializeToString(),
    "PullMessages": make_request("PullMessages", node={"node_id": NODE}).SerializeToString(),
    "GetRun": make_request("GetRun", node={"node_id": NODE}, run_id=RUN).SerializeToString(),
}


def mutate(data: st.DataObject, body: bytes) -> bytes:
    """Return the bytes with a few changed, added or left out."""
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(body)))
        kind = data.draw(st.sampled_from(["change", "add", "cut", "repeat"]))
        some = data.draw(st.binary(min_size=1, max_size=8))
        if kind == "change":
            body = body[:at] + some + body[at + len(some) :]
        elif kind == "add":
            body = body[:at] + some + body[at:]
        elif kind == "cut":
            body = body[:at] + body[at + len(some) :]
        else:
            body = body + body[at:]
    return body
