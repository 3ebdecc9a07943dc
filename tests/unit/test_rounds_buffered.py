"""Buffered rounds: nobody waits for the slow, and an old update counts for less."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_samples import House, a_study

from consilium_common.models.registry import initial_weights
from consilium_server.round_tables import site_rounds
from consilium_server.rounds import concluding
from consilium_server.rounds.taking import Taking


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages ask which task makes them; here it is any."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 3)


class Killed(BaseException):
    """The process is gone: nothing after this runs."""


def buffered(folder: Path, *, rounds: int, size: int = 2, **settings: Any) -> House:
    federation = {
        "rounds": rounds,
        "quorum": 1,
        "weighting": "uniform",
        "buffered": {"size": size, **settings},
    }
    return House(folder, a_study(federation=federation))


def parts_of(house: House, site: str) -> list[tuple[int, str, int]]:
    found = site_rounds(house.registry, house.study.digest)
    return [
        (number, part.outcome, part.staleness)
        for number, parts in found.items()
        for part in parts
        if part.site == site
    ]


def moved(house: House) -> float:
    start, name = initial_weights(house.study), min(house.answers.trained)
    change = house.model[name] - start[name]
    np.testing.assert_allclose(change, change.flat[0], rtol=1e-4)
    return float(change.flat[0])


def test_steps_go_on_without_the_slow_site_and_take_its_old_update_for_less(
    tmp_path: Path,
) -> None:
    house = buffered(tmp_path, rounds=4)
    house.answers.slow = {"south"}

    def wakes(site: str, kind: str, number: int) -> None:
        if (kind, number, site) == ("train", 3, "east"):
            house.answers.slow = {"north"}
        if kind == "evaluate":
            house.answers.slow = set()

    house.answers.instead = wakes
    house.run()
    # It began from the first model, and three steps later its change of 3 counts half.
    assert (3, "accepted", 3) in parts_of(house, "south")
    rounds = [row["sites"] for row in house.show()["rounds"]]
    assert rounds[:3] == [["east", "north"]] * 3
    assert rounds[3] == ["east", "south"]
    assert moved(house) == pytest.approx(3 * 1.5 + (1 + 3 / 2) / 2, rel=1e-4)


def test_no_site_trains_twice_under_one_index_or_gives_a_step_two_updates(
    tmp_path: Path,
) -> None:
    house = buffered(tmp_path, rounds=6, size=2)
    trained: Counter[tuple[str, int]] = Counter()

    def counts(site: str, kind: str, number: int) -> None:
        if kind == "train":
            trained[site, number] += 1
        slow = kind == "train" and number % 2
        house.answers.slow = {"north"} if slow else set()

    house.answers.instead = counts
    house.run()
    assert set(trained.values()) == {1}
    received = [
        (row.round, row.sha256)
        for site in ("east", "north", "south")
        for row in house.registry.received(site)
        if row.purpose == "training"
    ]
    assert len(received) == len(set(received))
    assert all(len(row["sites"]) == len(set(row["sites"])) for row in house.show()["rounds"])


def test_what_is_too_old_is_left_out_and_its_site_asked_anew(tmp_path: Path) -> None:
    house = buffered(tmp_path, rounds=5, most_staleness=1)
    house.answers.slow = {"south"}
    asked: list[int] = []

    def wakes(site: str, kind: str, number: int) -> None:
        if kind == "train" and site == "south":
            asked.append(number)
        if (kind, number, site) == ("train", 4, "east"):
            house.answers.slow = set()

    house.answers.instead = wakes
    house.run()
    outcomes = parts_of(house, "south")
    assert (2, "late", 0) in outcomes
    assert all(staleness <= 1 for _, outcome, staleness in outcomes if outcome == "accepted")


@pytest.mark.parametrize("when", ["taken", "recorded", "kept"])
def test_killed_in_a_step_it_goes_on_and_counts_no_update_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    house = buffered(tmp_path, rounds=4)
    house.answers.slow = {"south"}
    owner, name = {
        "taken": (Taking, "take"),
        "recorded": (concluding, "save_checkpoint"),
        "kept": (Taking, "clear"),
    }[when]
    real, calls = getattr(owner, name), [0]

    def dies(*args: Any, **values: Any) -> Any:
        calls[0] += 1
        found = None if when == "recorded" else real(*args, **values)
        if calls[0] == 3:
            raise Killed
        return real(*args, **values) if when == "recorded" else found

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            house.run()
    asked: list[tuple[str, int]] = []

    def wakes(site: str, kind: str, number: int) -> None:
        asked.append((site, number))
        house.answers.slow = set()

    house.answers.instead = wakes
    house.answers.slow = set()
    house.run()
    # What was under way before is asked for under its own index, with its own model.
    assert ("south", 0) in asked
    parts = site_rounds(house.registry, house.study.digest)
    used = [
        (part.site, number - part.staleness)
        for number, of in parts.items()
        for part in of
        if part.outcome == "accepted"
    ]
    assert len(used) == len(set(used)) == 2 * 4
    assert [row["number"] for row in house.show()["rounds"]] == [0, 1, 2, 3]


def test_a_step_waits_for_as_many_sites_as_it_needs(tmp_path: Path) -> None:
    house = buffered(tmp_path, rounds=1, size=3)
    house.answers.instead = lambda site, kind, number: (
        house.answers.delivered(site, b"no tensors") if site == "south" else None
    )
    assert house.stuck().startswith("waiting for 1 more site; south: run.bad-update")
    house.answers.instead = lambda *_: None
    house.run()
    assert moved(house) == pytest.approx(2.0, rel=1e-4)
