"""Starting, stopping and killing: nothing is left behind, and no finished round is lost."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
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


def test_systemd_hears_that_both_sides_are_ready_alive_and_stopping(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(60)
    site = federation.sites[NAMES[0]]
    federation.stop()
    site.stop()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    for start, running in (
        (federation.start, lambda: federation.running),
        (site.launch, lambda: site.running),
    ):
        start()
        said = _heard_until(manager, "READY=1")
        assert "STATUS=" in said
        _heard_until(manager, "WATCHDOG=1")
        process = running()
        assert process is not None
        if process is not federation.running:
            process.interrupt(signal.SIGTERM, timeout=10)
            _heard_until(manager, "STOPPING=1")
    assert federation.running is not None
    federation.running.interrupt(signal.SIGTERM, timeout=10)
    _heard_until(manager, "STOPPING=1")


def test_an_operator_stops_pauses_and_resumes_a_study_between_two_rounds_or_at_once(
    federation: Federation,
) -> None:
    digest = _begun(federation, "commanded", rounds=14)
    assert federation.study("run", digest).code == "study.running"
    before = _with_rounds(federation, digest, 1)
    assert federation.study("stop", digest).data["state"] == "stopped"
    assert federation.study("stop", digest).code == "study.not-running"
    federation.study("run", digest).data  # noqa: B018
    before = _goes_on(federation, digest, before)
    # Between two rounds: the one under way is finished first.
    assert federation.study("pause", digest).data["pause_asked"] is True
    paused = federation.wait_until(digest, lambda data: data["state"] == "paused", "the pause")
    assert len(paused["rounds"]) >= len(before["rounds"])
    assert federation.study("resume", digest).data["state"] in ("queued", "running")
    before = _goes_on(federation, digest, paused)
    assert federation.study("pause", digest, "--now").data["state"] == "paused"
    assert federation.study("resume", digest).data["state"] in ("queued", "running")
    _finishes(federation, digest, before, "stopped by operator", "paused by operator")


def test_a_study_goes_on_by_itself_when_the_aggregator_is_started_again(
    federation: Federation,
) -> None:
    digest = _begun(federation, "outlives", rounds=12)
    before = _with_rounds(federation, digest, 1)
    # Ctrl-C: the aggregator and all that it has started are gone.
    assert federation.running is not None
    federation.running.interrupt(timeout=10)
    assert "Traceback" not in federation.running.output
    federation.start()
    before = _goes_on(federation, digest, before)
    # Killed, with all that it has started, at an arbitrary moment; process by process, and at
    # chosen moments: tests/faults/test_kill_matrix.py.
    federation.kill()
    federation.start()
    _finishes(federation, digest, before, "the aggregator was started anew")


def test_a_study_that_waits_for_its_sites_holds_up_no_other(federation: Federation) -> None:
    federation.heal()
    away = federation.sites[NAMES[0]]
    stuck = federation.propose(small_study("stuck", federation={"quorum": 3}))
    other = federation.propose(small_study("other"))
    federation.approve(stuck)
    federation.approve(other, *NAMES[1:])
    away.stop()
    wait_for(
        lambda: (
            not {row["site"]: row for row in federation.show(stuck)["approvals"]}[away.name][
                "online"
            ]
        ),
        "the site to be away",
    )
    queued = federation.study("run", stuck, "--priority", "9").data
    assert (queued["state"], queued["place"]) == ("queued", 1)
    assert queued["waits_for"] == "2 of the 3 sites it needs are online"
    federation.study("run", other).data  # noqa: B018
    assert federation.study("watch", other).data["state"] == "finished"
    assert federation.show(stuck)["state"] == "queued"
    away.start()
    assert federation.study("watch", stuck).data["state"] == "finished"


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


def _heard_until(manager: socket.socket, words: str) -> str:
    while True:
        said = manager.recv(1000).decode()
        if words in said:
            return said


def _begun(federation: Federation, name: str, *, rounds: int) -> str:
    """Propose, approve and run a study whose rounds take a while; returns its digest."""
    digest = federation.propose(
        small_study(name, training={"steps_per_round": 40}, federation={"rounds": rounds})
    )
    federation.approve(digest)
    assert federation.study("run", digest).data["state"] == "running"
    return digest


def _with_rounds(federation: Federation, digest: str, number: int) -> dict[str, Any]:
    return federation.wait_until(
        digest, lambda data: len(data["rounds"]) >= number, f"round {number}", timeout=150
    )


def _goes_on(federation: Federation, digest: str, before: dict[str, Any]) -> dict[str, Any]:
    """Wait until a round more is finished; those that were before are as they were."""
    found = _with_rounds(federation, digest, len(before["rounds"]) + 1)
    assert len(found["rounds"]) < found["rounds_planned"], "it ended before it was interrupted"
    assert found["rounds"][: len(before["rounds"])] == before["rounds"]
    return found


def _finishes(
    federation: Federation, digest: str, before: dict[str, Any], *whys: str
) -> dict[str, Any]:
    """Wait for the study's end: every round once, none computed again, and its log says why."""
    after: dict[str, Any] = federation.study("watch", digest, timeout=240).data
    assert after["state"] == "finished"
    assert [row["number"] for row in after["rounds"]] == list(range(after["rounds_planned"]))
    assert after["rounds"][: len(before["rounds"])] == before["rounds"]
    assert (federation.home / "studies" / digest[:16] / "model.safetensors").is_file()
    assert federation.study("run", digest).code == "study.finished"
    said = [row["why"] for row in federation.study("log", digest).data["history"]]
    for why in whys:
        assert any(why in one for one in said), f"{why!r} is not in {said}"
    return after
