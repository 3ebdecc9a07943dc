"""An aggregator's home with one approved study, and sites that answer at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from study_samples import study_of

from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.models.registry import trained_specs
from consilium_common.models.weights import pack, unpack
from consilium_common.study import Study
from consilium_common.wire.messages import Reference, instructions_of, to_server
from consilium_server.arrivals import ArrivalLists
from consilium_server.home import ServerConfig, ServerHome
from consilium_server.overview import study_overview
from consilium_server.registry import Registry
from consilium_server.round_tables import round_now
from consilium_server.rounds import StudyRun
from consilium_server.spending import SpendMeter
from consilium_server.study_files import StudyFiles
from consilium_server.tables import Approval, Member, StudyRow, now

SITES = ("east", "north", "south")
Weights = dict[str, NDArray[np.float32]]


def a_study(**changes: dict[str, Any]) -> Study:
    """A study without privacy; ``changes`` replace keys of its parts."""
    canonical = study_of(arguments={"channels": [4, 8], "strides": [2]}).to_canonical()
    canonical["federation"] |= {"rounds": 2, "quorum": 2, "deadline_seconds": 20}
    for part, values in changes.items():
        canonical[part] |= values
    return Study.model_validate(canonical)


def private(*, evaluation: dict[str, Any], **changes: dict[str, Any]) -> Study:
    """A private study that releases scores."""
    canonical = a_study(**changes).to_canonical()
    canonical["privacy"] = {
        "mode": "patient",
        "sampling_rate": 0.5,
        "clip_norm": 1.0,
        "noise_multiplier": 2.0,
        "delta": 1e-3,
    }
    canonical["evaluation"] |= {"release": "private", "epsilon": 0.5, **evaluation}
    return Study.model_validate(canonical)


class Answers:
    """What the sites of a test answer; each site adds its number to every trained tensor."""

    def __init__(self, study: Study, files: StudyFiles) -> None:
        self._files = files
        self.trained = {spec.name for spec in trained_specs(study)}
        self.sums = dict.fromkeys(SITES, 0.0)
        #: What each site answers when it is asked for statistics.
        self.statistics: dict[str, dict[str, float]] = {site: {} for site in SITES}
        self.asked: list[tuple[str, int]] = []
        self.models: dict[tuple[str, int], Weights] = {}
        self.last: list[tuple[str, int]] = []
        #: Replaces a site's answer: returns content, or raises what the site replies with.
        self.instead: Callable[[str, str, int], Any] = lambda *_: None
        #: Sites that do not answer for as long as they are in here.
        self.slow: set[str] = set()
        #: Called when an answer was replaced.
        self.replaced: Callable[[str], None] = lambda kind: None

    def of(self, site: str, kind: str, content: Any) -> Any:
        asked = instructions_of(content)
        step = (kind, asked.round_index)
        if step not in self.asked:
            self.asked.append(step)
        if asked.last and step not in self.last:
            self.last.append(step)
        if asked.model is not None:
            offered = self._files.offered(asked.model.sha256)
            if offered is None:
                raise ConsiliumError("run.no-model", "This model is not on offer.")
            self.models[step] = unpack(offered.read_bytes())
        try:
            instead = self.instead(site, kind, asked.round_index)
        except ConsiliumError:
            self.replaced(kind)
            raise
        if instead is not None:
            self.replaced(kind)
            return instead
        if kind == "query":
            return to_server(None, self.statistics[site])
        if kind == "evaluate":
            return to_server(None, {"sum": self.sums[site]})
        return self.delivered(site, pack(self.update(self.models[step], site)))

    def delivered(self, site: str, blob: bytes, figures: dict[str, float] | None = None) -> Any:
        """Deliver a file as the gateway would take it; return the reply that names it."""
        reference = Reference(hashlib.sha256(blob).hexdigest(), len(blob))
        # The gateway takes nothing that is longer than an update may be.
        if self._files.arrived(site, reference) is None and len(blob) <= self._files.most(site):
            arriving = self._files.arriving(site, reference)
            arriving.open()
            arriving.write(blob)
            arriving.finish()
        return to_server(reference, figures)

    def update(self, model: Weights, site: str) -> Weights:
        return {
            name: (tensor + np.float32(SITES.index(site) + 1)).astype(np.float32)
            for name, tensor in model.items()
            if name in self.trained
        }


class SitesGrid:
    """Flower's Grid, with every site behind it answering at once, or when it is let."""

    def __init__(self, home: ServerHome, answers: Answers) -> None:
        self._home = home
        self._answers = answers
        self._count = 0
        self._replies: dict[str, Any] = {}
        self._held: list[Any] = []

    def get_node_ids(self) -> list[int]:
        self._let_answer()
        return list(range(1, len(SITES) + 1))

    def push_messages(self, messages: list[Any]) -> list[str]:
        ids = []
        for message in messages:
            identity = f"m{self._count}"
            self._count += 1
            message.metadata.__dict__["_message_id"] = identity
            ids.append(identity)
            self._held.append(message)
        self._let_answer()
        return ids

    def pull_messages(self, ids: list[str]) -> list[Any]:
        return [self._replies.pop(identity) for identity in ids if identity in self._replies]

    def _let_answer(self) -> None:
        """Have the sites answer, each its oldest message first, which are not held back."""
        for message in list(self._held):
            site = SITES[message.metadata.dst_node_id - 1]
            if site not in self._answers.slow:
                self._held.remove(message)
                self._answer(site, message)

    def _answer(self, site: str, message: Any) -> None:
        from flwr.app import Error, Message

        try:
            content = self._answers.of(site, message.metadata.message_type, message.content)
            reply = Message(content=content, reply_to=message)
        except ConsiliumError as error:
            reason = canonical_json(error.to_dict()).decode()
            reply = Message(Error(code=1, reason=reason), reply_to=message)
        self._replies[message.metadata.message_id] = reply
        arrivals = ArrivalLists(self._home.arrived)
        arrivals.add(str(message.metadata.dst_node_id), message.metadata.message_id)


