"""A training process that is killed is replaced, and its round loses nobody."""

from __future__ import annotations

import os
import re
import signal

from federation import NAMES, Federation, small_study


def test_a_killed_worker_is_replaced_and_the_study_loses_no_update(federation: Federation) -> None:
    digest = federation.propose(
        small_study("worker", training={"steps_per_round": 40}, federation={"rounds": 6})
    )
    federation.approve(digest)
    federation.study("run", digest).data  # noqa: B018
    federation.wait_until(digest, lambda data: len(data["rounds"]) >= 2, "two rounds")
    log = federation.sites[NAMES[0]].home / "logs" / "worker.log"
    pid = re.findall(r"worker (\d+) ", log.read_text())[-1]
    os.kill(int(pid), signal.SIGKILL)
    found = federation.study("watch", digest).data
    assert found["state"] == "finished"
    assert all(row["sites"] == sorted(NAMES) and row["dropped"] == {} for row in found["rounds"])
    assert re.findall(r"worker (\d+) ", log.read_text())[-1] != pid
