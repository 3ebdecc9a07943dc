"""Starting, stopping and killing: nothing is left behind, and no finished round is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from federation import PRIVATE, Federation, Running, Site, small_study, wait_for

from consilium_common.demo.hospitals import NAMES


def test_what_is_stopped_is_gone_within_ten_seconds_and_systemd_hears_of_both_sides(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = federation.sites[NAMES[0]]
    _ends(site, signal.SIGINT)
    federation.stop()
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    with _manager(tmp_path / "of-aggregator") as heard:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "of-aggregator"))
        federation.start()
        with _manager(tmp_path / "of-site") as heard_of_site:
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "of-site"))
            site.start()
            for said in (heard, heard_of_site):
                ready = _heard(said, "READY=1")
                assert "STATUS=" in ready
                _heard(said, "WATCHDOG=1")
            # In mid-training, when it has most to end.
            digest = _trained_for_minutes(federation, site, "interrupted")
            _ends(site, signal.SIGTERM)
            _heard(heard_of_site, "STOPPING=1")
        federation.study("stop", digest).data  # noqa: B018
        assert federation.running is not None
        federation.running.interrupt(signal.SIGTERM, timeout=10)
        assert "Traceback" not in federation.running.output
        _heard(heard, "STOPPING=1")


@pytest.mark.timeout(600)
def test_an_operator_stops_pauses_and_resumes_a_study_between_two_rounds_or_at_once(
    federation: Federation,
) -> None:
    digest = _begun(federation, NAMES[:2], _long("commanded", rounds=10))
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


@pytest.mark.timeout(600)
def test_a_study_goes_on_by_itself_when_the_aggregator_is_started_again(
    federation: Federation, tmp_path: Path
) -> None:
    # What model it ends in: tests/integration/test_simulation.py.
    study = _long("outlives", rounds=7, quorum=len(NAMES))
    digest = _begun(federation, NAMES, study)
    watch = ["study", "watch", digest, "--home", federation.home]
    watching = Running(watch, tmp_path / "watch.log")
    try:
        watching.wait_until_says("outlives: running")
        before = _with_rounds(federation, digest, 1)
        # Ctrl-C: the aggregator and all that it has started are gone.
        assert federation.running is not None
        federation.running.interrupt(timeout=10)
        assert "Traceback" not in federation.running.output
        watching.wait_until_says("the connection is lost, the study goes on")
        federation.start()
        before = _goes_on(federation, digest, before)
        watching.wait_until_says("connected again")
        # Killed, with all that it has started, at an arbitrary moment; process by process, and at
        # chosen moments: tests/faults/test_kill_matrix.py.
        federation.kill()
        federation.start()
        _finishes(federation, digest, before, "the aggregator was started anew")
        # Whoever watched it has seen all of it, and was told when nothing could be seen.
        assert watching.wait_until_ended() == 0, watching.output
    finally:
        watching.clean()
    said = watching.output
    assert "outlives finished after 7 rounds" in said
    assert said.count("connected again") == said.count("the connection is lost") >= 2, said


def test_two_studies_at_once_take_turns_at_the_sites_that_they_share(
    federation: Federation,
) -> None:
    rounds, shared = 5, NAMES[:2]
    studies = [small_study(name, federation={"rounds": rounds}) for name in ("one", "another")]
    digests = [federation.propose(study) for study in studies]
    for digest in digests:
        federation.approve(digest, *shared)
    for digest in digests:
        federation.study("run", digest).data  # noqa: B018
    ended = []
    for digest in digests:
        assert federation.study("watch", digest).data["state"] == "finished"
        found = federation.study("log", digest).data["rounds"]
        assert [row["sites"] for row in found] == [sorted(shared)] * rounds
        ended += [(row["ended_at"], digest) for row in found]
    order = [digest for _, digest in sorted(ended)]
    # One after the other would be one turn, each in its turn nine.
    assert sum(one != other for one, other in pairwise(order)) >= rounds - 1, ended


def test_a_study_that_waits_for_its_sites_holds_up_no_other(federation: Federation) -> None:
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
    digest = _trained_for_minutes(federation, site, "withdrawn")
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


def test_an_executor_that_gives_up_a_living_supernode_is_asked_anew_at_once(
    federation: Federation,
) -> None:
    site = federation.sites[NAMES[0]]
    assert site.running is not None
    parts = {"training": {"steps_per_round": 60}, "federation": {"rounds": 2, "quorum": 1}}
    digest = _begun(federation, [site.name], small_study("given-up", **parts))
    wait_for(lambda: site.progress(digest).get("step"), "the first steps")
    (executor,) = (
        pid
        for pid, command in site.running.processes().items()
        if "consilium_client.executor" in command
    )
    os.kill(executor, signal.SIGINT)  # as Flower does when a task's heartbeat is refused
    site.running.wait_until_says("executor ended with status 3")
    # By itself the SuperNode would wait a minute for the task, and take no other.
    federation.wait_until(digest, lambda data: bool(data["rounds"]), "a round", timeout=45)
    assert federation.study("watch", digest).data["state"] == "finished"


@contextlib.contextmanager
def _manager(address: Path) -> Iterator[list[str]]:
    """Listen as a service manager does; what is said is read at once, for it blocks who says it."""
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))

        def listen() -> None:
            while said := manager.recv(1000):
                heard.append(said.decode())

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield heard
        finally:
            manager.shutdown(socket.SHUT_RDWR)
            thread.join()


def _heard(heard: list[str], words: str) -> str:
    """Wait until a manager has heard words; returns all that was said with them."""
    return wait_for(lambda: next((said for said in heard if words in said), None), words)


def _ends(site: Site, number: signal.Signals) -> None:
    """Send a signal to a site; ten seconds later nothing of it may be left."""
    assert site.running is not None
    assert len(site.running.processes()) >= 4
    site.running.interrupt(number, timeout=10)
    assert "Traceback" not in site.running.output
    assert not (site.home / "run" / "status.json").exists()


def _trained_for_minutes(federation: Federation, site: Site, name: str) -> str:
    """Have a site alone train a study that takes minutes; returns its digest, in mid-training."""
    study = small_study(
        name,
        training={"steps_per_round": 9000},
        federation={"rounds": 1, "quorum": 1, "deadline_seconds": 240.0},
    )
    digest = _begun(federation, [site.name], study)
    wait_for(lambda: site.progress(digest).get("step"), "the first steps", timeout=90)
    return digest


def _long(name: str, **federated: Any) -> dict[str, Any]:
    """Return a study whose rounds take a while."""
    return small_study(name, training={"steps_per_round": 40}, federation=federated)


def _begun(federation: Federation, names: Sequence[str], study: dict[str, Any]) -> str:
    """Propose a study, have sites approve it and run it; returns its digest."""
    digest = federation.propose(study)
    federation.approve(digest, *names)
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
    assert federation.model(digest).is_file()
    assert federation.study("run", digest).code == "study.finished"
    said = [row["why"] for row in federation.study("log", digest).data["history"]]
    for why in whys:
        assert any(why in one for one in said), f"{why!r} is not in {said}"
    return after
