"""What leaves is made by the link, from what was asked, stored and charged: no other byte."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from egress_samples import (
    MODEL,
    NODE,
    RUN,
    SERVER,
    Question,
    SuperLink,
    SuperNode,
    converse,
    plain_study,
    private_study,
    reference,
    trained,
    update_of,
    update_reply,
    walk,
)
from site_samples import JoinedSite

from consilium_client import link as link_module
from consilium_client.link import Link
from consilium_client.receipts import receipt_rows
from consilium_client.received import wait_for_model
from consilium_client.store import StudyStore
from consilium_client.transfers import Transfers
from consilium_common.errors import ConsiliumError
from consilium_common.wire.messages import Instructions, Reference, to_server, to_site
from consilium_common.wire.methods import SITE_DELIVER


@pytest.mark.parametrize("study", [plain_study(), private_study()], ids=["plain", "private"])
def test_an_honest_reply_arrives_whole_and_is_made_anew(site: JoinedSite, study: Any) -> None:
    blob = trained(site, study)
    question = Question(study)
    superlink = SuperLink(question)
    statuses: list[int] = []

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        statuses.extend(await node.send(update_reply(question, blob)))

    assert converse(site, superlink, talk) == []
    assert set(statuses) == {200}
    (request,) = superlink.replies
    (message,) = request.messages_list
    metadata = message.metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.dst_node_id) == (RUN, NODE, SERVER)
    assert metadata.reply_to_message_id == question.message_id
    assert (metadata.created_at, metadata.ttl) == (1.9e9, 3600.0)  # the question's, not the clock's
    assert list(request.clientapp_runtime_list) == [0.0]
    names = set(walk(request.message_object_trees[0]))
    assert set(superlink.received) == names
    # The update itself went over a stream, which said its name and length and no more.
    assert superlink.files == {hashlib.sha256(blob).hexdigest(): blob}
    announced, *pieces = [said for method, said in superlink.streamed if method == SITE_DELIVER]
    assert json.loads(announced) == {
        "study": study.digest,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "bytes": len(blob),
    }
    assert b"".join(pieces) == blob
    for name, content in superlink.received.items():
        assert hashlib.sha256(content).hexdigest() == name
    assert metadata.message_id in names
    (row,) = receipt_rows(site.home.receipts, site.signer.public_key(), "north-clinic", "")
    assert row["sent"] is True
    assert row["release"]["sha256"] == hashlib.sha256(blob).hexdigest()
    assert (row["release"]["event"] is None) == (study.privacy.mode == "none")


def test_the_model_that_a_message_names_is_fetched_while_the_message_is_read(
    site: JoinedSite,
) -> None:
    study = plain_study()
    StudyStore(site.home).decide(study, "approved", 20, "")
    question = Question(study)
    superlink = SuperLink(question)

    async def talk(node: SuperNode, link: Link) -> None:
        await node.take(question)
        (task,) = link._transfers._tasks.values()
        await task

    assert converse(site, superlink, talk) == []
    (asked,) = [json.loads(said) for _, said in superlink.streamed]
    named = reference(MODEL)
    assert asked == {"study": study.digest, "sha256": named.sha256, "offset": 0}
    assert wait_for_model(site.home, study.digest, named, 0).read_bytes() == MODEL


def test_of_a_model_larger_than_the_study_s_no_byte_is_fetched_and_the_task_is_told(
    site: JoinedSite,
) -> None:
    study = plain_study()
    StudyStore(site.home).decide(study, "approved", 20, "")
    flood = Reference("f" * 64, len(MODEL) + 1)
    question = Question(study, content=to_site(Instructions(study.digest, 0, 20, model=flood)))
    superlink = SuperLink(question)

    async def talk(node: SuperNode, link: Link) -> None:
        await node.take(question)
        (task,) = link._transfers._tasks.values()
        await task

    converse(site, superlink, talk)
    assert superlink.streamed == []
    with pytest.raises(ConsiliumError) as caught:
        wait_for_model(site.home, study.digest, flood, 5)
    assert caught.value.code == "run.bad-message"
    assert "at most" in caught.value.message


def test_of_a_study_that_is_not_approved_no_model_is_fetched(site: JoinedSite) -> None:
    study = plain_study()
    question = Question(study)
    superlink = SuperLink(question)

    async def talk(node: SuperNode, link: Link) -> None:
        await node.take(question)
        assert link._transfers._tasks == {}

    converse(site, superlink, talk)
    assert superlink.streamed == []


def test_a_reply_follows_its_file_and_never_comes_without_it(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = plain_study()
    blob = trained(site, study)
    question = Question(study)
    superlink = SuperLink(question)
    arrives = asyncio.Event()
    whole = superlink.stream

    @contextlib.asynccontextmanager
    async def stream(method: str) -> AsyncIterator[Any]:
        if method == SITE_DELIVER:
            await arrives.wait()
        async with whole(method) as found:
            yield found

    monkeypatch.setattr(superlink, "stream", stream)
    monkeypatch.setattr(link_module, "_DELIVERY_SECONDS", 0.05)

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        reply = update_reply(question, blob)
        for _ in range(2):
            assert await node.send(reply) == [503]  # the SuperNode comes again
            assert superlink.replies == []
        arrives.set()
        assert set(await node.send(reply)) == {200}

    converse(site, superlink, talk)
    assert set(superlink.files) == {hashlib.sha256(blob).hexdigest()}
    # Asked three times, delivered once: an announcement, and the one piece of it.
    assert [method for method, _ in superlink.streamed].count(SITE_DELIVER) == 2


def test_a_file_that_is_exchanged_after_it_was_judged_does_not_leave(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = plain_study()
    blob = trained(site, study)
    question = Question(study)
    superlink = SuperLink(question)
    deliver = Transfers.deliver

    async def exchanging(self: Transfers, *arguments: Any) -> bool:
        (file,) = site.home.releases.iterdir()
        file.write_bytes(b"Doe^Jane".ljust(len(blob)))
        return await deliver(self, *arguments)

    monkeypatch.setattr(Transfers, "deliver", exchanging)

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        assert await node.send(update_reply(question, blob)) == [403]

    assert "privacy.update-lost" in converse(site, superlink, talk)[0]
    assert [said for method, said in superlink.streamed if method == SITE_DELIVER] == []
    (reply,) = superlink.replies
    assert json.loads(reply.messages_list[0].error.reason)["code"] == "privacy.update-lost"
    (row,) = receipt_rows(site.home.receipts, site.signer.public_key(), "north-clinic", "")
    assert row["sent"] is False


async def not_expected(*_: Any) -> bool:
    """Answer a delivery as an aggregator whose round is over."""
    raise ConsiliumError("run.not-expected", "The round is over.")


def test_an_update_that_the_aggregator_will_not_take_becomes_one_error_reply_and_no_silence(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = plain_study()
    blob = trained(site, study)
    question = Question(study)
    superlink = SuperLink(question)

    async def taken(*_: Any) -> bool:
        return True

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        reply = update_reply(question, blob)
        monkeypatch.setattr(Transfers, "deliver", not_expected)
        assert await node.send(reply) == [403]
        # The error has been told: what would be taken now is a second reply.
        monkeypatch.setattr(Transfers, "deliver", taken)
        assert await node.send(reply) == [403]

    assert "run.not-expected" in converse(site, superlink, talk)[0]
    (told,) = superlink.replies
    assert json.loads(told.messages_list[0].error.reason)["code"] == "run.not-expected"


def test_a_reply_that_was_sent_stays_the_only_one_though_its_file_is_refused_later(
    site: JoinedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = plain_study()
    blob = trained(site, study)
    question = Question(study)
    superlink = SuperLink(question)

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        reply = update_reply(question, blob)
        await node.post("PushMessages", reply.request.SerializeToString())  # and the line broke
        monkeypatch.setattr(Transfers, "deliver", not_expected)
        assert await node.send(reply) == [403]

    converse(site, superlink, talk)
    (reply,) = superlink.replies
    assert not reply.messages_list[0].HasField("error")


def test_flower_takes_in_the_reply_that_the_link_makes(site: JoinedSite) -> None:
    from flwr.app import Message

    study = plain_study()
    blob = trained(site, study)
    question = Question(study)
    superlink = SuperLink(question)

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        await node.send(update_reply(question, blob))

    converse(site, superlink, talk)
    (request,) = superlink.replies
    own = request.messages_list[0].metadata.message_id
    content = to_server(reference(blob), None)
    found = Message.inflate(superlink.received[own], {content.object_id: content})
    assert found.metadata.reply_to_message_id == question.message_id


def test_what_was_sent_once_may_be_sent_again_and_has_one_receipt(site: JoinedSite) -> None:
    study = private_study()
    blob = trained(site, study)
    first, second = Question(study), Question(study, created_at=1.9e9 + 5)
    superlink = SuperLink(first, second)

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(first)
        reply = update_reply(first, blob)
        await node.post("PushMessages", reply.request.SerializeToString())  # and the line broke
        assert set(await node.send(reply)) == {200}
        await node.take(second)
        assert set(await node.send(update_reply(second, blob))) == {200}

    assert converse(site, superlink, talk) == []
    assert superlink.replies[0] == superlink.replies[1]
    assert len(receipt_rows(site.home.receipts, site.signer.public_key(), "north-clinic", "")) == 1


def test_a_refused_reply_becomes_an_error_reply_in_our_words_and_is_counted(
    site: JoinedSite,
) -> None:
    study = private_study()
    trained(site, study)
    question = Question(study)
    superlink = SuperLink(question)

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        reply = update_reply(question, update_of(study, 0.5))
        assert await node.send(reply) == [403]
        assert await node.send(reply) == [403]

    said = converse(site, superlink, talk)
    assert len(said) == 2
    assert "privacy.egress" in said[0]
    first, again = superlink.replies
    assert first == again
    assert json.loads(first.messages_list[0].error.reason)["code"] == "privacy.egress"
    assert set(superlink.received) == {first.messages_list[0].metadata.message_id}
    refused = json.loads(site.home.refused.read_text())
    assert (refused["count"], refused["call"], refused["code"]) == (
        2,
        "PushMessages",
        "privacy.egress",
    )
    assert not receipt_rows(site.home.receipts, site.signer.public_key(), "north-clinic", "")


def test_a_site_that_withdraws_in_mid_upload_sends_no_further_object(site: JoinedSite) -> None:
    from flwr.proto.fleet_pb2 import PushMessagesResponse

    study = plain_study()
    blob = trained(site, study)
    question = Question(study)
    superlink = SuperLink(question)

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        reply = update_reply(question, blob)
        announced = await node.post("PushMessages", reply.request.SerializeToString())
        response = PushMessagesResponse.FromString(announced.body)
        StudyStore(site.home).decide(study, "declined", 0, "no")
        name = response.objects_to_push[-1]
        pushed = await node.call(
            "PushObject",
            node={"node_id": NODE},
            run_id=RUN,
            object_id=name,
            object_content=reply.objects[name],
            session_id=response.session_id,
        )
        assert pushed.status == 403

    converse(site, superlink, talk)
    assert superlink.received == {}
    (row,) = receipt_rows(site.home.receipts, site.signer.public_key(), "north-clinic", "")
    assert row["sent"] is False


def test_headers_are_the_links_own(site: JoinedSite) -> None:
    superlink = SuperLink()

    async def talk(node: SuperNode, link: Link) -> None:
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        from consilium_client.flower_private_fleet import make_request

        key = public_key_to_bytes(link._key.public_key())
        body = make_request("ActivateNode", public_key=key, heartbeat_interval=30)
        headers = {"flwr-signature": "free words", "flwr-package-version": "words", "cookie": "c"}
        assert (await node.post("ActivateNode", body.SerializeToString(), headers)).status == 200

    converse(site, superlink, talk)
    ((_, _, metadata),) = superlink.calls
    assert "words" not in json.dumps(metadata)
    assert set(metadata) == {
        "flwr-public-key",
        "flwr-timestamp",
        "flwr-signature",
        "flwr-package-name",
        "flwr-package-version",
        "flwr-component-name",
    }
