"""An aggregator in the hands of an attacker, and the site it talks to.

It has all of the consortium's keys: our own gateway over the aggregator's own home, with a
SuperLink that says what a test wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
from egress_samples import NODE, Question, SuperLink, reference, walk
from federation import PRIVATE, Federation, Site, small_study, wait_for
from flwr.app import RecordDict
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.run_pb2 import GetRunResponse, Run
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from serving_samples import in_own_loop

from consilium_client.home import SiteHome
from consilium_client.store import StudyStore
from consilium_common.canonical import canonical_json
from consilium_common.demo.hospitals import NAMES
from consilium_common.errors import ConsiliumError
from consilium_common.flower_bundle import bundle, bundle_hash
from consilium_common.identity.certificates import read_certificate
from consilium_common.identity.keys import load_signing_key
from consilium_common.ledger.store import Ledger
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack
from consilium_common.study import Study
from consilium_common.wire.messages import Instructions, Reference, to_site, update_of
from consilium_common.wire.methods import CHUNK_BYTES, SITE_DELIVER, SITE_FETCH, SITE_WITNESS
from consilium_server.acts import Acts
from consilium_server.fleet import Arrivals, Pulled
from consilium_server.gateway import Gateway
from consilium_server.home import ServerHome
from consilium_server.issuing import load_issuer
from consilium_server.peers import Doorkeeper, Peer
from consilium_server.registry import Registry
from consilium_server.scheduler import Scheduler
from consilium_server.services import services
from consilium_server.transfers import Line
from consilium_server.witness import Witness, WitnessKey

HOSPITAL = NAMES[1]
COHORT = 5
HONEST_RUN = 5
Lie = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


class Compromised(SuperLink):
    """The aggregator: its own gateway and services, and a Flower that is the attacker's.

    Attributes
    ----------
    lies : dict
        By method of our own services: turns request and true answer into what is answered.
    files : dict
        The updates that came, by their SHA-256.
    """

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        self.lies: dict[str, Lie] = {}
        #: What Site/Fetch answers under a name, whatever the name says.
        self.models: dict[str, bytes] = {}
        self._federation = federation
        self._bundles = {HONEST_RUN: (bundle_hash(), bundle())}

    def offer(self, content: bytes) -> Reference:
        """Have a model ready under its true name."""
        named = reference(content)
        self.models[named.sha256] = content
        return named

    def send_bundle(self, run_id: int, claimed: str, content: bytes) -> None:
        """Answer GetRun and GetFab of a run with this."""
        self._bundles[run_id] = (claimed, content)

    def send(self, question: Question) -> None:
        """Have a message wait for the site."""
        self.objects |= question.objects
        self.waiting.append(question)

    def replies_to(self, question: Question) -> list[PushMessagesRequest]:
        """Return the site's whole replies to a message."""
        return [
            reply
            for reply in self.replies
            if reply.messages_list[0].metadata.reply_to_message_id == question.message_id
            and set(walk(reply.message_object_trees[0])) <= self.received.keys()
        ]

    def ask(self, question: Question) -> PushMessagesRequest:
        """Send a message to the site and return its one reply."""
        self.send(question)
        (reply,) = wait_for(lambda: self.replies_to(question), "a reply of the site", timeout=90)
        return reply

    # --- what a gateway asks of the forwarder -----------------------------------------------

    async def forward(self, call: str, body: bytes, headers: Any) -> tuple[int, bytes]:
        return 200, self._answer(call, body, dict(headers))

    async def pull(self, node: str, body: bytes, headers: Any, admit: Callable[[], Any]) -> Pulled:
        end = time.monotonic() + 10
        while not self.waiting and time.monotonic() < end:
            await asyncio.sleep(0.05)
        status, content = await self.forward("PullMessages", body, headers)
        return Pulled(status, content, hashlib.sha256(content).hexdigest() if content else "")

    def _answer(self, call: str, body: bytes, metadata: dict[str, str]) -> bytes:
        said = super()._answer(call, body, metadata)
        run_id = getattr(self.calls[-1][1], "run_id", 0)
        claimed, content = self._bundles.get(run_id, ("", b""))
        if call == "GetRun":
            run = Run(run_id=run_id, fab_id="x/y", fab_version="1", fab_hash=claimed)
            said = GetRunResponse(run=run).SerializeToString()
        elif call == "GetFab":
            fab = Fab(hash_str=claimed, content=content)
            said = GetFabResponse(fab=fab).SerializeToString()
        elif call == "SendNodeHeartbeat":
            said = SendNodeHeartbeatResponse(success=True).SerializeToString()
        return said

    # --- the two streams -----------------------------------------------------------------------

    async def _fetch(self, _: Peer, line: Line) -> None:
        asked = json.loads(await line.read() or b"")
        content = self.models.get(asked["sha256"])
        if content is None:
            raise ConsiliumError("run.no-model", "There is none.")
        for at in range(asked["offset"], len(content), CHUNK_BYTES):
            await line.write(content[at : at + CHUNK_BYTES])

    async def _deliver(self, _: Peer, line: Line) -> None:
        announced = json.loads(await line.read() or b"")
        await line.write(b'{"held":0}')
        came = b""
        while len(came) < announced["bytes"]:
            piece = await line.read()
            assert piece is not None
            came += piece
        self.files[reference(came).sha256] = came
        await line.write(canonical_json({"held": len(came)}))

    # --- serving -----------------------------------------------------------------------------

    def serving(self) -> AbstractContextManager[None]:
        """Serve at the aggregator's address until the end of the block."""
        return in_own_loop(self._start)

    async def _start(self) -> Callable[[], Awaitable[Any]]:
        home = ServerHome.existing(self._federation.home)
        registry = Registry(home.database)
        registry.set_node(HOSPITAL, NODE)
        issuer = load_issuer(home)
        key = witness_key(home)
        honest = services(
            home,
            registry,
            issuer,
            None,  # type: ignore[arg-type]
            Witness(registry, key),
            scheduler=Scheduler(home, registry, None, lambda: False),  # type: ignore[arg-type]
        )
        gateway = Gateway(
            Doorkeeper(lambda: issuer.trust, registry, Acts(registry, key)),
            self,  # type: ignore[arg-type]
            Arrivals(home.arrived),
            {method: self._lying(method, service) for method, service in honest.items()},
            {SITE_FETCH: self._fetch, SITE_DELIVER: self._deliver},
        )
        await gateway.start("127.0.0.1", self._federation.port, home.identity)

        async def stop() -> None:
            await gateway.stop(0.1)
            held = asyncio.all_tasks() - {asyncio.current_task()}
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)

        return stop

    def _lying(self, method: str, service: Any) -> Any:
        async def answer(peer: Any, request: dict[str, Any]) -> Any:
            lie = self.lies.get(method)
            if lie is not None and method == SITE_WITNESS:
                return lie(request, {})
            said = await service(peer, request)
            return said if lie is None else lie(request, said)

        return answer


