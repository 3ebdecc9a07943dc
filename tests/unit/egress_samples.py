"""Both sides of a site's link for tests: what a SuperLink sends, and what a SuperNode says back."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse, PushObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from site_samples import NAME, JoinedSite
from site_samples import plain_study as tiny_plain_study
from site_samples import private_study as tiny_private_study

from consilium_client import flower_private
from consilium_client.declared import Declarations, declared
from consilium_client.egress import EgressGate, Passed
from consilium_client.error_replies import error_reason
from consilium_client.flower_private_fleet import Announced, Asked, announced_in, asked_in
from consilium_client.link import Link
from consilium_client.store import StudyStore
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.ledger.entries import Purpose
from consilium_common.ledger.store import Ledger
from consilium_common.models.registry import trained_specs
from consilium_common.models.weights import pack
from consilium_common.privacy.accounting import parameters
from consilium_common.study import Study
from consilium_common.wire.messages import Instructions, Reference, to_server, to_site
from consilium_common.wire.methods import (
    CHUNK_BYTES,
    FLEET_CALL_BY_PATH,
    FLEET_PATHS,
    SITE_FETCH,
)
from consilium_common.wire.tls13 import grpc

NODE, RUN, SERVER = 77, 5, 1
PATIENTS = [hashlib.sha256(b"%d" % n).hexdigest()[:32] for n in range(4)]
FIGURES = {"sum": 1.0625}
FLAT = 0.015625
#: The global model's file, as far as a link looks at it.
MODEL = b"a model of two pieces" * (CHUNK_BYTES // 20)
#: Computed in this process, once for all tests: a process of its own takes seconds to import torch.
#: As if the studies' networks were as large as the model above.
DECLARED = Declarations(lambda study: replace(declared(study), most_received=len(MODEL)))


def reference(blob: bytes) -> Reference:
    """Return the name of a file with this content."""
    return Reference(hashlib.sha256(blob).hexdigest(), len(blob))


def buildable(study: Study, **parts: Any) -> Study:
    """Return a study whose network can be built, with other parts."""
    training = {"training": {"patch": [8, 8, 8]}}
    return Study.model_validate({**study.to_canonical(), **training, **parts})


def plain_study() -> Study:
    return buildable(tiny_plain_study())


def private_study() -> Study:
    return buildable(tiny_private_study())


def evaluating_study() -> Study:
    """Return a private study that releases noised figures."""
    evaluation = {"release": "private", "epsilon": 0.5}
    return buildable(tiny_private_study(), evaluation=evaluation)


def exact_study() -> Study:
    """Return a study without privacy that releases exact figures."""
    return Study.model_validate(
        {**plain_study().to_canonical(), "evaluation": {"release": "exact"}}
    )


def update_of(study: Study, value: float = FLAT) -> bytes:
    """Return an update of the study's form, every element the same."""
    return pack({s.name: np.full(s.shape, value, np.float32) for s in trained_specs(study)})


def gate_of(site: JoinedSite) -> EgressGate:
    return EgressGate(site.home, NAME, lambda: site.signer, DECLARED)


def charge(
    site: JoinedSite,
    study: Study,
    sha256: str | None,
    purpose: Purpose = "training",
    number: int = 0,
) -> None:
    """Charge a round as the study declares, and release ``sha256`` where one is given."""
    plan = parameters(study)
    assert plan is not None
    event = plan.event_per_round if purpose == "training" else plan.evaluation_event
    assert event is not None
    with Ledger.open(site.home.ledger, site.signer, site=NAME) as ledger:
        entry = ledger.charge(
            study=study.digest,
            round_index=number,
            event=event,
            clip_norm=plan.clip_norm,
            delta=plan.delta,
            patients=PATIENTS,
            purpose=purpose,
        )
        if sha256 is not None:
            ledger.release(entry, sha256)


def trained(site: JoinedSite, study: Study, number: int = 0, value: float = FLAT) -> bytes:
    """Approve a study, and store (and charge) a round's update as its worker does."""
    store = StudyStore(site.home)
    store.decide(study, "approved", 20, "")
    blob = update_of(study, value)
    kept = store.keep_update(study.digest, number, blob, {})
    if study.privacy.mode == "patient":
        charge(site, study, kept.sha256, number=number)
    return blob


def evaluated(site: JoinedSite, study: Study, figures: dict[str, Any]) -> None:
    """Approve a study, and store (and charge) an evaluation's figures as its worker does."""
    store = StudyStore(site.home)
    store.decide(study, "approved", 20, "")
    content = canonical_json(figures)
    kept = store.keep_update(study.digest, 0, content, figures, purpose="evaluation")
    if study.privacy.mode == "patient":
        charge(site, study, kept.sha256, "evaluation")


