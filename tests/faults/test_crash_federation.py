"""A whole federation whose sites die while they send finishes its study with every ledger exact.

One site's training process is killed, one's executor, and one's link, which is the whole site: each
several times, at points between one durable operation and the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import federation as harness
import pytest
from federation import NAMES, PRIVATE, Federation, Site, small_study, wait_for

from consilium_client.faults import (
    COUNT_VARIABLE,
    EXECUTOR_POINTS,
    FAULT_VARIABLE,
    LINK_POINTS,
    WORKER_POINTS,
)
from consilium_client.home import SiteHome
from consilium_client.store import StudyStore
from consilium_common.identity.keys import load_signing_key
from consilium_common.ledger.state import LedgerState
from consilium_common.ledger.verify import verify_file

WORKER, EXECUTOR, LINK = NAMES
PLANS = {
    # A worker may die once a round: it is asked again within the round, and no more than once.
    WORKER: "evaluation.charged:1,training.charged:1,training.step:3,training.file-written:3,"
    "training.stored:4,evaluation.stored:2",
    # Its SuperNode notices a dead task by its silence, which takes a minute and more.
    EXECUTOR: "reply.made:2,reply.pushed:3",
    LINK: "link.before.PushMessages:1,link.receipt:2,link.after.PushObject:2,"
    "link.before.ConfirmMessageReceived:3,link.after.ConfirmMessageReceived:3",
}
#: Below the budget of the tests, whatever other tests have spent on the same patients.
ROUNDS = 6


def state_of(site: Site) -> LedgerState:
    home = SiteHome.existing(site.home)
    key = load_signing_key(home.identity / "ledger-key.pem").public_key()
    found = verify_file(home.ledger, key)
    assert found.problem is None, found.problem
    return found.state


@pytest.mark.long
@pytest.mark.timeout(900)
def test_sites_that_die_while_they_send_charge_right_and_send_once(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deadly: dict[str, str] = {}
    plain = harness.environment
    monkeypatch.setattr(harness, "environment", lambda **further: plain(**deadly, **further))

    def launch(site: Site) -> None:
        count = str(tmp_path / site.name)
        deadly.update({FAULT_VARIABLE: PLANS[site.name], COUNT_VARIABLE: count})
        site.launch()
        deadly.clear()

    sites = [federation.sites[name] for name in NAMES]
    for site in sites:
        site.stop()
        launch(site)
    for site in sites:
        site.wait_until_ready()
    study = small_study(
        "deadly",
        privacy={**PRIVATE["privacy"], "noise_multiplier": 16.0},
        evaluation={"release": "private", "epsilon": 0.5},
        federation={"rounds": ROUNDS, "quorum": 2, "deadline_seconds": 150.0},
    )
    digest = federation.propose(study)
    federation.approve(digest)
    federation.study("run", digest).data  # noqa: B018

    def finished() -> dict[str, Any] | None:
        for site in sites:
            assert site.running is not None
            if site.running.ended():
                site.running.clean()
                launch(site)
        data: dict[str, Any] = federation.show(digest)
        assert data["state"] != "failed", data["reason"]
        return data if data["state"] == "finished" else None

    data = wait_for(finished, "the study to finish", timeout=780)
    assert len(data["rounds"]) == ROUNDS

    for site in sites:
        passed = (tmp_path / site.name).read_text().splitlines()
        for fault in PLANS[site.name].split(","):
            point, _, number = fault.partition(":")
            assert point in (*WORKER_POINTS, *EXECUTOR_POINTS, *LINK_POINTS)
            assert passed.count(point) >= int(number), f"{site.name} did not come to {fault}"
        _require_exact(site, digest, data["rounds"])
        site.stop()  # the next start is without a plan

    # A killed worker is replaced within its round: its site missed none.
    assert all(WORKER in row["sites"] for row in data["rounds"])
    state = state_of(federation.sites[WORKER])
    done = {(c.purpose, c.round_index) for c in state.standing(digest) if c.state == "released"}
    assert done == {
        *(("training", number) for number in range(ROUNDS)),
        *(("evaluation", number) for number in (0, ROUNDS)),
    }


def _require_exact(site: Site, digest: str, rounds: list[dict[str, Any]]) -> None:
    state = state_of(site)
    standing = {(c.purpose, c.round_index): c for c in state.standing(digest)}
    assert len(standing) == len(state.standing(digest))
    kept = {
        (row["purpose"], row["round"]): row["sha256"]
        for row in StudyStore(SiteHome.existing(site.home)).updates(digest)
    }
    # What was kept is paid for; a charge without an update is of a round that went on without it.
    assert set(kept) <= set(standing)
    for release, charge in standing.items():
        assert charge.update in (None, kept.get(release))
    # What the aggregator used was released, once.
    for row in rounds:
        if site.name in row["sites"]:
            charge = standing["training", row["number"]]
            assert charge.state == "released"
            assert charge.update == kept["training", row["number"]]
