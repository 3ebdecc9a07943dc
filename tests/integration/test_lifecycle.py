"""Starting, stopping and killing: nothing is left behind, and no finished round is lost."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from federation import PRIVATE, Federation, small_study, wait_for

from consilium_common.demo.hospitals import NAMES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_site_that_is_stopped_leaves_no_process_behind(
    federation: Federation, number: signal.Signals
) -> None:
    site = federation.sites[NAMES[0 if number is signal.SIGINT else 1]]
    assert site.running is not None
    assert len(site.running.processes()) >= 4
    site.running.interrupt(number, timeout=10)
    assert "Traceback" not in site.running.output
    assert not (site.home / "run" / "status.json").exists()


def test_a_study_goes_on_from_its_last_round_whatever_ended_it(federation: Federation) -> None:
    rounds = 22
    digest = federation.propose(
        small_study("outlives", training={"steps_per_round": 40}, federation={"rounds": rounds})
    )
    federation.approve(digest)
    federation.study("run", digest).data  # noqa: B018
    assert federation.study("run", digest).code == "study.running"
    _with_rounds(federation, digest, 1)

    # The operator stops it.
    assert federation.study("stop", digest).data["state"] == "stopped"
    before = federation.show(digest)
    assert federation.study("stop", digest).code == "study.not-running"
    _go_on(federation, digest, before, "operator")
    before = _with_rounds(federation, digest, len(before["rounds"]) + 1)

    # Ctrl-C: the aggregator and all that it has started are gone.
    assert federation.running is not None
    federation.running.interrupt(timeout=10)
    assert "Traceback" not in federation.running.output
    federation.start()
    _go_on(federation, digest, before, "aggregator")
    before = _with_rounds(federation, digest, len(before["rounds"]) + 1)

    # Killed, with all that it has started, at an arbitrary moment.
    federation.kill()
    federation.start()
    _go_on(federation, digest, before, "aggregator")
    after = federation.study("watch", digest).data
    assert after["state"] == "finished"
    assert [row["number"] for row in after["rounds"]] == list(range(rounds))
    # Rounds that were finished are not computed again.
    assert after["rounds"][: len(before["rounds"])] == before["rounds"]
    assert (federation.home / "studies" / digest[:16] / "model.safetensors").is_file()
    assert federation.study("run", digest).code == "study.finished"


def test_withdrawal_in_mid_round_stops_training_there_and_sends_nothing(
    federation: Federation,
) -> None:
    site = federation.sites[NAMES[0]]
    digest = federation.propose(
        small_study(
            "withdrawn",
            training={"steps_per_round": 9000},
            federation={"rounds": 1, "quorum": 1, "deadline_seconds": 240.0},
        )
    )
    federation.approve(digest, site.name)
    federation.study("run", digest).data  # noqa: B018

    def trains() -> bool:
        path = site.home / "run" / "progress.json"
        progress = json.loads(path.read_text()) if path.exists() else {"digest": ""}
        return progress["digest"] == digest and progress["step"] > 0

    wait_for(trains, "the first steps", timeout=90)
    answer = site("withdraw", digest, "--why", "an audit").data
    assert (answer["decision"], answer["told"], answer["withheld"]) == ("declined", True, 0)
    log = site.home / "logs" / "worker.log"
    wait_for(lambda: "study.withdrawn" in log.read_text(), "the end of training")

    def told(data: dict[str, Any]) -> bool:
        return [(row["site"], row["phase"]) for row in data["progress"]] == [(site.name, "failed")]

    found = federation.wait_until(digest, told, "word of the end")
    (approval,) = found["approvals"]
    assert (approval["decision"], approval["why"]) == ("declined", "an audit")
    assert digest not in str(site("egress").data)
    assert site("withdraw", digest, "--why", "again").code == "study.not-approved"
    federation.study("stop", digest).data  # noqa: B018


def test_a_running_site_approves_by_policy_within_its_bounds_and_no_further(
    federation: Federation,
) -> None:
    site = federation.sites[NAMES[0]]
    assert site.running is not None
    rule = {"operators": ["operator"], "tasks": ["segmentation"], "epsilon_per_study": 6.0}
    parts = {**PRIVATE, "federation": {"rounds": 2, "quorum": 1}}
    site.set_policy(approve_automatically=rule)
    try:
        digest = federation.propose(small_study("by-policy", **parts))
        dear = {**parts, "privacy": {**parts["privacy"], "noise_multiplier": 0.5}}
        beyond = federation.propose(small_study("beyond-policy", **dear))
        site.running.wait_until_says(f"approved by-policy ({digest[:12]})", timeout=120)
        (approval,) = federation.show(digest)["approvals"]
        assert (approval["site"], approval["decision"]) == (site.name, "approved")
        assert "ledger entry" in approval["why"]
        federation.study("run", digest).data  # noqa: B018
        assert federation.study("watch", digest).data["state"] == "finished"
        site.running.wait_until_says(f"{beyond[:12]} waits for a person", timeout=120)
        rows = {row["digest"]: row for row in site("studies").data["studies"]}
        assert (rows[digest]["decision"], rows[digest]["automatic"]) == ("approved", True)
        assert rows[beyond]["decision"] is None
        assert federation.show(beyond)["approvals"] == []
    finally:
        site.set_policy()


def _with_rounds(federation: Federation, digest: str, number: int) -> dict[str, Any]:
    return federation.wait_until(
        digest, lambda data: len(data["rounds"]) >= number, f"round {number}"
    )


def _go_on(federation: Federation, digest: str, before: dict[str, Any], why: str) -> None:
    """Run a study on when enough sites are there; its rounds are those it had."""
    found = federation.wait_until(
        digest, lambda data: sum(row["online"] for row in data["approvals"]) >= 2, "sites online"
    )
    assert found["state"] == "stopped"
    assert why in found["reason"]
    assert len(found["rounds"]) < found["rounds_planned"], "it ended before it was interrupted"
    assert found["rounds"][: len(before["rounds"])] == before["rounds"]
    federation.study("run", digest).data  # noqa: B018
