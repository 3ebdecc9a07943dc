"""What an app hoards in its context or adds in a second reply stays in the process it ran in."""

from __future__ import annotations

import secrets
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from egress_samples import (
    NODE,
    RUN,
    Question,
    SuperLink,
    SuperNode,
    converse,
    plain_study,
    reference,
    run_task,
    trained,
)
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import context_to_proto
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.run_pb2 import Run
from flwr.proto.runtime_pb2 import (
    PullAppMessagesResponse,
    PullTaskInputResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
    PushTaskOutputRequest,
)
from flwr.supercore import heartbeat
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from site_samples import JoinedSite

from consilium_client.link import Link
from consilium_client.store import StudyStore
from consilium_common.flower_bundle import bundle, bundle_hash
from consilium_common.wire.messages import to_server

_MIB = 2**20
HOARD = np.frombuffer(secrets.token_bytes(8 * _MIB), np.uint8)


class SuperNodeRuntime:
    """The SuperNode's end of a task: gives message and context, and keeps all it is given."""

    def __init__(self, question: Question) -> None:
        self._question = question
        state = RecordDict()
        self._context = context_to_proto(Context(RUN, NODE, {}, state, {}))
        self.given: list[Any] = []

    def PullTaskInput(self, _: Any) -> Any:
        fab = Fab(hash_str=bundle_hash(), content=bundle())
        return PullTaskInputResponse(context=self._context, run=Run(run_id=RUN), fab=fab, task_id=1)

    def PullMessages(self, _: Any) -> Any:
        outline = PullMessagesResponse.FromString(self._question.response())
        return PullAppMessagesResponse(
            messages_list=outline.messages_list,
            message_object_trees=outline.message_object_trees,
        )

    def PullObject(self, request: Any) -> Any:
        content = self._question.objects[request.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, _: Any) -> None: ...

    def PushMessages(self, request: Any) -> Any:
        self.given.append(request)

        def names(tree: ObjectTree) -> list[str]:
            return [tree.object_id, *(name for child in tree.children for name in names(child))]

        return PushAppMessagesResponse(objects_to_push=names(request.message_object_trees[0]))

    def PushObject(self, request: Any) -> Any:
        self.given.append(request)
        return PushObjectResponse(stored=True)

    def PushTaskOutput(self, request: Any) -> None:
        self.given.append(request)
        if request.HasField("context"):
            self._context = request.context

    def close(self) -> None: ...

    def replies(self) -> list[Any]:
        """Return the replies as the SuperNode passes them on."""
        found = []
        for one in self.given:
            if isinstance(one, PushAppMessagesRequest):
                request = PushMessagesRequest(
                    node={"node_id": NODE},
                    messages_list=one.messages_list,
                    message_object_trees=one.message_object_trees,
                )
                found.append(SimpleNamespace(request=request, objects={}))
            elif isinstance(one, PushObjectRequest):
                found[-1].objects[one.object_id] = one.object_content
        return found


@pytest.fixture
def question(site: JoinedSite, monkeypatch: pytest.MonkeyPatch) -> Question:
    """A round of a study that the site approved and has trained; nobody hears a heartbeat."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    quiet = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(heartbeat, "HeartbeatSender", lambda _: quiet)
    trained(site, plain_study())
    return Question(plain_study())


def run(runtime: SuperNodeRuntime, app: ClientApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RuntimeHttpClient, "from_server_address", lambda **_: runtime)
    run_task(app)


def test_nothing_that_an_app_hoards_in_its_context_is_given_away(
    site: JoinedSite, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StudyStore(site.home).update(plain_study().digest, 0)
    assert stored is not None
    content = to_server(reference(stored.blob), None)
    found: list[list[str]] = []
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        found.append(list(context.state))
        context.state["hoard"] = ArrayRecord([HOARD])
        return Message(content=content, reply_to=message)

    runtime = SuperNodeRuntime(question)
    run(runtime, app, monkeypatch)
    run(runtime, app, monkeypatch)
    assert found == [[], []]  # nor is it there when the app is run again
    assert sum(isinstance(one, PushTaskOutputRequest) for one in runtime.given) == 2
    whole = b"".join(one.SerializeToString() for one in runtime.given)
    assert len(whole) < 64 * 1024
    assert HOARD[:64].tobytes() not in whole


def test_a_second_reply_with_a_hoard_stops_at_the_link(
    site: JoinedSite, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.supernode.runtime.run_clientapp import push_message

    stored = StudyStore(site.home).update(plain_study().digest, 0)
    assert stored is not None
    honest = to_server(reference(stored.blob), None)
    runtime = SuperNodeRuntime(question)
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        hoard = RecordDict({"hoard": ArrayRecord([HOARD])})
        push_message(runtime, Message(content=hoard, reply_to=message), context)  # type: ignore[arg-type]
        return Message(content=honest, reply_to=message)

    run(runtime, app, monkeypatch)
    hoarding, honest_one = runtime.replies()
    superlink = SuperLink(question)

    async def talk(node: SuperNode, _: Link) -> None:
        await node.take(question)
        assert set(await node.send(honest_one)) == {200}
        assert await node.send(hoarding) == [403]
        for name, part in hoarding.objects.items():
            pushed = await node.call(
                "PushObject",
                node={"node_id": NODE},
                run_id=RUN,
                object_id=name,
                object_content=part,
                session_id="session-1",
            )
            assert pushed.status in (403, 413)

    converse(site, superlink, talk)
    (reply,) = superlink.replies
    assert not reply.messages_list[0].HasField("error")
    went = [*superlink.received.values(), *(part for _, part in superlink.streamed)]
    assert list(superlink.files.values()) == [stored.blob]
    assert sum(map(len, went)) < len(stored.blob) + 64 * 1024
    assert not any(HOARD[:64].tobytes() in part for part in went)
