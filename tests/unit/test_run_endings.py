"""A run that dies is begun again, not for ever; a full disk and absent sites are waited for."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from scheduling_samples import House
from sqlalchemy.exc import OperationalError
from state_samples import add_round, put

from consilium_common.errors import ConsiliumError
from consilium_server import executor, lifecycle
from consilium_server import scheduler as scheduling
from consilium_server.executor import Runs
from consilium_server.lifecycle import (
    MOST_FAILURES,
    end_run,
    is_disk_full,
    run_died,
)
from consilium_server.reserve import RESERVE_BYTES, Reserve


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_run_that_dies_is_begun_again_after_ever_longer_and_fails_in_the_end(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "_FIRST_BACK_OFF", 100.0)
    monkeypatch.setattr(lifecycle, "_LONGEST_BACK_OFF", 700.0)
    digest = house.study("fragile", "north", "south")
    house.look()
    waits = []
    for death in range(1, MOST_FAILURES + 1):
        run_died(house.registry, house.run(digest), "the process of its rounds died")
        row = house.row(digest)
        assert (row.state, row.flower_run is None) == (
            ("running", True) if death < MOST_FAILURES else ("failed", False)
        )
        if row.state == "running":
            started = len(house.flower.started)
            house.look()
            assert len(house.flower.started) == started, "it waits first"
            waits.append(row.reason)
            house.due(digest)
            house.look()
            assert len(house.flower.started) == started + 1
    assert [reason.split(" in ")[1] for reason in waits] == [
        "100 s (1 of 5)",
        "200 s (2 of 5)",
        "400 s (3 of 5)",
        "700 s (4 of 5)",
    ]
    assert "5 runs in a row" in house.row(digest).reason


def test_a_finished_round_makes_up_for_all_deaths_before_it(house: House) -> None:
    digest = house.study("tough", "north", "south")
    house.look()
    for number in range(2 * MOST_FAILURES):
        run_died(house.registry, house.run(digest), "killed")
        add_round(house.registry, digest, number)
        house.due(digest)
        house.look()
    assert house.state(digest) == "running"
    assert house.row(digest).failures == 1


@pytest.mark.parametrize(
    "full",
    [
        ConsiliumError("state.disk", "Cannot write.", where="checkpoint"),
        OSError(errno.ENOSPC, "No space left on device"),
        OperationalError("INSERT", {}, Exception("database or disk is full")),
        OperationalError("INSERT", {}, Exception("could not extend file: No space left on device")),
    ],
)
def test_a_full_disk_pauses_a_study_until_there_is_room(
    house: House, monkeypatch: pytest.MonkeyPatch, full: Exception
) -> None:
    assert is_disk_full(full)
    digest = house.study("large", "north", "south")
    house.look()
    (house.home.study_folder(digest) / "checkpoint").write_bytes(bytes(1000))
    end_run(house.registry, digest, house.run(digest), full)
    assert house.state(digest) == "paused"
    assert "no room" in house.row(digest).reason

    def room(free: int) -> None:
        monkeypatch.setattr(
            scheduling.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free})
        )

    room(16 * 2**20 + 3999)
    house.look()
    assert house.state(digest) == "paused"
    room(16 * 2**20 + 4000)
    house.look()
    assert house.state(digest) == "running"
    assert house.row(digest).goes_on_with == ""


def test_a_disk_so_full_that_it_cannot_be_written_is_told_by_the_exit_status(house: House) -> None:
    class Ended:
        exitcode = 75

        def is_alive(self) -> bool:
            return False

    digest = house.study("large", "north", "south")
    house.look()
    runs = Runs(house.registry, house.flower, Reserve(house.home.run))
    runs.add(int(house.run(digest)), Ended())  # type: ignore[arg-type]
    runs.look()
    assert (house.state(digest), house.row(digest).goes_on_with) == ("paused", "disk")


def test_a_disk_that_fills_up_pauses_what_runs_before_it_breaks(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = house.study("large", "north", "south")
    house.look()
    assert (house.home.run / "reserve").exists()
    left = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(scheduling.shutil, "disk_usage", lambda _: left)
    house.look()
    assert (house.state(digest), house.flower.stopped) == ("paused", [101])
    assert not (house.home.run / "reserve").exists()
    monkeypatch.undo()
    house.look()
    assert house.state(digest) == "running"
    assert (house.home.run / "reserve").exists()


def test_what_cannot_be_written_for_want_of_room_is_written_with_the_reserve(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended:
        exitcode = 75

        def is_alive(self) -> bool:
            return False

    digest = house.study("large", "north", "south")
    house.look()
    reserve = house.home.run / "reserve"
    # Blocks, not length: a file of holes would reserve nothing.
    assert reserve.stat().st_blocks * 512 >= RESERVE_BYTES
    runs = Runs(house.registry, house.flower, Reserve(house.home.run))
    runs.add(int(house.run(digest)), Ended())  # type: ignore[arg-type]
    write = executor.pause_for_disk

    def while_there_is_room(*arguments: Any) -> None:
        if reserve.exists():
            raise OperationalError("UPDATE", {}, Exception("database or disk is full"))
        write(*arguments)

    monkeypatch.setattr(executor, "pause_for_disk", while_there_is_room)
    runs.look()
    assert house.state(digest) == "running"
    runs.look()
    assert (house.state(digest), reserve.exists()) == ("paused", False)


def test_the_process_of_a_run_that_nobody_needs_any_more_is_ended_after_a_while(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy:
        exitcode = None
        killed = False

        def is_alive(self) -> bool:
            return True

        def kill(self) -> None:
            self.killed = True

    monkeypatch.setattr(executor, "_WANTED_SECONDS", 0.0)
    digest = house.study("busy", "north", "south")
    house.look()
    process = Busy()
    runs = Runs(house.registry, house.flower, Reserve(house.home.run))
    runs.add(101, process)  # type: ignore[arg-type]
    monkeypatch.setattr(executor, "_UNWANTED_SECONDS", 0.0)
    runs.look()
    assert not process.killed
    put(house.registry, digest, "stopped")
    monkeypatch.setattr(executor, "_UNWANTED_SECONDS", 60.0)
    runs.look()
    assert not process.killed, "it takes its leave of Flower first"
    monkeypatch.setattr(executor, "_UNWANTED_SECONDS", 0.0)
    runs.look()
    assert process.killed


def test_a_killed_process_s_run_is_stopped_and_begun_again(house: House) -> None:
    class Killed:
        exitcode = -9

        def is_alive(self) -> bool:
            return False

    digest = house.study("killed", "north", "south")
    house.look()
    runs = Runs(house.registry, house.flower, Reserve(house.home.run))
    runs.add(101, Killed())  # type: ignore[arg-type]
    runs.look()
    assert house.flower.stopped == [101]
    assert (house.state(digest), house.row(digest).flower_run) == ("running", None)
    assert "died" in house.row(digest).reason


def test_too_few_sites_put_a_study_back_into_the_queue_while_they_are_away(house: House) -> None:
    digest = house.study("lonely", "north", "south")
    house.look()
    missed = ConsiliumError("run.sites-away", "1 of the 2 sites the study needs are online.")
    house.member("south", last_seen=None)
    end_run(house.registry, digest, house.run(digest), missed)
    assert house.state(digest) == "queued"
    assert "1 of the 2 sites" in house.row(digest).reason
    house.member("south", last_seen="2999-01-01T00:00:00+00:00")
    house.look()
    assert house.state(digest) == "running"


def test_sites_that_are_back_when_their_absence_ends_a_run_count_as_no_death(house: House) -> None:
    digest = house.study("fickle", "north", "south")
    house.look()
    away = ConsiliumError("run.sites-away", "1 of the 2 sites the study needs are online.")
    for _ in range(2 * MOST_FAILURES):
        end_run(house.registry, digest, house.run(digest), away)
        assert (house.state(digest), house.row(digest).failures) == ("queued", 0)
        house.look()
        assert house.state(digest) == "running"


def test_a_refusal_is_a_failure_and_a_fault_is_not(house: House) -> None:
    digest = house.study("judged", "north", "south")
    house.look()
    end_run(house.registry, digest, house.run(digest), KeyError("x"))
    assert house.state(digest) == "running"
    house.due(digest)
    house.look()
    end_run(house.registry, digest, "someone-else", ConsiliumError("run.diverged", "Not finite."))
    assert house.state(digest) == "running", "another run does its rounds now"
    end_run(house.registry, digest, house.run(digest), ConsiliumError("run.diverged", "Not so."))
    assert (house.state(digest), "Not so." in house.row(digest).reason) == ("failed", True)
