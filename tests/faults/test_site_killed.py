"""A hospital whose machine dies in mid-round costs the round nothing but its weight."""

from __future__ import annotations

from typing import Any

from federation import Federation, small_study

from consilium_common.demo.hospitals import NAMES

VICTIM, *OTHERS = NAMES


def test_a_round_completes_without_a_site_killed_in_it_and_a_later_one_has_it_again(
    federation: Federation,
) -> None:
    # Half a second or more of steps a round, so that there is a middle to die in.
    study = small_study(
        "killed", training={"steps_per_round": 150}, federation={"rounds": 200, "quorum": 2}
    )
    digest = federation.propose(study)
    federation.approve(digest)
    federation.study("run", digest).data  # noqa: B018
    victim = federation.sites[VICTIM]

    def training(data: dict[str, Any]) -> bool:
        return any(
            row["site"] == VICTIM and row["phase"] == "training" and row["step"] > 0
            for row in data["progress"]
        )

    federation.wait_until(digest, training, f"{VICTIM} to train")
    victim.kill()
    at = len(federation.show(digest)["rounds"])

    found = federation.wait_until(
        digest, lambda data: len(data["rounds"]) >= at + 2, "the round without the killed site"
    )
    assert found["state"] == "running"
    left_out = [row for row in found["rounds"] if VICTIM in row["dropped"]]
    assert len(left_out) == 1, found["rounds"]
    assert left_out[0]["sites"] == sorted(OTHERS)
    assert found["rounds"][-1]["sites"] == sorted(OTHERS)

    victim.start()
    began_again = len(federation.show(digest)["rounds"])
    federation.wait_until(
        digest,
        lambda data: any(VICTIM in row["sites"] for row in data["rounds"][began_again:]),
        f"a round with {VICTIM} again",
    )
    federation.study("stop", digest).data  # noqa: B018


def test_nothing_of_a_site_outlives_its_main_process(federation: Federation) -> None:
    victim = federation.sites[OTHERS[0]]
    assert victim.running is not None
    children = set(victim.running.processes()) - {victim.running.pid}
    assert len(children) >= 3  # the SuperNode, the executor, the warm parent of workers
    victim.running.kill_main()
    victim.running = None
    victim.start()