def content_of(reply: PushMessagesRequest, objects: dict[str, bytes]) -> RecordDict:
    """Return what a reply carries."""
    own = reply.message_object_trees[0].object_id
    of_it = {name: objects[name] for name in walk(reply.message_object_trees[0])}
    content: RecordDict = inflate_object_from_contents(own, of_it).content
    return content


def witness_key(home: ServerHome) -> WitnessKey:
    """Return the aggregator's own."""
    key = load_signing_key(home.identity / "witness-key.pem")
    return WitnessKey(key, read_certificate(home.identity / "witness.pem"))


class Scene:
    """The site, its approved studies, and the aggregator that was honest until now."""

    def __init__(self, federation: Federation, aggregator: Compromised) -> None:
        self.federation = federation
        self.aggregator = aggregator
        self.site: Site = federation.sites[HOSPITAL]
        self.digests: dict[str, str] = {}
        self._clock = time.time()

    def approve(self) -> None:
        """Propose the study and approve it, with all that a site checks then."""
        self.digests["approved"] = self.federation.propose(self.study("approved").to_canonical())
        approval = ("approve", self.digests["approved"], "--yes", "--cohort-size", COHORT)
        self.site(*approval).data  # noqa: B018

    def decide(self, name: str, decisions: Sequence[str]) -> None:
        """Have the site remember decisions about a study of that name, one after the other."""
        study = self.study(name)
        store = StudyStore(SiteHome.existing(self.site.home))
        for decision in decisions:
            store.decide(study, decision, COHORT, "")
        self.digests[name] = study.digest

    @staticmethod
    @cache
    def study(name: str) -> Study:
        """Return the one study under another name, and so another digest."""
        parts = {**PRIVATE, "evaluation": {"release": "private", "epsilon": 0.5}}
        document = small_study(name, federation={"rounds": 6, "quorum": 1}, **parts)
        return Study.model_validate({**document, "statistics": {"epsilon": 0.5, "of": ["classes"]}})

    def model(self, **changes: np.ndarray[Any, Any] | None) -> bytes:
        """Return the starting model of the approved study, with tensors replaced or left out."""
        tensors: dict[str, Any] = {**initial_weights(self.study("approved")), **changes}
        return pack({name: one for name, one in tensors.items() if one is not None})

    def question(
        self,
        kind: str,
        number: int = 0,
        *,
        study: str = "approved",
        blob: bytes | None = None,
        model: Reference | None = None,
        cohort: int = COHORT,
        content: RecordDict | None = None,
        run_id: int = HONEST_RUN,
    ) -> Question:
        if content is None:
            digest = self.digests.get(study, study)
            if kind == "query":
                model = None
            elif model is None:
                model = self.aggregator.offer(self.model() if blob is None else blob)
            content = to_site(Instructions(digest, number, cohort, model=model))
        self._clock += 1  # so that no two messages have one id
        return Question(
            self.study("approved"), kind, content=content, created_at=self._clock, run_id=run_id
        )

    def ask(self, kind: str, number: int = 0, **how: Any) -> PushMessagesRequest:
        return self.aggregator.ask(self.question(kind, number, **how))

    def refused(self, kind: str, number: int = 0, **how: Any) -> str:
        """Ask for something that must be refused; return the code of the reply."""
        reply = self.ask(kind, number, **how)
        assert list(reply.message_object_trees[0].children) == [], "something left"
        return str(json.loads(reply.messages_list[0].error.reason)["code"])

    def released(self, kind: str, number: int = 0, **how: Any) -> list[str]:
        """Ask for something honest; return the ids of all that was sent."""
        reply = self.ask(kind, number, **how)
        assert not reply.messages_list[0].HasField("error"), reply.messages_list[0].error.reason
        ids = walk(reply.message_object_trees[0])[1:]
        assert ids
        if kind == "train":
            named = update_of(content_of(reply, self.aggregator.received))
            assert len(self.aggregator.files[named.sha256]) == named.bytes
        return ids

    def ledger(self) -> list[tuple[str, str, str, int]]:
        """Return every entry of the ledger: its hash, kind, purpose and round."""
        with Ledger.open(self.site.home / "ledger.db", site=HOSPITAL) as ledger:
            return [
                (e.hash, e.kind, e.body.get("purpose", ""), e.body.get("round", -1))
                for e in ledger.from_entry(0, 500)
            ]

    def charges(self, purpose: str, number: int) -> int:
        return sum(row[1:] == ("charge", purpose, number) for row in self.ledger())

    @contextlib.contextmanager
    def nothing_charged(self) -> Iterator[None]:
        before = self.ledger()
        yield
        assert self.ledger() == before