class Question:
    """One message of the aggregator, and the objects that it consists of."""

    def __init__(
        self,
        study: Study,
        kind: str = "train",
        number: int = 0,
        *,
        content: RecordDict | None = None,
        created_at: float = 1.9e9,
        run_id: int = RUN,
    ) -> None:
        if content is None:
            model = None if kind == "query" else reference(MODEL)
            content = to_site(Instructions(study.digest, number, 20, model=model))
        metadata = Metadata(
            run_id=run_id,
            message_id="",
            src_node_id=SERVER,
            dst_node_id=NODE,
            reply_to_message_id="",
            group_id=str(number + 1),
            created_at=created_at,
            ttl=3600.0,
            message_type=kind,
        )
        self.message = Message(metadata=metadata, content=content)
        self.objects = {name: part.deflate() for name, part in nested(self.message).items()}
        self.tree = get_object_tree(self.message)
        metadata.__dict__["_message_id"] = self.message.object_id

    @property
    def message_id(self) -> str:
        return str(self.message.metadata.message_id)

    def response(self) -> bytes:
        outline = Message(metadata=self.message.metadata, content=RecordDict())
        body: bytes = PullMessagesResponse(
            messages_list=[message_to_proto(outline)], message_object_trees=[self.tree]
        ).SerializeToString()
        return body

    def asked(self) -> Asked:
        """Return it as a link knows it that has seen all of it pass."""
        found = asked_in(self.response())
        assert found is not None
        for name, content in self.objects.items():
            found.see_object(name, content)
        return found


def nested(message: Any) -> dict[str, Any]:
    return dict(get_all_nested_objects(message))


class Reply:
    """A reply as executor and SuperNode make it: announced, then its objects one by one."""

    def __init__(self, question: Question, content: RecordDict | Error) -> None:
        self.message = Message(content, reply_to=question.message)  # type: ignore[arg-type]
        self.objects = {name: part.deflate() for name, part in nested(self.message).items()}
        self.message.metadata.__dict__["_message_id"] = self.message.object_id
        error = self.message.error if self.message.has_error() else None
        outline = None if error else RecordDict()
        bare = Message(metadata=self.message.metadata, content=outline, error=error)
        self.request = PushMessagesRequest(
            node={"node_id": NODE},
            messages_list=[message_to_proto(bare)],
            message_object_trees=[get_object_tree(self.message)],
            clientapp_runtime_list=[31.4],
        )

    def announced(self) -> Announced:
        return announced_in(self.request)


def update_reply(question: Question, blob: bytes) -> Reply:
    return Reply(question, to_server(reference(blob), None))


class SuperLink:
    """The aggregator's end of the channel: answers as Flower does, and keeps all that came."""

    def __init__(self, *questions: Question) -> None:
        self.waiting = list(questions)
        self.objects: dict[str, bytes] = {}
        for question in questions:
            self.objects |= question.objects
        self.calls: list[tuple[str, Any, dict[str, str]]] = []
        self.replies: list[PushMessagesRequest] = []
        self.received: dict[str, bytes] = {}
        #: What came over streams, message by message, and the files that came whole.
        self.streamed: list[tuple[str, bytes]] = []
        self.files: dict[str, bytes] = {}
        #: Bytes of an update that this end has already, as after a broken line.
        self.held = b""

    @contextlib.asynccontextmanager
    async def stream(self, method: str) -> AsyncIterator[Any]:
        yield _Stream(self, method)

    def unary(self, method: str) -> Callable[..., Any]:
        def invoke(body: bytes, *, metadata: Any = (), timeout: float = 0) -> Any:
            return _Call(self._answer(method.rpartition("/")[2], body, dict(metadata)))

        return invoke

    async def close(self) -> None:
        """Nothing is open."""

    def _answer(self, call: str, body: bytes, metadata: dict[str, str]) -> bytes:
        kind = PROTOBUF_REQUEST_TYPES["POST", f"/v1/fleet/{FLEET_PATHS[call]}"]
        request = kind.FromString(body)
        self.calls.append((call, request, metadata))
        answer: Any = None
        if call == "ActivateNode":
            answer = ActivateNodeResponse(node_id=NODE)
        elif call == "PullMessages" and self.waiting:
            return self.waiting.pop(0).response()
        elif call == "PullObject":
            content = self.objects.get(request.object_id, b"")
            answer = PullObjectResponse(
                object_found=bool(content), object_available=True, object_content=content
            )
        elif call == "PushMessages":
            self.replies.append(request)
            wanted = list(dict.fromkeys(walk(request.message_object_trees[0])))
            answer = PushMessagesResponse(
                objects_to_push=[name for name in wanted if name not in self.received],
                session_id=f"session-{len(self.replies)}",
            )
        elif call == "PushObject":
            self.received[request.object_id] = request.object_content
            answer = PushObjectResponse(stored=True)
        return b"" if answer is None else bytes(answer.SerializeToString())


