"""Killed at any step of a round, a study goes on: nothing counted twice, nothing asked twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_samples import SITES, House, a_study
from sqlalchemy import delete

from consilium_common.errors import ConsiliumError
from consilium_server.round_tables import round_now, site_rounds
from consilium_server.rounds import concluding, context, taking
from consilium_server.rounds.board import Board
from consilium_server.rounds.context import Run
from consilium_server.rounds.taking import Taking
from consilium_server.study_files import StudyFiles
from consilium_server.tables import Round


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages ask which task makes them; here it is any."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 3)


class Killed(BaseException):
    """The process is gone: nothing after this runs."""


#: Each step of a round in its order: what does it, whether it was done, and how often before.
STEPS: list[tuple[Any, str, str, int]] = [
    (taking, "check_update", "before", 0),
    (Run, "note", "before", 0),
    (Run, "note", "after", 1),
    (taking, "write_atomic", "after", 0),
    (taking, "write_atomic", "after", 2),
    (concluding, "aggregate", "after", 0),
    (Board, "keep", "after", 0),
    (concluding, "save_checkpoint", "before", 0),
    (concluding, "save_checkpoint", "after", 0),
    (Taking, "clear", "after", 1),
    (StudyFiles, "forget_all", "after", 0),
]


def killing(real: Callable[..., Any], when: str, calls: int) -> Callable[..., Any]:
    left = [calls]

    def instead(*args: Any, **values: Any) -> Any:
        last = left[0] == 0
        left[0] -= 1
        if last and when == "before":
            raise Killed
        found = real(*args, **values)
        if last:
            raise Killed
        return found

    return instead


def uneven(house: House) -> None:
    """Let what a site sends depend on the model, so that no round can stand for another."""
    add = house.answers.update
    house.answers.update = lambda model, site: {  # type: ignore[method-assign]
        name: (tensor * tensor.dtype.type(0.7)) for name, tensor in add(model, site).items()
    }


def test_killed_between_any_two_steps_a_study_ends_with_the_very_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = a_study(
        evaluation={"release": "exact", "every": 4},
        federation={"rounds": len(STEPS) + 1, "averaging": 0.5, "strategy": {"name": "fedavgm"}},
    )
    undisturbed, killed = House(tmp_path / "a", study), House(tmp_path / "b", study)
    uneven(undisturbed)
    uneven(killed)
    undisturbed.run()
    asked: list[tuple[str, int]] = []
    for owner, name, when, calls in STEPS:
        done = len(killed.registry.rounds(study.digest))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killing(getattr(owner, name), when, calls))
            with pytest.raises(Killed):
                killed.run()
        asked += killed.answers.asked
        killed.answers.asked.clear()
        assert len(killed.registry.rounds(study.digest)) <= done + 2
    killed.run()
    asked += killed.answers.asked

    assert killed.registry.study(study.digest).state == "finished"
    folder = "model.safetensors"
    models = [
        (house.home.study_folder(study.digest) / folder).read_bytes()
        for house in (undisturbed, killed)
    ]
    assert models[0] == models[1]
    # A kill repeats at most the round that it fell in; each is recorded once with all its sites.
    assert len(asked) <= len(set(asked)) + len(STEPS)
    rounds = killed.registry.rounds(study.digest)
    assert [row.number for row in rounds] == list(range(study.federation.rounds))
    assert all(row.sites == list(SITES) for row in rounds)
    for site in SITES:
        noted = [
            [(row.purpose, row.round, row.sha256) for row in house.registry.received(site)]
            for house in (undisturbed, killed)
        ]
        assert noted[0] == noted[1]
    left = killed.home.study_folder(study.digest)
    assert list((left / "taken").iterdir()) == list((left / "in").iterdir()) == []


def test_what_was_taken_is_not_asked_for_again_and_the_rest_is(tmp_path: Path) -> None:
    house = House(tmp_path, a_study(federation={"quorum": 3}))

    def broken(site: str, kind: str, number: int) -> Any:
        if site == "south" and kind == "train" and number == 1:
            raise ConsiliumError("run.failed", "Not now.")

    house.answers.instead = broken
    assert house.stuck() == "waiting for 1 more site; south: run.failed: Not now."
    seen: list[tuple[str, str, int]] = []

    def watched(site: str, kind: str, number: int) -> Any:
        seen.append((site, kind, number))

    house.answers.instead = watched
    house.run()
    assert [one for one in seen if one[1:] == ("train", 1)] == [("south", "train", 1)]
    parts = site_rounds(house.registry, house.study.digest)[1]
    assert [(part.site, part.outcome) for part in parts] == [(site, "accepted") for site in SITES]


@pytest.mark.parametrize("damage", ["cut", "of-another-round", "no-json"])
def test_what_a_crash_of_the_machine_left_is_not_believed(tmp_path: Path, damage: str) -> None:
    house = House(tmp_path / "a", a_study(federation={"quorum": 3}))
    undisturbed = House(tmp_path / "b", house.study)
    undisturbed.run()
    house.answers.instead = lambda site, kind, number: (
        to_nobody() if (site, kind) == ("south", "train") else None
    )
    house.stuck()
    taken = house.home.study_folder(house.study.digest) / "taken"
    if damage == "cut":
        # Files are linked: a shorter one in its place is what a crash may leave.
        content = (taken / "north.sent").read_bytes()
        (taken / "north.sent").unlink()
        (taken / "north.sent").write_bytes(content[:-4] + b"\0\0\0\0")
    elif damage == "of-another-round":
        document = json.loads((taken / "north.json").read_bytes())
        (taken / "north.json").write_text(json.dumps(document | {"into": 1}))
    else:
        (taken / "north.json").write_text("{")
    seen: list[str] = []

    def watched(site: str, kind: str, number: int) -> Any:
        if number == 0:
            seen.append(site)

    house.answers.instead = watched
    house.run()
    assert sorted(set(seen)) == ["north", "south"]
    for name, tensor in undisturbed.model.items():
        assert (tensor == house.model[name]).all()


def to_nobody() -> Any:
    raise ConsiliumError("run.failed", "Not now.")


def test_an_update_that_did_not_survive_the_machine_is_fetched_again(tmp_path: Path) -> None:
    house = House(tmp_path, a_study())
    files = StudyFiles(house.home.study_folder(house.study.digest))
    folder = house.home.study_folder(house.study.digest) / "in" / "north"
    files.expect("north", 0, 10)
    (folder / ("a" * 64)).write_bytes(b"")
    files.verify()
    assert [path.name for path in folder.iterdir()] == ["expected.json"]


def test_a_full_disk_stops_the_run_and_is_no_site_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path, a_study())

    def full(*_: Any, **__: Any) -> None:
        raise ConsiliumError("state.disk", "No room.")

    with monkeypatch.context() as patch:
        patch.setattr(taking, "write_atomic", full)
        assert house.fails() == "state.disk"
    assert site_rounds(house.registry, house.study.digest) == {}
    house.run()
    assert [row["sites"] for row in house.show()["rounds"]] == [list(SITES)] * 2


def test_a_checkpoint_goes_on_only_with_the_records_of_its_own_rounds(tmp_path: Path) -> None:
    house = House(tmp_path, a_study(federation={"quorum": 3}))
    house.answers.instead = lambda site, kind, number: (
        to_nobody() if (site, kind, number) == ("south", "train", 1) else None
    )
    house.stuck()
    (row,) = house.registry.rounds(house.study.digest)

    def recorded(history: str | None) -> None:
        with house.registry.transaction() as session:
            session.execute(delete(Round))
            if history is not None:
                values = {c.name: getattr(row, c.name) for c in Round.__table__.columns}
                session.add(Round(**values | {"history": history}))

    house.answers.instead = lambda *_: None
    house.answers.asked.clear()
    for restored in (None, "f" * 64):
        recorded(restored)
        assert house.fails() == "state.checkpoint"
    assert house.answers.asked == []
    recorded("")  # by an earlier release
    house.run()
    assert [one.number for one in house.registry.rounds(house.study.digest)] == [0, 1]


@pytest.mark.parametrize("buffered", [None, {"size": 3}])
def test_sites_that_are_there_and_give_nothing_usable_end_the_run_after_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffered: dict[str, int] | None
) -> None:
    assert context._STUCK_SECONDS >= 60
    monkeypatch.setattr(context, "_WISH_SECONDS", 0.0)
    monkeypatch.setattr(context, "_STUCK_SECONDS", 1.5)
    house = House(tmp_path, a_study(federation={"quorum": 3, "buffered": buffered}))
    asked: list[str] = []

    def broken(site: str, kind: str, number: int) -> Any:
        if site != "north":
            asked.append(site)
            to_nobody()

    house.answers.instead = broken
    assert house.fails() == "run.stuck"
    assert asked.count("east") >= 2, "they were tried again first"
    house.answers.instead = lambda *_: None
    house.run()
    assert [row["sites"] for row in house.show()["rounds"]] == [list(SITES)] * 2


def test_while_it_waits_a_study_says_for_what(tmp_path: Path) -> None:
    house = House(tmp_path, a_study(federation={"quorum": 3}))
    house.answers.instead = lambda site, kind, number: to_nobody() if site == "east" else None
    house.stuck()
    shown = round_now(house.registry, house.study.digest)
    assert shown is not None
    assert shown.shown() | {"began_at": ""} == {
        "number": 0,
        "purpose": "training",
        "began_at": "",
        "deadline_seconds": 20.0,
        "sites": {"east": "failed", "north": "accepted", "south": "accepted"},
        "why": {"east": "run.failed: Not now."},
        "waits_for": "waiting for 1 more site; east: run.failed: Not now.",
    }
    assert house.registry.study(house.study.digest).state == "running"