class House:
    """An aggregator's home with one approved study."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.study = study
        self.home = ServerHome.create(folder)
        self.home.save_config(ServerConfig("tests", "127.0.0.1:1"))
        self.registry = Registry(self.home.database)
        self.answers = Answers(study, StudyFiles(self.home.study_folder(study.digest)))
        online = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        with self.registry.transaction() as session:
            session.add(
                StudyRow(
                    digest=study.digest,
                    name=study.name,
                    canonical=study.to_canonical(),
                    proposed_by="operator",
                    signature="",
                    signer_pem="",
                    proposed_at=now(),
                    state="running",
                )
            )
            for number, site in enumerate(SITES, start=1):
                session.add(
                    Member(
                        name=site,
                        role="site",
                        status="active",
                        serial="1",
                        certificate_pem="",
                        signer_pem="",
                        node_id=str(number),
                        joined_at=now(),
                        last_seen=online,
                    )
                )
                session.add(
                    Approval(
                        digest=study.digest,
                        site=site,
                        decision="approved",
                        why="",
                        cohort_size=10,
                        evaluation_size=4 * number,
                        signature="",
                        decided_at=now(),
                    )
                )

    def run(self) -> None:
        grid = SitesGrid(self.home, self.answers)
        StudyRun(self.home, self.registry, self.study.digest, grid).run()

    def fails(self) -> str:
        with pytest.raises(ConsiliumError) as caught:
            self.run()
        return caught.value.code

    def stuck(self, kind: str = "") -> str:
        """Run until sites answer otherwise; the operator pauses it then. Return what it waits for.

        The study goes on where it was when it is run again. Given ``kind``, other answers to
        messages of that kind alone count.
        """

        def want_pause(answered: str) -> None:
            if kind in ("", answered):
                self._set(pause_by="operator")

        self.answers.replaced = want_pause
        self.run()
        self.answers.replaced = lambda kind: None
        assert self.registry.study(self.study.digest).state == "paused"
        self._set(state="running", pause_by=None)
        waiting = round_now(self.registry, self.study.digest)
        assert waiting is not None
        return waiting.waits_for

    def _set(self, **values: Any) -> None:
        with self.registry.transaction() as session:
            row = session.get_one(StudyRow, self.study.digest)
            for name, value in values.items():
                setattr(row, name, value)

    def show(self) -> dict[str, Any]:
        row = self.registry.study(self.study.digest)
        return study_overview(self.registry, row, SpendMeter())

    @property
    def model(self) -> Weights:
        return unpack(
            (self.home.study_folder(self.study.digest) / "model.safetensors").read_bytes()
        )