class _Call:
    def __init__(self, answer: bytes) -> None:
        self._content = answer

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> bytes:
        await asyncio.sleep(0)
        return self._content

    async def trailing_metadata(self) -> Any:
        return ()


class _Stream:
    """One stream, answered as the aggregator answers it."""

    def __init__(self, superlink: SuperLink, method: str) -> None:
        self._superlink, self._method = superlink, method
        self._asked: dict[str, Any] | None = None
        self._came = b""
        self._answers: list[Any] = []

    async def write(self, message: bytes) -> None:
        await asyncio.sleep(0)
        self._superlink.streamed.append((self._method, message))
        if self._asked is not None:
            self._came += message
        else:
            self._asked = json.loads(message)
            if self._method == SITE_FETCH:
                rest = MODEL[self._asked["offset"] :]
                pieces = range(0, len(rest), CHUNK_BYTES)
                self._answers = [rest[at : at + CHUNK_BYTES] for at in pieces] + [grpc.aio.EOF]
                return
            self._came = self._superlink.held
            self._say()
        if len(self._came) == self._asked["bytes"]:
            self._superlink.files[hashlib.sha256(self._came).hexdigest()] = self._came
            self._say()

    async def done_writing(self) -> None:
        """All has come."""

    async def read(self) -> Any:
        while not self._answers:
            await asyncio.sleep(0.001)
        return self._answers.pop(0)

    def _say(self) -> None:
        self._answers.append(canonical_json({"held": len(self._came)}))


def walk(tree: ObjectTree) -> list[str]:
    return [tree.object_id, *(name for child in tree.children for name in walk(child))]


class SuperNode:
    """Talks to a link as a SuperNode does, honestly or not."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def post(self, call: str, body: bytes, headers: dict[str, str] | None = None) -> Any:
        """Make one call; returns status and parsed response."""
        sent: list[Any] = []
        events = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            return events.pop(0)

        async def send(event: Any) -> None:
            sent.append(event)

        scope = {
            "type": "http",
            "method": "POST",
            "path": f"/v1/fleet/{FLEET_PATHS[call]}",
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
        }
        await self._link.application(scope, receive, send)
        return SimpleNamespace(status=sent[0]["status"], body=sent[1]["body"])

    async def call(self, call: str, /, **values: Any) -> Any:
        kind = PROTOBUF_REQUEST_TYPES["POST", f"/v1/fleet/{FLEET_PATHS[call]}"]
        return await self.post(call, kind(**values).SerializeToString())

    async def take(self, question: Question) -> None:
        """Activate, and pull a message with all its objects."""
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        key = public_key_to_bytes(self._link._key.public_key())
        await self.call("ActivateNode", public_key=key, heartbeat_interval=30)
        await self.call("PullMessages", node={"node_id": NODE})
        for name in question.objects:
            await self.call("PullObject", node={"node_id": NODE}, run_id=RUN, object_id=name)

    async def send(self, reply: Reply) -> list[int]:
        """Send a reply; returns the status of each call."""
        announced = await self.post("PushMessages", reply.request.SerializeToString())
        found = [announced.status]
        if announced.status == 200:
            response = PushMessagesResponse.FromString(announced.body)
            for name in response.objects_to_push:
                pushed = await self.call(
                    "PushObject",
                    node={"node_id": NODE},
                    run_id=RUN,
                    object_id=name,
                    object_content=reply.objects[name],
                    session_id=response.session_id,
                )
                found.append(pushed.status)
        return found


def converse(
    site: JoinedSite,
    superlink: SuperLink,
    talk: Callable[[SuperNode, Link], Any],
) -> list[str]:
    """Run a conversation through a site's link; returns what it told the operator."""
    said: list[str] = []

    async def scenario() -> None:
        link = Link(site.home, site.identity, said.append)
        link._gate._declarations = DECLARED
        await link._connection.close()
        link._connection = superlink  # type: ignore[assignment]
        link._transfers._connection = superlink  # type: ignore[assignment]
        try:
            await talk(SuperNode(link), link)
            await asyncio.gather(*link._ahead)
        finally:
            await link.close()

    asyncio.run(scenario())
    return said


def call_of(path: Path) -> str:
    """Return the Fleet call under a path."""
    return FLEET_CALL_BY_PATH[path.name]


def judge(gate: EgressGate, question: Question, content: Any) -> Passed:
    return gate.judge(question.asked(), Reply(question, content).announced(), NODE)


def refused(action: Callable[[], object], code: str = "privacy.egress") -> bool:
    """Whether the gate refuses; any other error is none of its own."""
    try:
        action()
    except ConsiliumError as error:
        assert error.code == code, error
        return True
    return False


def run_task(app: Any) -> None:
    """Have one task done as the site's executor does it; who calls says what Flower's ends are."""
    flower_private.run_client_task(
        "127.0.0.1:1",
        "token",
        app,
        public_reason=error_reason,
        watch=lambda _: lambda: False,
    )
