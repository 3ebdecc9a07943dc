"""A whole federation whose sites die while they send finishes its study with every ledger exact.

One site's training process is killed, one's executor, and one's link, which is the whole site: each
several times, at points between one durable operation and the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import federation as harness
import pytest
from exactness import require_exact, state_of
from federation import NAMES, PRIVATE, Federation, Site, small_study, wait_for

from consilium_client.faults import (
    COUNT_VARIABLE,
    EXECUTOR_POINTS,
    FAULT_VARIABLE,
    LINK_POINTS,
    WORKER_POINTS,
)

WORKER, EXECUTOR, LINK = NAMES
PLANS = {
    # A worker may die once a round: it is asked again within the round, and no more than once.
    WORKER: "evaluation.charged:1,training.charged:1,training.step:3,training.file-written:3,"
    "training.stored:4,evaluation.stored:2",
    # Its SuperNode is started anew with it: the task that it held is lost.
    EXECUTOR: "reply.made:2,reply.pushed:3",
    LINK: "link.before.PushMessages:1,link.receipt:2,link.after.PushObject:2,"
    "link.before.ConfirmMessageReceived:3,link.after.ConfirmMessageReceived:3",
}
#: Below the budget of the tests, whatever other tests have spent on the same patients.
ROUNDS = 6


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
        # Each round waits for all, for a site is asked again when it is back: so each comes to
        # every point at which it is to die.
        federation={"rounds": ROUNDS, "quorum": 3, "deadline_seconds": 150.0},
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
        require_exact(site, digest, data["rounds"])
        site.stop()  # the next start is without a plan

    assert all(WORKER in row["sites"] for row in data["rounds"])
    state = state_of(federation.sites[WORKER])
    done = {(c.purpose, c.round_index) for c in state.standing(digest) if c.state == "released"}
    assert done == {
        *(("training", number) for number in range(ROUNDS)),
        *(("evaluation", number) for number in (0, ROUNDS)),
    }
