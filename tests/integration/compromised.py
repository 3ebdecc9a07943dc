"""An aggregator in the hands of an attacker, and the site it talks to.

It has all of the consortium's keys: our own gateway over the aggregator's own home, with a
SuperLink that says what a test wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from egress_samples import NODE, Question, SuperLink, walk
from federation import PRIVATE, Federation, Site, small_study, wait_for
from flwr.app import RecordDict
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.run_pb2 import GetRunResponse, Run

from consilium_client.home import SiteHome
from consilium_client.store import StudyStore
from consilium_common.demo.hospitals import NAMES
from consilium_common.flower_bundle import bundle, bundle_hash
from consilium_common.identity.certificates import read_certificate
from consilium_common.identity.keys import load_signing_key
from consilium_common.ledger.store import Ledger
from consilium_common.models.registry import initial_weights
from consilium_common.models.weights import pack
from consilium_common.study import Study
from consilium_common.wire.messages import Instructions, to_site
from consilium_common.wire.methods import SITE_WITNESS
from consilium_server.acts import Acts
from consilium_server.fleet import Arrivals
from consilium_server.gateway import Gateway
from consilium_server.home import ServerHome
from consilium_server.issuing import load_issuer
from consilium_server.peers import Doorkeeper
from consilium_server.registry import Registry
from consilium_server.services import services
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
    """

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        self.lies: dict[str, Lie] = {}
        self._federation = federation
        self._bundles = {HONEST_RUN: (bundle_hash(), bundle())}
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()

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

    async def pull(self, body: bytes, headers: Any, admit: Callable[[], Any]) -> tuple[int, bytes]:
        end = time.monotonic() + 10
        while not self.waiting and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return await self.forward("PullMessages", body, headers)

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

    # --- serving -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve at the aggregator's address until the end of the block."""
        ready = threading.Event()
        thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(ready),), daemon=True
        )
        thread.start()
        assert ready.wait(30)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._ended.set)
            thread.join(20)
            self._loop.close()

    async def _serve(self, ready: threading.Event) -> None:
        home = ServerHome.existing(self._federation.home)
        registry = Registry(home.database)
        registry.set_node(HOSPITAL, NODE)
        issuer = load_issuer(home)
        key = witness_key(home)
        honest = services(home, registry, issuer, None, Witness(registry, key))  # type: ignore[arg-type]
        gateway = Gateway(
            Doorkeeper(lambda: issuer.trust, registry, Acts(registry, key)),
            self,  # type: ignore[arg-type]
            Arrivals(home.arrived),
            {method: self._lying(method, service) for method, service in honest.items()},
        )
        await gateway.start("127.0.0.1", self._federation.port, home.identity)
        ready.set()
        await self._ended.wait()
        await gateway.stop(0.1)
        held = asyncio.all_tasks() - {asyncio.current_task()}
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)

    def _lying(self, method: str, service: Any) -> Any:
        async def answer(peer: Any, request: dict[str, Any]) -> Any:
            lie = self.lies.get(method)
            if lie is not None and method == SITE_WITNESS:
                return lie(request, {})
            said = await service(peer, request)
            return said if lie is None else lie(request, said)

        return answer


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
        cohort: int = COHORT,
        content: RecordDict | None = None,
        run_id: int = HONEST_RUN,
    ) -> Question:
        if content is None:
            weights = None if kind == "query" else self.model() if blob is None else blob
            digest = self.digests.get(study, study)
            content = to_site(Instructions(digest, number, cohort), weights)
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
