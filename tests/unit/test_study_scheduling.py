"""Queued studies start when their sites are there and free, in an order that people understand."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
from scheduling_samples import House
from state_samples import a_site, add_round, add_study, put

from consilium_common.errors import ConsiliumError
from consilium_server import scheduler
from consilium_server.lifecycle import ask_pause, end_run, pause_if_asked
from consilium_server.overview import queue_place, studies_overview
from consilium_server.round_tables import ACCEPTED, ASKED, FAILED, LATE, RoundNow
from consilium_server.scheduler import Scheduler, queue, waits_for
from consilium_server.standing import round_standing
from consilium_server.tables import Progress, now


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_study_is_approved_when_enough_sites_have_and_not_any_more_when_one_withdraws(
    house: House,
) -> None:
    digest = add_study(house.registry, "one", "north")
    house.look()
    assert house.state(digest) == "proposed"
    two = add_study(house.registry, "two", "north", "south")
    house.look()
    assert house.state(two) == "approved"
    with house.registry.transaction() as session:
        session.merge(a_site("south"))
        (approval,) = [a for a in house.registry.approvals(two) if a.site == "south"]
        approval.decision, approval.why = "declined", "an audit"
        session.merge(approval)
    house.look()
    assert house.state(two) == "proposed"
    assert [e.after for e in house.registry.history(two)] == ["approved", "proposed"]
    assert house.row(two).reason == (
        "1 of the 2 sites it needs have approved the study; south declined: an audit"
    )


def test_the_highest_priority_starts_first_then_the_one_that_waited_longest(house: House) -> None:
    first = house.study("first", "north", "south")
    second = house.study("second", "north", "south")
    urgent = house.study("urgent", "north", "south", priority=5)
    assert [row.digest for row in queue(house.registry)] == [urgent, first, second]
    assert queue_place(house.registry, house.row(second)) == 3
    house.look()
    assert house.flower.started == [urgent, first, second]
    assert [house.state(one) for one in (first, second, urgent)] == ["running"] * 3
    assert house.run(urgent) == "101"


def test_a_study_whose_sites_are_away_waits_and_holds_up_nobody(house: House) -> None:
    stuck = house.study("stuck", "east", "west", priority=9)
    for name in ("east", "west"):
        house.member(name, last_seen=None)
    other = house.study("other", "north", "south")
    house.look()
    assert house.flower.started == [other]
    assert waits_for(house.registry, house.row(stuck)) == "0 of the 2 sites it needs are online"
    (line,) = [one for one in studies_overview(house.registry) if one["digest"] == stuck]
    assert (line["place"], line["waits_for"][:8]) == (1, "0 of the")
    for name in ("east", "west"):
        house.member(name, last_seen="2999-01-01T00:00:00+00:00")
    house.look()
    assert house.state(stuck) == "running"


def test_a_site_takes_part_in_as_many_studies_as_it_says(house: House) -> None:
    first = house.study("first", "north", "south")
    second = house.study("second", "north", "south")
    third = house.study("third", "east", "north", quorum=1)
    house.member("north", studies_at_once=1)
    house.look()
    assert house.flower.started == [first, third]  # east is free, and alone is a quorum
    assert waits_for(house.registry, house.row(second)) == (
        "1 of the 2 sites it needs are free; north at work on others"
    )
    house.registry.set_study_state(first, "finished")
    house.registry.set_study_state(third, "finished")
    house.look()
    assert house.state(second) == "running"


def test_a_study_whose_sites_are_there_and_fail_every_time_lets_others_go_first(
    house: House,
) -> None:
    stuck = house.study("stuck", "north", "south", priority=9)
    other = house.study("other", "north", "south")
    for name in ("north", "south"):
        house.member(name, studies_at_once=1)
    house.look()
    assert house.flower.started == [stuck]
    error = ConsiliumError("run.stuck", "Nothing usable has come (north: no room on its disk).")
    end_run(house.registry, stuck, house.run(stuck), error)
    assert waits_for(house.registry, house.row(stuck)).startswith("others go first, for ")
    assert "no room on its disk); others go first" in house.row(stuck).reason
    house.look()
    assert house.flower.started == [stuck, other], "whatever its priority"
    house.due(stuck)
    house.look()
    assert house.state(stuck) == "queued", "its sites are at work on the other"
    house.registry.set_study_state(other, "finished", "done")
    house.look()
    assert (house.state(stuck), house.row(stuck).failures) == ("running", 0)


def test_nothing_starts_before_flower_is_there(house: House) -> None:
    digest = house.study("early", "north", "south")
    house.there = False
    house.look()
    assert house.state(digest) == "queued"
    assert house.flower.started == []


def test_a_run_that_flower_does_not_start_is_tried_again(house: House) -> None:
    digest = house.study("unlucky", "north", "south")
    house.flower.broken = True
    house.look()
    assert (house.state(digest), house.row(digest).flower_run) == ("running", None)
    house.flower.broken = False
    house.due(digest)
    house.look()
    assert house.run(digest) == "101"


@pytest.mark.parametrize("hours", [-3, 3])
def test_the_pause_after_a_death_is_as_long_as_planned_whatever_the_clock_is_set_to(
    house: House, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    class Clocks(datetime):
        set_by, ticks = timedelta(), 1000.0

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + cls.set_by

    monkeypatch.setattr(scheduler, "datetime", Clocks)
    monkeypatch.setattr(scheduler, "monotonic", lambda: Clocks.ticks)
    digest = house.study("unlucky", "north", "south")
    house.flower.broken = True
    house.look()
    house.flower.broken = False
    house.look()  # waits now: half a second after the first death
    Clocks.set_by = timedelta(hours=hours)
    house.look()
    assert house.flower.started == [], "not at once"
    Clocks.ticks += 0.5
    house.look()
    assert house.flower.started == [digest], "and not hours later"


def test_after_a_restart_with_the_clock_set_back_the_pause_is_at_most_the_planned_one(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = 1000.0
    monkeypatch.setattr(scheduler, "monotonic", lambda: ticks)
    digest = house.study("unlucky", "north", "south")
    house.flower.broken = True
    house.look()
    house.flower.broken = False
    with house.registry.transaction() as session:
        session.merge(house.row(digest)).not_before = "2999-01-01T00:00:00+00:00"
    anew = Scheduler(house.home, house.registry, house.flower, lambda: True)
    asyncio.run(anew.look())
    assert house.flower.started == []
    ticks += 0.5
    asyncio.run(anew.look())
    assert house.flower.started == [digest]


def test_an_aggregator_that_starts_anew_goes_on_with_what_ran(house: House) -> None:
    running = house.study("running", "north", "south")
    waiting = house.study("waiting", "north", "south", priority=-1)
    house.member("north", studies_at_once=1)
    house.look()
    asyncio.run(house.scheduler.lost("the aggregator was started anew", stop=True))
    assert house.flower.stopped == [101]
    assert (house.state(running), house.row(running).failures) == ("running", 0)
    house.look()
    assert house.flower.started == [running, running]
    assert house.state(waiting) == "queued"
    assert "started anew" in house.registry.history(running)[-1].why


def test_a_study_pauses_between_rounds_when_it_is_asked_to(house: House) -> None:
    digest = house.study("patient", "north", "south")
    assert ask_pause(house.registry, house.row(digest), "ada") == "paused"
    put(house.registry, digest, "queued")
    house.look()
    assert not pause_if_asked(house.registry, digest)
    assert ask_pause(house.registry, house.row(digest), "ada") == "running"
    assert house.state(digest) == "running"
    assert pause_if_asked(house.registry, digest)
    assert house.state(digest) == "paused"
    assert house.registry.history(digest)[-1].who == "ada"
    assert pause_if_asked(house.registry, digest), "a run that goes on by mistake ends there"
    put(house.registry, digest, "queued")
    house.look()
    assert not pause_if_asked(house.registry, digest)


def test_what_each_site_does_is_said_for_the_round_under_way(house: House) -> None:
    sites = ("east", "north", "south", "west")
    digest = house.study("shown", *sites)
    house.look()
    add_round(house.registry, digest, 0, seconds=40)
    add_round(house.registry, digest, 1, seconds=60)
    with house.registry.transaction() as session:
        for site, phase, number in (
            ("east", "training", 2),
            ("north", "sending", 2),
            ("south", "sending", 1),
        ):
            session.add(
                Progress(
                    site=site,
                    digest=digest,
                    phase=phase,
                    round=number,
                    step=37,
                    steps=120,
                    at=now(),
                )
            )

    def standing(**online: bool) -> dict[str, Any]:
        row = house.row(digest)
        return round_standing(
            house.registry,
            row,
            house.registry.rounds(digest),
            house.registry.approvals(digest),
            dict.fromkeys(sites, True) | online,
        )

    assert {one["site"]: one["state"] for one in standing(west=False)["sites"]} == {
        "east": "training",
        "north": "uploading",
        "south": "waiting",
        "west": "away",
    }
    found = standing()
    assert [(one["step"], one["steps"]) for one in found["sites"]][:2] == [(37, 120), (0, 0)]
    # One round is left, at 50 s, and it has just begun.
    assert found["round"] == 2
    assert 45 < found["seconds_left"] <= 50
    with house.registry.transaction() as session:
        session.add(
            RoundNow(
                digest=digest,
                number=2,
                purpose="training",
                began_at=now(),
                deadline_seconds=60.0,
                sites={"east": ASKED, "north": ACCEPTED, "south": LATE, "west": FAILED},
                why={"west": "no room on its disk"},
                waits_for="a second site",
                asked_at={"east": now()},
            )
        )
        session.merge(
            Progress(
                site="east", digest=digest, phase="downloading", round=2, step=0, steps=0, at=""
            )
        )
    assert standing()["sites"][0] == {
        "site": "east",
        "state": "downloading",
        "step": 0,
        "steps": 0,
        "why": "",
    }

    def at(phase: str, asked_at: str) -> dict[str, Any]:
        with house.registry.transaction() as session:
            session.get_one(RoundNow, digest).asked_at = {"east": asked_at}
            session.get_one(Progress, ("east", digest)).phase = phase
        return standing()["sites"][0]

    before = (datetime.now(UTC) - timedelta(seconds=61)).isoformat()
    assert at("training", before) == {
        "site": "east",
        "state": "late",
        "step": 0,
        "steps": 0,
        "why": "training past the deadline",
    }
    assert standing(east=False)["sites"][0]["state"] == "away"
    at("training", now())
    found = standing()
    assert [one["state"] for one in found["sites"]] == ["training", "done", "late", "failed"]
    assert found["sites"][3]["why"] == "no room on its disk"
    assert (found["deadline_seconds"], found["waits_for"]) == (60.0, "a second site")
    # What stands there is of the round before now.
    add_round(house.registry, digest, 2)
    assert [one["state"] for one in standing()["sites"]] == ["waiting"] * 4
    put(house.registry, digest, "stopped")
    assert (standing()["sites"], standing()["seconds_left"]) == ([], None)
