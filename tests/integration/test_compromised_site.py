"""A process that was taken over at a site, and knows all that its user knows, gets nothing out.

It speaks to the site's running link as the SuperNode does. What it says never reaches the
aggregator, the site goes on training, and its receipts agree with what the aggregator received.
"""

from __future__ import annotations

import json
import random
import re
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
from egress_samples import Question, Reply, plain_study, reference
from federation import Federation, Site, small_study
from flwr.app import Error
from flwr.proto.fleet_pb2 import PushMessagesRequest

from consilium_client.flower_private_fleet import make_request
from consilium_common.audit.documents import read_records
from consilium_common.audit.evidence import open_evidence
from consilium_common.audit.reconcile import reconcile
from consilium_common.demo.hospitals import NAMES
from consilium_common.ledger.state import LedgerState
from consilium_common.wire.messages import to_server
from consilium_common.wire.methods import FLEET_PATHS

SECRET = b"Doe^Jane 1970-01-01"


class Intruder:
    """Speaks to a site's link over HTTPS on loopback."""

    def __init__(self, site: Site) -> None:
        assert site.running is not None
        commands = " ".join(site.running.processes().values())
        found = re.search(r"--superlink[ \0](127\.0\.0\.1:\d+)", commands)
        assert found is not None, commands
        certificate = re.search(r"--root-certificates[ \0](\S+?\.pem)", commands)
        assert certificate is not None, commands
        trusted = ssl.create_default_context(cafile=certificate[1])
        self._http = httpx.Client(
            base_url=f"https://{found[1]}/v1/fleet/", verify=trusted, trust_env=False, timeout=30
        )
        self.node = int(json.loads((site.home / "run" / "node.json").read_text())["node_id"])

    def post(self, call: str, body: bytes) -> int:
        headers = {"content-type": "application/protobuf", "flwr-signature": SECRET.decode()}
        return self._http.post(FLEET_PATHS[call], content=body, headers=headers).status_code

    def close(self) -> None:
        self._http.close()


def forged(node: int) -> list[tuple[str, bytes]]:
    """Return calls that would carry something out, each well formed for Flower."""
    own: dict[str, Any] = {"node": {"node_id": node}}
    question = Question(plain_study())

    def reply(content: Any) -> bytes:
        request: PushMessagesRequest = Reply(question, content).request
        request.node.node_id = node
        return bytes(request.SerializeToString())

    requests = [
        ("RegisterNode", {"public_key": SECRET}),
        ("SendNodeHeartbeat", {**own, "heartbeat_interval": 1970.0101}),
        ("PullMessages", {**own, "message_ids": [SECRET.decode()]}),
        ("GetRun", {**own, "run_id": 19700101}),
        ("GetFab", {**own, "run_id": 1, "hash_str": SECRET.decode()}),
        ("PullObject", {**own, "run_id": 1, "object_id": SECRET.decode()}),
        ("ConfirmMessageReceived", {**own, "run_id": 1, "message_object_id": SECRET.decode()}),
        (
            "PushObject",
            {
                **own,
                "run_id": 1,
                "object_id": "e" * 64,
                "object_content": SECRET,
                "session_id": "s",
            },
        ),
    ]
    made = [(call, make_request(call, **values).SerializeToString()) for call, values in requests]
    made += [
        ("PushMessages", reply(to_server(reference(SECRET * 1000), None))),
        ("PushMessages", reply(to_server(None, {SECRET.decode(): 1970.0}))),
        ("PushMessages", reply(Error(code=0, reason=SECRET.decode()))),
    ]
    return made


@pytest.fixture
def intruder(federation: Federation) -> Any:
    found = Intruder(federation.sites[NAMES[0]])
    yield found
    found.close()


@pytest.mark.timeout(600)
def test_nothing_that_an_intruder_says_leaves_and_the_site_goes_on(
    federation: Federation, intruder: Intruder, tmp_path: Path
) -> None:
    site = federation.sites[NAMES[0]]
    calls = forged(intruder.node)
    chance = random.Random(5)
    for call, body in list(calls):
        for _ in range(8):
            at = chance.randrange(len(body))
            some = chance.randbytes(chance.randrange(1, 9))
            calls.append((call, body[:at] + some + body[at + len(some) :]))
    assert {intruder.post(call, body) for call, body in calls} == {403}
    refused = json.loads((site.home / "run" / "refused.json").read_text())
    assert refused["count"] >= len(calls)
    assert SECRET.decode() not in json.dumps(refused)

    digest = federation.propose(small_study("intruded", federation={"rounds": 2, "quorum": 1}))
    federation.approve(digest, site.name)
    federation.study("run", digest).data  # noqa: B018
    found = federation.study("watch", digest).data
    assert found["state"] == "finished"
    assert [row["sites"] for row in found["rounds"]] == [[site.name]] * 2

    listed = site("egress", digest).data
    left = {(row["release"]["round"], row["release"]["sha256"]) for row in listed["receipts"]}
    # One update a round, and the final model's exact figures.
    of_rounds = [(row["release"]["purpose"], row["release"]["round"]) for row in listed["receipts"]]
    assert sorted(of_rounds) == [("evaluation", 2), ("training", 0), ("training", 1)]
    assert all(row["sent"] for row in listed["receipts"])
    evidence, records = tmp_path / "evidence", tmp_path / "records.json"
    assert site("evidence", evidence).data["receipts"] >= 2
    federation.server("records", site.name, records).data  # noqa: B018
    received = json.loads(records.read_text())["content"]["received"]
    assert {(row["round"], row["sha256"]) for row in received if row["study"] == digest} == left
    opened = open_evidence(evidence)
    assert opened.receipts is not None
    held = reconcile(
        LedgerState(),
        receipts=[one for one in opened.receipts if one.release.study == digest],
        egress=opened.egress,
        records=read_records(records),
        studies=opened.studies,
    )
    named = {one.code for one in held.differences if digest[:12] in one.message}
    assert named == set()
