"""An aggregator's home with one approved study, and sites that answer at once."""

from __future__ import annotations

import os
import time
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
from consilium_common.wire.messages import instructions_of, to_server, weights_of
from consilium_server.home import ServerConfig, ServerHome
from consilium_server.overview import study_overview
from consilium_server.registry import Registry
from consilium_server.rounds import StudyRun
from consilium_server.spending import SpendMeter
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

    def __init__(self, study: Study) -> None:
        self.trained = {spec.name for spec in trained_specs(study)}
        self.sums = dict.fromkeys(SITES, 0.0)
        #: What each site answers when it is asked for statistics.
        self.statistics: dict[str, dict[str, float]] = {site: {} for site in SITES}
        self.asked: list[tuple[str, int]] = []
        self.models: dict[tuple[str, int], Weights] = {}
        self.last: list[tuple[str, int]] = []
        #: Replaces a site's answer: returns content, or raises what the site replies with.
        self.instead: Callable[[str, str, int], Any] = lambda *_: None

    def of(self, site: str, kind: str, content: Any) -> Any:
        asked = instructions_of(content)
        step = (kind, asked.round_index)
        if step not in self.asked:
            self.asked.append(step)
        if asked.last and step not in self.last:
            self.last.append(step)
        if kind != "query":
            self.models[step] = unpack(weights_of(content))
        instead = self.instead(site, kind, asked.round_index)
        if instead is not None:
            return instead
        if kind == "query":
            return to_server(None, self.statistics[site])
        if kind == "evaluate":
            return to_server(None, {"sum": self.sums[site]})
        return to_server(pack(self.update(self.models[step], site)), None)

    def update(self, model: Weights, site: str) -> Weights:
        return {
            name: (tensor + np.float32(SITES.index(site) + 1)).astype(np.float32)
            for name, tensor in model.items()
            if name in self.trained
        }


class SitesGrid:
    """Flower's Grid, with every site behind it answering at once."""

    def __init__(self, home: ServerHome, answers: Answers) -> None:
        self._home = home
        self._answers = answers
        self._replies: dict[str, Any] = {}

    def get_node_ids(self) -> list[int]:
        return list(range(1, len(SITES) + 1))

    def push_messages(self, messages: list[Any]) -> list[str]:
        from flwr.app import Error, Message

        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            identity = f"m{len(self._replies)}"
            message.metadata.__dict__["_message_id"] = identity
            try:
                content = self._answers.of(
                    SITES[node - 1], message.metadata.message_type, message.content
                )
                reply = Message(content=content, reply_to=message)
            except ConsiliumError as error:
                reason = canonical_json(error.to_dict()).decode()
                reply = Message(Error(code=1, reason=reason), reply_to=message)
            self._replies[identity] = reply
            arrived = self._home.arrived / str(node)
            arrived.touch()
            # The file system's clock is coarser than the one that is compared with.
            os.utime(arrived, ns=(time.time_ns(), time.time_ns()))
            ids.append(identity)
        return ids

    def pull_messages(self, ids: list[str]) -> list[Any]:
        return [self._replies[identity] for identity in ids]


class House:
    """An aggregator's home with one approved study."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.study = study
        self.home = ServerHome.create(folder)
        self.home.save_config(ServerConfig("tests", "127.0.0.1:1"))
        self.registry = Registry(self.home.database)
        self.answers = Answers(study)
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
        StudyRun(self.home, self.registry, self.study.digest, grid).run()  # type: ignore[arg-type]

    def fails(self) -> str:
        with pytest.raises(ConsiliumError) as caught:
            self.run()
        return caught.value.code

    def show(self) -> dict[str, Any]:
        row = self.registry.study(self.study.digest)
        return study_overview(self.registry, row, SpendMeter())

    @property
    def model(self) -> Weights:
        return unpack(
            (self.home.study_folder(self.study.digest) / "model.safetensors").read_bytes()
        )
